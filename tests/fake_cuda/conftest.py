"""Tests on a CUDA device that computes nothing, in the environment of tools/test_fake_cuda.sh."""

import os

if "MEGASCALE_FAKE_CUDA" in os.environ:
    import fake_device

    fake_device.install()
else:  # another environment, whose torch has no CUDA
    collect_ignore_glob = ["test_*.py"]
