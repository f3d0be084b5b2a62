"""What the compiled module may contain: nothing of torch, and no instruction an older CPU lacks."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kdkernels import _cpu

CSRC = Path(__file__).parent.parent / "csrc" / "cpu"
SETS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma"],
}


def test_the_module_names_no_library_of_torch_and_no_openmp_runtime_of_its_own():
    """One build serves every torch (flash-attention #723, #854), and its thread pool is shared."""
    binary = Path(_cpu.__file__).read_bytes()
    for library in (b"libtorch", b"libc10", b"libgomp", b"libomp", b"libiomp"):
        assert library not in binary
    assert "gomp" in _cpu.openmp_library() or "omp" in _cpu.openmp_library()


@pytest.mark.parametrize("name", SETS)
def test_a_unit_shares_its_entry_points_and_nothing_inline(name, tmp_path):
    """An inline function the linker merges could carry AVX-512 to a CPU without (faiss #5296)."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if not compiler or not shutil.which("nm"):
        pytest.skip("needs a compiler and nm")
    if name != "portable" and os.uname().machine != "x86_64":
        pytest.skip("an x86-64 instruction set")
    unit = tmp_path / "unit.o"
    # -O0 emits every function that was not inlined by force: the worst case.
    command = [compiler, "-std=c++17", "-O0", "-w", *SETS[name], "-c", CSRC / f"rows_{name}.cpp"]
    subprocess.run([*command, "-o", unit], check=True)
    symbols = subprocess.run(["nm", unit], check=True, capture_output=True, text=True).stdout
    kinds = {words[-1].lstrip("_"): words[-2] for words in map(str.split, symbols.splitlines())}
    # Lower case: local. GLOBAL__: static initialisers, run on every CPU (bitsandbytes #2021).
    shared = [name for name, kind in kinds.items() if kind.isupper() and kind != "U"]
    assert sorted(shared) == [f"kd_columns_{name}", f"kd_rows_{name}"]
    assert not [name for name in kinds if name.startswith("GLOBAL__")]
    imported = {name for name, kind in kinds.items() if kind == "U"}
    assert imported <= {
        "exp",
        "expm1",
        "log",
        "log1p",
        "sqrt",
        "memcpy",
        "memset",
        "stack_chk_fail",
    }


def test_importing_does_not_change_how_floats_behave():
    """Linking with -ffast-math would flush denormals to zero for the whole process."""
    script = "import kdkernels._cpu; assert 5e-324 / 1 == 5e-324 != 0; assert 2.0**-1060 * 0.5 > 0"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_reason_of_a_missing_module_is_kept_for_the_user(tmp_path):
    """The source tree by itself, not built: it says so and the reference serves."""
    package = CSRC.parent.parent / "kdkernels"
    shutil.copytree(
        package, tmp_path / "kdkernels", ignore=shutil.ignore_patterns("*.so", "_build*")
    )
    shutil.copy(package.parent / "setup.py", tmp_path)
    script = (
        "import sys\n"
        # An editable install would find the compiled module of the real tree.
        "sys.meta_path = [f for f in sys.meta_path if 'Editable' not in str(f)]\n"
        "from kdkernels.__main__ import main\n"
        "main(['info'])\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, check=True, capture_output=True, text=True
    ).stdout
    assert re.search(r"cpu +no +kdkernels was imported from its source tree .*pip install", shown)
    assert re.search(r"reference +yes", shown)
