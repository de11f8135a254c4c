"""Operations that are one kernel on CUDA: a Triton kernel and a twin in plain torch each.

A module per operation has the twin and says which of both runs. The module `triton_*` beside it has
the kernel, and is imported where the kernel runs: triton may be missing, and imports slowly. A
kernel is an operator of torch too, with shapes for tensors without storage.
"""
