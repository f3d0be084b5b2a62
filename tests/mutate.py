"""Breaks the kernels on purpose, one fault at a time, and expects the tests to notice.

``python tests/mutate.py`` builds a copy of the tree for each fault and runs the numerical tests on
it: a survivor is a promise that nothing tests. Minutes long, so not part of the ordinary run.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = ["test_numerics.py", "test_special_values.py", "test_autograd.py"]

# (file, what stands there, what is put in its place)
FAULTS = [
    # T² left out of the value, of the gradient (T² / T), of one of the two logits.
    ("csrc/row_math.inl", "return t * t * kl", "return kl"),
    ("csrc/cpu/run.cpp", "p.alpha * p.temperature / soft_rows", "p.alpha / soft_rows"),
    ("csrc/cpu/sweeps.inl", "exp2_scaled(dt, soft_exponent)", "exp2_scaled(dt, hard_exponent)"),
    # p and q swapped, in the value and in the gradient.
    ("csrc/cpu/sweeps.inl", "four.cross += et * (dt - ds)", "four.cross += es * (ds - dt)"),
    ("csrc/cpu/sweeps.inl", "rounded(a * x) - rounded(b * y)", "rounded(b * y) - rounded(a * x)"),
    # Wrong denominators: all rows, not the active ones; the other softmax's sum.
    ("csrc/cpu/run.cpp", "counts.soft ? static_cast<double>(counts.soft)", "true ? double(p.rows)"),
    ("csrc/cpu/run.cpp", "c.hard += p.weight ? p.weight[label] : 1.0", "c.hard += 1.0"),
    ("csrc/cpu/rows.inl", "p.soft_scale / sums.teacher", "p.soft_scale / sums.student"),
    # The running maximum: not carried over to the next block, or not to the sums so far.
    ("csrc/cpu/sweeps.inl", "sums.cross += sums.teacher * step;", ""),
    ("csrc/cpu/sweeps.inl", "if (dt != 0) step.teacher = exp(dt * inverse_t);", ""),
    ("csrc/cpu/sweeps.inl", "sums.hard *= seen == 0 ? 0.0 : exp(-step);", ""),
    # Special values.
    ("csrc/cpu/rows.inl", "if (sums.masked && kl == kl) kl = INFINITY;", ""),
    ("csrc/cpu/sweeps.inl", "max == -INFINITY ? 0 : max", "max"),
    ("csrc/cpu/rows.inl", "if (!p.soft_active(i)) {", "if (false) {"),
    # Digits: the entries that cancel, one rounding instead of two, rows redone in double, float16.
    ("csrc/cpu/rows.inl", "if (e.index >= 0) store_block", "if (false) store_block"),
    ("csrc/cpu/rows.inl", "entries[0].index = -1;", "entries[1].index = -1;"),
    ("csrc/cpu/sweeps.inl", "rounded(a * x) - rounded(b * y)", "a * x - b * y"),
    ("csrc/cpu/rows.inl", "return !(error > kLossBound * (1 + loss))", "return true"),
    ("csrc/cpu/rows.inl", "return !(error * kEpsilon * kEpsilon > squares", "return !(0 > squares"),
    ("csrc/cpu/rows.inl", "sizeof(Real) == 4 && p.grad == p.student", "false"),
    ("csrc/cpu/run.cpp", "p.student_dtype == kFloat16 ? float16_scale", "false ? float16_scale"),
    # Label smoothing.
    ("csrc/cpu/rows.inl", "smooth * (p.weight_sum * (lse", "(p.weight_sum * (lse"),
    ("csrc/cpu/sweeps.inl", "f.smooth * w;\n    if (label", "0;\n    if (label"),
    # Plumbing.
    ("kdkernels/backends/base.py", "incoming.unsqueeze(-1)", "incoming[:1].unsqueeze(-1)"),
    ("kdkernels/functional.py", "grad = grad.clone()", "pass"),
    ("kdkernels/functional.py", "grad = _differentiable_gradient(", "grad = _take_gradient("),
    ("kdkernels/functional.py", "ctx.mark_dirty(student)", "pass"),
]  # fmt: skip


def survives(file: str, old: str, new: str) -> bool:
    """Whether the tests still pass with the fault in a copy of the tree."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "kdkernels"
        is_native = file.startswith("csrc")
        ignored = [".git", "build", "*.egg-info", ".*_cache", "runs", *(["*.so"] * is_native)]
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*ignored))
        text = (copy / file).read_text(encoding="utf-8")
        (copy / file).write_text(text.replace(old, new) if old else text, encoding="utf-8")
        if is_native:
            build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            subprocess.run(build, cwd=copy, check=True, capture_output=True)
        if not list((copy / "kdkernels").glob("_cpu.*.so")):
            raise SystemExit(f"{file} does not compile with {new!r}")
        tests = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        tests += [str(copy / "tests" / name) for name in TESTS]
        environment = os.environ | {"PYTHONPATH": str(copy)}
        run = subprocess.run(tests, cwd=copy, env=environment, capture_output=True, text=True)
        if run.returncode not in (0, 1):  # 1: tests failed, which is what is wanted
            raise SystemExit(f"the tests did not run:\n{run.stdout}{run.stderr}")
        return run.returncode == 0


def main() -> int:
    for file, old, _ in FAULTS:
        if (ROOT / file).read_text(encoding="utf-8").count(old) == 0:
            raise SystemExit(f"{file} no longer holds {old!r}: mend the list")
    if not survives("csrc/cpu/run.cpp", "", ""):
        raise SystemExit("the tests fail without a fault, too")
    survivors = 0
    for file, old, new in FAULTS:
        is_survivor = survives(file, old, new)
        survivors += is_survivor
        print(f"{'SURVIVED' if is_survivor else 'noticed '} {file}: {old!r} -> {new!r}", flush=True)
    print(f"{len(FAULTS) - survivors} of {len(FAULTS)} faults noticed")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())
