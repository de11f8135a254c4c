"""Models of other libraries in and out, and one checkpoint's model on one process: its logits, its scores."""
