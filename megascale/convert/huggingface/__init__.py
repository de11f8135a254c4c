"""Models of Hugging Face in and out: config.json, safetensors and tokenizer files."""
