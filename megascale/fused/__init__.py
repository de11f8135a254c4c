"""Operations that are one kernel on CUDA: a Triton kernel and a twin in plain torch each.

The module of an operation has the twin and chooses which of both runs. The module `triton_*` beside
it has the kernel, and is imported only where the kernel runs: triton may be missing, and imports
slowly. Each kernel is an operator of torch, with shapes for tensors without storage.
"""
