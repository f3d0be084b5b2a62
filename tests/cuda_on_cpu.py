"""Builds csrc/cuda for the CPU (tests/native/cuda_on_cpu.h in the GPU's place) and imports it."""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

from kdkernels.backends.cuda import CUDABackend

ROOT = Path(__file__).parent.parent
UNITS = [
    "general.cu", "rows_f32.cu", "rows_bf16.cu", "rows_f16.cu", "rows_f64.cu", "run.cu",
    "bindings.cpp",
]  # fmt: skip
# No contraction, as nvcc is told; -O1: the tests run a few rows, and compiling takes longer.
FLAGS = [
    "-std=c++17", "-O1", "-fPIC", "-w", "-fno-strict-aliasing", "-ffp-contract=off",
    "-U_FORTIFY_SOURCE", "-DKD_DEVICE_HEADER=<cuda_on_cpu.h>", f"-I{ROOT / 'tests' / 'native'}",
    "-DKD_ARCHITECTURES=\"this CPU\"", f"-I{pybind11.get_include()}",
    f"-I{sysconfig.get_paths()['include']}", "-x", "c++",
]  # fmt: skip


def build(folder: Path) -> Path | None:
    """The path of the module, built in ``folder``; None where there is no compiler for it."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if not shutil.which(compiler[0]):
        return None

    def compile_unit(unit):
        target = folder / f"{unit}.o"
        source = ROOT / "csrc" / "cuda" / unit
        subprocess.run([*compiler, *FLAGS, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_unit, UNITS))
    path = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([*compiler, "-shared", *objects, "-o", path], check=True)
    return path


def load(path):
    """The module at ``path``, beside the one that is installed."""
    spec = importlib.util.spec_from_file_location("_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class CUDAOnCPU(CUDABackend):
    """The backend as it is, with another module, for CPU tensors."""

    name = "cpu"
    device_types = ("cpu",)

    def __init__(self, module, device):
        self.module, self.device = module, device

    def unavailable(self):
        return None

    def details(self):
        return "CUDA kernels on the CPU"

    def why_not(self, device, student_dtype, teacher_dtype):
        return self.why_no_kernel(student_dtype, teacher_dtype)

    def device_and_stream(self, tensor):
        return self.device, 0
