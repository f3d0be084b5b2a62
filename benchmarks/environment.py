"""What the figures of the CPU report hold for: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import re
from datetime import datetime, timezone
from pathlib import Path

import torch

import kdkernels
from benchmarks.gpu_report import output
from kdkernels.backends import BACKENDS

CPUINFO = Path("/proc/cpuinfo")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def environment() -> dict[str, str]:
    return {
        "device": processor(),
        "kernels": instruction_set(),
        "threads": str(torch.get_num_threads()),
        "cores": str(os.cpu_count()),
        "caches": caches(),
        "transparent huge pages": huge_pages(),
        "load average before": load(),
        "system": f"{platform.system()} {platform.release()}",
        "C++ compiler": output(os.environ.get("CXX", "g++"), "--version"),
        "torch": torch.__version__,
        "kdkernels": kdkernels.__version__,
        "Python": platform.python_version(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def processor() -> str:
    """The name that the processor gives itself, without the ornaments."""
    names = re.findall(r"^model name\s*:\s*(.*)$", _text(CPUINFO), re.MULTILINE)
    name = names[0] if names else platform.processor() or platform.machine()
    return re.sub(r"\s+", " ", re.sub(r"\((R|TM)\)|\bCPU\b|@.*", " ", name)).strip()


def instruction_set() -> str:
    """Of the compiled kernel, or that there is none."""
    if BACKENDS["cpu"].unavailable() is not None:
        return "reference"
    from kdkernels import _cpu

    return _cpu.instruction_set()


def caches() -> str:
    """Per core, as the system counts them."""
    folder = Path("/sys/devices/system/cpu/cpu0/cache")
    found = {
        _text(at / "level").strip(): _text(at / "size").strip()
        for at in sorted(folder.glob("index*"))
        if _text(at / "type").strip() != "Instruction"
    }
    return ", ".join(f"L{level} {size}" for level, size in found.items())


def huge_pages() -> str:
    """always, madvise (who asks for them gets them) or never."""
    chosen = re.search(r"\[(\w+)\]", _text(HUGE_PAGES))
    return chosen[1] if chosen else "unknown"


def load() -> str:
    """Over a minute: it is not near 0 on a machine that had something else to do."""
    return f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else ""


def commit() -> str:
    found = output("git", "rev-parse", "HEAD")
    changed = output("git", "status", "--porcelain", "--untracked-files=no")
    return found if changed in ("", "unknown") else f"{found}, with changes"


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
