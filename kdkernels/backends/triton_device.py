"""The device that Triton launches on: whether there is one, and what it is like."""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any

import torch

OLDEST = (3, 6)  # the first Triton that compiles the kernels
REGISTERS = 65536  # of an NVIDIA multiprocessor


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU; to be set before Triton loads."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_no_device() -> str | None:
    """An installed Triton is not enough: it needs a driver that finds a GPU."""
    try:
        import triton
    except ImportError as error:
        return f"Triton does not import ({error}); try `pip install 'kdkernels[triton]'`"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
        return (
            f"Triton {triton.__version__} is too old, it takes {OLDEST[0]}.{OLDEST[1]}; "
            "try `pip install 'kdkernels[triton]'` with a newer torch"
        )
    if interpreted():
        return None
    try:
        current_target()
    except RuntimeError as error:
        return f"Triton {triton.__version__} is installed and finds no GPU: {error}"
    return None


def current_target() -> Any:
    """Backend, architecture and threads per warp of the current device."""
    from triton.runtime import driver

    return driver.active.get_current_target()


@functools.cache
def warp_size(device: int) -> int:
    """Threads of a warp of this device, which is the current one."""
    return 32 if interpreted() else int(current_target().warp_size)


@functools.cache
def launch_options(threads: int, device: int, registers: int = 200) -> dict[str, Any]:
    """How programs of so many threads run on this device, which is the current one.

    Without contraction: a*x - b*y has to be 0 where both products are the same. On NVIDIA with the
    registers that there are: left to itself ptxas aims at a number of its own, and now and then
    spills a scalar to keep it.
    """
    options = {
        "num_warps": threads // warp_size(device),
        "num_stages": 1,
        "enable_fp_fusion": False,
    }
    if not interpreted() and current_target().backend == "cuda":
        options["maxnreg"] = min(registers, REGISTERS // threads)
    return options


@functools.cache
def has_double(device_type: str, index: int | None) -> bool:
    """False for Apple's and some of Intel's GPUs: then all is float32, rows at risk included."""
    if device_type != "xpu":
        return device_type != "mps"
    return bool(torch.xpu.get_device_capability(index)["has_fp64"])


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The device made the current one, which is where Triton launches."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    module = torch.get_device_module(device)
    if module.current_device() == device.index:
        return contextlib.nullcontext()
    return module.device(device)  # type: ignore[no-any-return]
