"""Ranks, devices, process groups, seeds; CUDA or CPU is decided here and nowhere else."""
