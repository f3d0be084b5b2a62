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

ROOT = Path(__file__).parent.parent
UNITS = ["rows_f32.cu", "rows_bf16.cu", "rows_f16.cu", "rows_f64.cu", "run.cu", "bindings.cpp"]
# No contraction, as nvcc is told; -O1: the tests run a few rows, and compiling takes longer.
FLAGS = [
    "-std=c++17", "-O1", "-fPIC", "-w", "-fno-strict-aliasing", "-ffp-contract=off",
    "-U_FORTIFY_SOURCE", "-DKD_DEVICE_HEADER=<cuda_on_cpu.h>", f"-I{ROOT / 'tests' / 'native'}",
    "-DKD_ARCHITECTURES=\"this CPU\"", f"-I{pybind11.get_include()}",
    f"-I{sysconfig.get_paths()['include']}", "-x", "c++",
]  # fmt: skip


def build(folder: Path):
    """The module, built in ``folder``; None where there is no compiler for it."""
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
    spec = importlib.util.spec_from_file_location("_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
