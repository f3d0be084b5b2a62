"""The promises hold with every instruction set, not only with the best one of this machine."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kdkernels import _cpu

TESTS = Path(__file__).parent
SETS = ("avx512", "avx2", "portable")
ASK = "from kdkernels import _cpu; print(_cpu.instruction_set())"


def test_every_set_that_runs_here_computes_what_is_promised():
    """Without FMA an exponential is off by more, which every bound has to know."""
    names = ("numerics", "special_values", "divergences", "dkd")
    files = [str(TESTS / f"test_{name}.py") for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    # Without what asks every set itself, and sizes that only take longer.
    command += ["-k", "not instruction_set and not vocabulary_sizes"]

    def run(arguments, name):
        environment = os.environ | {"KDKERNELS_CPU": name, "OMP_NUM_THREADS": "1"}
        return subprocess.run(arguments, env=environment, capture_output=True, text=True)

    others = [
        name
        for name in SETS
        if name != _cpu.instruction_set()
        and run([sys.executable, "-c", ASK], name).stdout.strip() == name
    ]
    with ThreadPoolExecutor() as pool:
        for name, done in zip(others, pool.map(lambda n: run(command, n), others), strict=True):
            assert done.returncode == 0, f"{name}: {done.stdout[-3000:]}"
