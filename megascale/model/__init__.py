"""The network: megatron-core GPT and MoE from the config, and what it costs (`counts`)."""
