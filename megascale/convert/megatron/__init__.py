"""Checkpoints of Megatron in and out: megatron-core's `torch_dist` format."""
