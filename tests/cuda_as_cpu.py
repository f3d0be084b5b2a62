"""A pytest plugin: the CUDA backend, run on the CPU, takes the place of the CPU's own.

``pytest -p cuda_as_cpu tests/test_numerics.py`` asks of the CUDA kernels what it asks of the CPU's.
``KD_CUDA_MODULE``: what ``cuda_on_cpu.build`` made; ``KD_CUDA_DEVICE``: the GPU that it plays.
"""

import os

import torch
from cuda_on_cpu import CUDAOnCPU, load

from kdkernels import backends

torch.set_num_threads(1)
backends.BACKENDS["cpu"] = CUDAOnCPU(
    load(os.environ["KD_CUDA_MODULE"]), int(os.environ["KD_CUDA_DEVICE"])
)
backends.PLAIN_CPU.serves = lambda *_: False  # or plain calls would go to the CPU's own
