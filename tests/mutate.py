"""Breaks the kernels on purpose, one fault at a time, and expects the tests to notice.

``python tests/mutate.py`` builds a copy of the tree for each fault and runs the tests of what the
fault is in: a survivor is a promise that nothing tests. ``python tests/mutate.py csrc/cuda`` takes
the faults of those files alone. Long, so not part of the ordinary run.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
TIMEOUT_S = 900


class Suite(NamedTuple):
    """What is to notice a fault in the files whose paths start with ``prefix``."""

    prefix: str
    tests: list[str]  # pytest's arguments
    environment: dict[str, str]
    builds: bool  # the module that is installed; the CUDA tests build their own


INTERPRETED = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
OF_THE_CPU = ["test_numerics.py", "test_special_values.py", "test_autograd.py"]
# The first that fits. What nvcc compiles says nothing of the numbers, and takes long.
SUITES = [
    Suite("csrc/cuda/", ["test_cuda.py", "-k", "not spills and not moved_16_bytes"], {}, False),
    Suite(
        "kdkernels/backends/triton",
        ["test_triton.py", "test_triton_divergences.py", "test_triton_general.py"],
        INTERPRETED,
        False,
    ),
    Suite(
        "csrc/",
        [
            *OF_THE_CPU,
            "test_divergences.py",
            "test_dkd.py",
            "test_objectives.py",
            "test_teachers.py",
            "test_plain.py",
            "test_memory.py",
            "test_instruction_sets.py",
        ],
        {},
        True,
    ),
    Suite("", OF_THE_CPU, {}, False),
]

TRITON = "kdkernels/backends/triton_kernels/"

# (file, what stands there, what is put in its place)
FAULTS = [
    # T² left out of the value, of the gradient (T² / T), of one of the two logits.
    ("csrc/row_math.inl", "return p.soft_factor * (kl < 0.0", "return (kl < 0.0"),
    ("csrc/cpu/run.cpp", "p.alpha * p.soft_factor / p.temperature", "p.alpha / p.temperature"),
    ("csrc/cpu/sweeps.inl", "exp2_scaled<Real>(e, soft", "exp2_scaled<Real>(e, hard"),
    # p and q swapped, in the value and in the gradient.
    ("csrc/cpu/sweeps.inl", "product[k] = e[N + k] - e[k]", "product[k] = e[k] - e[N + k]"),
    ("csrc/cpu/sweeps.inl", "rounded(a * x) - rounded(b * y)", "rounded(b * y) - rounded(a * x)"),
    # Wrong denominators: all rows, not the active ones; the other softmax's sum.
    ("csrc/cpu/run.cpp", "mean && counts.soft != 0 ? counts.soft :", "mean ? double(p.rows) :"),
    ("csrc/cpu/run.cpp", "(p.weight ? p.weight[label] : 1.0)", "1.0"),
    ("csrc/row_math.inl", "soft_scale / sums.teacher", "soft_scale / sums.student"),
    # The running maximum: not carried over to the next block, or not to the sums so far.
    ("csrc/row_math.inl", "sums.cross += sums.teacher * step;", ""),
    ("csrc/cpu/sweeps.inl", "step.teacher = exp(dt / p.teacher_temperature);", ""),
    ("csrc/row_math.inl", "sums.hard *= seen == 0 ? 0.0 : exp(-step);", ""),
    # Special values.
    ("csrc/row_math.inl", "sums.masked && loss == loss ? INFINITY : loss", "loss"),
    ("csrc/row_math.inl", "max == -INFINITY ? 0 : max", "max"),
    ("csrc/cpu/rows.inl", "if (p.soft_active(i) && p.row_weight(i) != 0) {", "if (true) {"),
    # Digits: the entries that cancel, one rounding instead of two, rows redone in double, float16.
    ("csrc/cpu/jobs.inl", "if (e.index >= 0) store_block", "if (false) store_block"),
    ("csrc/cpu/jobs.inl", "entries[0].index = -1;", "entries[1].index = -1;"),
    ("csrc/cpu/sweeps.inl", "rounded(a * x) - rounded(b * y)", "a * x - b * y"),
    ("csrc/row_math.inl", "> kLossBound * (1.0 + loss)", "> INFINITY + loss"),
    ("csrc/row_math.inl", "return error * (epsilon * epsilon) >", "return D{} >"),
    ("csrc/cpu/jobs.inl", "sizeof(Real) == 4 && p.grad == p.student", "false"),
    ("csrc/cpu/run.cpp", "p.grad && p.student_dtype == kFloat16", "false"),
    ("csrc/row_math.inl", "max_weight > 1 ? max_weight : 1", "1"),
    # What the sweeps share among rows, vectors and threads, and where the gradient goes.
    ("csrc/cpu/sweeps.inl", "chains[0].high = at_least(chains[0].high, chains[k].high);", ""),
    ("csrc/cpu/groups.inl", "size = (p.classes + 15) / 16 * 16;", "size = 0;"),
    ("csrc/cpu/jobs.inl", "p.stream && can_stream(place.grad)", "p.stream"),
    ("csrc/cpu/jobs.inl", "if (good == kLoss) p.soft[row] = soft", "if (false) p.soft[row] = soft"),
    ("csrc/cpu/jobs.inl", "kError = 2 * kEpsilon", "kError = kEpsilon"),
    ("csrc/cpu/elements.inl", "nearest_even = (b + 0x7fffu + ((b", "nearest_even = (b + ((b"),
    ("csrc/cpu/groups.inl", "if (group.sure[k] >= 0) put_entry", "if (false) put_entry"),
    ("csrc/cpu/groups.inl", "group.odd[k] |= !(all - all == 0);", ""),
    ("csrc/cpu/groups.inl", "group.risk[k] != 0) group.good", "false) group.good"),
    ("csrc/cpu/groups.inl", "group.risk[k] == 0 ? kAll : kNothing", "kAll"),
    ("csrc/cpu/narrow.inl", "group.odd[r] = !(all - all == 0);", "group.odd[r] = false;"),
    ("csrc/cpu/narrow.inl", "at_max.add(sum.at_max);", ""),
    ("csrc/cpu/narrow.inl", "g = sure == at ? sure_entry", "g = sure == at ? label_entry"),
    ("csrc/cpu/narrow.inl", "group.hard[r] < 1.5", "false"),
    ("csrc/cpu/narrow.inl", "add_smoothing(p, group, rows);", "(void)0;"),
    ("csrc/cpu/narrow.inl", "group.of_smooth * (p.weight ? p.weight[k] : 1.0)", "group.of_smooth"),
    ("csrc/cpu/memory.cpp", "block.capacity < capacity ||", "false ||"),
    ("csrc/cpu/memory.cpp", "    block = {};\n    return taken;", "    return taken;"),
    # Calls that take the short way.
    ("csrc/tensors.h", "out.strides[i] != expected) return", "false) return"),
    ("csrc/tensors.h", "|| !out.data) return", ") return"),
    ("csrc/tensors.h", "if (!is_tensor(object)) return false;", ""),
    ("csrc/bindings.cpp", "!is_negated(teacher)", "true"),
    ("csrc/bindings.cpp", "if (!same_shape(t, s, s.ndim)", "if (false"),
    ("csrc/bindings.cpp", "elements(g) == p.rows * p.classes", "true"),
    # Divergences: a sign, a share, the label's side of a mixture, what is masked, what is at risk.
    ("csrc/cpu/policies.inl", "q * m.q_ratio, p *", "-q * m.q_ratio, p *"),
    ("csrc/cpu/policies.inl", "return 1 - l;", "return l;"),
    ("csrc/cpu/policies.inl", "p_larger ? one : none;", "none;"),
    ("csrc/cpu/policies.inl", "(p_larger ? of_q : of_p) * ratio", "of_p * ratio"),
    ("csrc/cpu/divergences.inl", "return teacher_masked;", "return false;"),
    ("csrc/cpu/policies.inl", "sure ? c.q : c.q * 0x1p60f", "c.q"),
    ("csrc/cpu/divergences.inl", "t.shift = largest_power(a, 1)", "t.shift = 0"),
    ("csrc/cpu/divergences.inl", "return 1 / fabs(a * (a - 1));", "return 1;"),
    ("csrc/cpu/divergences.inl", "t.inverse_sum = 1 / sum;", ""),
    ("csrc/cpu/jobs.inl", "teacher_max[b] = job.sums.teacher_max", "teacher_max[b] += 0"),
    ("csrc/plan.h", "? 1024 : 16", "? 1 : 1"),
    # Decoupled distillation: the difference that cancels, each part, the hole, the label's share.
    # Rows that take more than one look.
    ("csrc/cpu/passes.inl", "t2 * pass.weight * rows.weight_of(view) * weight", "t2 * weight"),
    ("csrc/cpu/passes.inl", "squares == 0) return good", "true) return good"),
    ("csrc/cpu/passes.inl", "project(*spread);", ";"),
    ("csrc/cpu/passes.inl", "s.deviation * s.degrees", "s.deviation"),
    ("csrc/cpu/passes.inl", "standardize && !pass.added", "standardize"),
    ("csrc/cpu/passes.inl", "own && !pass.added ? own[row]", "own ? own[row]"),
    ("csrc/cpu/passes.inl", "return same ? temperature_of(pass)", "return same ? pass.temperature"),
    ("csrc/cpu/passes.inl", "if (!both) without_options(q);", ""),
    ("csrc/cpu/passes.inl", "weight * of_label", "of_label"),
    ("csrc/cpu/passes.inl", "pass.added ? p.added_scale :", ""),
    ("csrc/cpu/passes.inl", "exp(-ce_of_teacher)", "1"),
    ("csrc/cpu/passes.inl", "q.soft_factor * of_p.entropy()", "0"),
    ("csrc/cpu/passes.inl", "ce_of_teacher + 1e-7", "ce_of_teacher + 1e-5"),
    ("csrc/cpu/passes.inl", "/= q.teacher_temperature", "/= 1"),
    ("csrc/cpu/passes.inl", "loss_at_risk(q, value, kError)", "false"),
    ("csrc/cpu/passes.inl", "mapping.slope(", "mapping.of("),
    ("csrc/cpu/passes.inl", "p.grad != p.student && p.student_dtype", "p.student_dtype"),
    ("csrc/cpu/passes.inl", "plan.ensemble == kOfLosses) plan", "false) plan"),
    ("csrc/cpu/effective.inl", "fabs(max) < INFINITY ? max : 0", "0"),
    ("csrc/cpu/effective.inl", "bias ? x + part.get(bias + i, 0.0) : x", "x"),
    ("csrc/cpu/effective.inl", "- log(p.plan->teacher[k].weight)", ""),
    ("csrc/cpu/effective.inl", "temperature * divisor, divisor)", "temperature, divisor)"),
    ("csrc/cpu/effective.inl", "(1 - share) * x + share", "share * x + (1 - share)"),
    ("csrc/cpu/effective.inl", "x == masked ? none : x - origin", "x - origin"),
    ("csrc/cpu/top_k.inl", "known < 1 && count < p.classes", "known < 1"),
    ("csrc/cpu/top_k.inl", "if (sum > 0x1p-40 || sum != sum) return;", "return;"),
    ("csrc/cpu/top_k.inl", "if (!(q > 0.5)) return v - q * mean;", "return v - q * mean;"),
    ("csrc/cpu/top_k.inl", "tail == kZero ? Compared{0, 0} :", ""),
    ("csrc/divergence_math.inl", "q * (distance + 1)", "q * distance"),
    ("csrc/cpu/describe.inl", "e == (Real)0 ? V{} : e * distance", "e * distance * (Real)1.00001"),
    ("csrc/cpu/describe.inl", "describe(row, n, 1, label)", "describe(row, n, 1, -1)"),
    ("csrc/cpu/policies.inl", "(apart - b * (Real)distance)", "apart"),
    ("csrc/cpu/policies.inl", "4 * scale * rounding", "0 * scale * rounding"),
    ("csrc/cpu/policies.inl", "2 * c.q * c.exponent", "c.q * c.exponent"),
    ("csrc/cpu/divergences.inl", "if (total[0] < 0x1p-80) total[0] = 0;", ""),
    ("csrc/cpu/divergences.inl", "between.vanished |= logarithm", "between.vanished |= false"),
    ("csrc/cpu/divergences.inl", "dt == lowest && ds == lowest ? V{} :", ""),
    ("csrc/cpu/divergences.inl", "t.shift < -0x1p70", "false"),
    ("csrc/cpu/jobs.inl", "b.mean * b.mean + b.off + b.off_at_max", "b.mean * b.mean"),
    ("csrc/row_math.inl", "2 * scales.hard_scale * p.z_loss", "scales.hard_scale * p.z_loss"),
    ("csrc/row_math.inl", "lse + max + p.logit_shift", "lse + max"),
    ("csrc/cpu/decoupled.inl", "q.is > 0.5 ? of_p.is_not - q.is_not :", ""),
    ("csrc/cpu/decoupled.inl", "(k * beta - job.more) / sums", "k * beta / sums"),
    ("csrc/cpu/decoupled.inl", "soft - job.more / job.sums.student", "soft"),
    ("csrc/cpu/decoupled.inl", "(sums.masked && rest == rest) || apart", "apart"),
    ("csrc/cpu/decoupled.inl", "(fabs(alpha) + fabs(beta))", "1"),
    ("csrc/cpu/decoupled.inl", "beta = sums.teacher == 0 ? 0 :", "beta ="),
    ("csrc/cpu/decoupled.inl", " || apart)", ")"),
    ("csrc/cpu/sweeps.inl", "  copy[hole] = NAN;", ""),
    # Label smoothing.
    ("csrc/row_math.inl", "smooth * (scales.weight_sum * (lse", "(scales.weight_sum * (lse"),
    ("csrc/row_math.inl", "f.hard * others.hard + f.smooth * w", "f.hard * others.hard"),
    # Plumbing.
    ("kdkernels/backends/base.py", "incoming.unsqueeze(-1)", "incoming[:1].unsqueeze(-1)"),
    ("kdkernels/functional.py", "grad = grad.clone()", "pass"),
    ("kdkernels/functional.py", "return _differentiable_gradient(", "return _take_gradient("),
    ("kdkernels/functional.py", "ctx.mark_dirty(student)", "pass"),
    # CUDA: heads and tails of rows that do not start on a vector, and of the backward's.
    ("csrc/cuda/rows.cuh", "p.classes + shift + kVector - 1", "p.classes + kVector - 1"),
    ("csrc/cuda/rows.cuh", "kSameType && misaligned(teacher) == shift", "kSameType"),
    ("csrc/cuda/rows.cuh", "grad_aligned = misaligned(grad) == shift", "grad_aligned = true"),
    ("csrc/cuda/scale.cuh", "k < n - body * kVector", "k < head"),
    ("csrc/cuda/scale.cuh", "misaligned ? kVector - misaligned : 0", "0"),
    # The exchange between the blocks of a cluster, and what keeps its memory from being reused.
    ("csrc/cuda/teams.cuh", "if (kCluster && lane() < slices())", "if (false)"),
    ("csrc/cuda/teams.cuh", "if (thread_index() < slices())", "if (thread_index() < 1)"),
    ("csrc/cuda/teams.cuh", "parity ^= 1;", ""),
    # Rows read again: in place, in double, and the loss that stays as it was.
    ("csrc/cuda/rows.cuh", "chunks > 1 && p.grad == p.student", "false"),
    ("csrc/cuda/rows.cuh", "(chunk > 0 || sizeof(Real) == 8)", "chunk > 0"),
    ("csrc/cuda/rows.cuh", "attempt<InDouble>(again);", "again = terms;"),
    ("csrc/cuda/rows.cuh", "if (good == kNothing) terms = again;", "terms = again;"),
    ("csrc/cuda/rows.cuh", "kFast ? 0x1p-22 : kEpsilon", "kFast ? 0 : kEpsilon"),
    ("csrc/cuda/rows.cuh", "if (grad) write_zeros();", ""),
    # What the means divide by, class weights, and who adds up.
    ("csrc/cuda/kernel.cuh", "if (hard || p.distill_ignored) sums[0]", "sums[0]"),
    ("csrc/cuda/kernel.cuh", "if (hard) sums[1]", "sums[1]"),
    ("csrc/cuda/kernel.cuh", "label >= 0 && label < p.classes ? label : 0", "0"),
    ("csrc/cuda/counts.cuh", "weights += p.weight[k];", "weights += 1;"),
    ("csrc/cuda/counts.cuh", "max_weight[0] = max_nan(max_weight[0], p.weight[k]);", ""),
    ("csrc/cuda/kernel.cuh", "last = count_arrival(arrivals) ==", "last = block_index() =="),
    ("csrc/cuda/kernel.cuh", "if (last) *arrivals = 0;", ""),
    ("csrc/cuda/run.cu", "plan.launch.cluster, std::min", "0, std::min"),
    # The general kernel: each pass's numbers, what cancels, what is masked, float16's room.
    ("csrc/cuda/general.cuh", "if (weight_of(first) == 0) return;", ""),
    ("csrc/cuda/general.cuh", "same ? nominal :", "same ? pass.temperature :"),
    ("csrc/cuda/general.cuh", "exp(-of_teacher)", "1"),
    ("csrc/cuda/general.cuh", "of_teacher + 1e-7", "of_teacher + 1e-5"),
    ("csrc/cuda/general.cuh", "nominal * state.of_student.divisor() :", "nominal :"),
    ("csrc/cuda/general.cuh", " * of_student.degrees", ""),
    ("csrc/cuda/general.cuh", "more - (at_label + more) * others :", "g - at_label :"),
    ("csrc/cuda/general.cuh", "2 * p.z_loss * r.log_total()", "p.z_loss * r.log_total()"),
    ("csrc/cuda/general.cuh", "mapping.slope(source[i], i)", "mapping.of(source[i], i)"),
    ("csrc/cuda/general.cuh", "spoilt ? NAN : before(i)", "before(i)"),
    ("csrc/cuda/compared.cuh", "v * others - q * others_v :", "v - q * mean :"),
    ("csrc/cuda/compared.cuh", "rest.v * n.of[0] - rest.q * n.of[1]", "rest.v - rest.q * mean"),
    ("csrc/cuda/compared.cuh", "p.plan.top_k.k < p.classes", "true"),
    ("csrc/cuda/compared.cuh", "odds_q.is > 0.5 ? odds_p.is_not - odds_q.is_not :", ""),
    ("csrc/cuda/compared.cuh", "others.of[0] - others.of[1] : q - of", "q - of : q - of"),
    ("csrc/cuda/compared.cuh", "of_p.sum == 0 ? 0 : beta", "beta"),
    ("csrc/cuda/compared.cuh", "s == -INFINITY ? s : of_q.log(s)", "of_q.log(s)"),
    ("csrc/cuda/compared.cuh", "only_known() ? 0 : a * exp(log_p)", "a * exp(log_p)"),
    ("csrc/cuda/effective.cuh", "classes.leads() && max != max", "false"),
    ("csrc/cuda/effective.cuh", "!(values[k] < INFINITY)", "false"),
    ("csrc/cuda/effective.cuh", "softmax.log(other[i]) + log_weight", "softmax.log(other[i])"),
    ("csrc/cuda/general.cu", "p.plan.sum_added ? 1 : s.soft_rows", "s.soft_rows"),
    ("csrc/cuda/general.cu", "largest_size(rows, p.plan.sample_weight, 1)", "1"),
    ("csrc/cuda/general.cu", "largest_size(rows, t.row_weight, fabs(t.weight))", "1"),
    ("csrc/cuda/general.cu", "plan.row_temperature && !pass.added ? own :", ""),
    ("csrc/cuda/general.cu", "largest_size(classes, p.weight, 1)", "1"),
    # The backward: 0 * inf, a factor of 1, the pieces of long rows.
    ("csrc/cuda/scale.cuh", "if (values[e] != 0) values[e]", "values[e]"),
    ("csrc/cuda/scale.cuh", "if (g != 0) round_to", "round_to"),
    ("csrc/cuda/scale.cuh", "if (factor == 1) continue;", ""),
    ("csrc/cuda/scale.cuh", "begin = i % pieces * kPiece", "begin = 0"),
    # Triton: the same, where it says it in its own words.
    (TRITON + "gradient.py", "kl == kl), float(\"inf\"), kl)", "kl == kl), kl, kl)"),
    (TRITON + "sums.py", "(sums.teacher + sums.teacher_ones) * step", "0 * step"),
    (TRITON + "sums.py", "tl.where(old == float(\"-inf\"), 0.0, tl.exp", "(tl.exp"),
    (TRITON + "gradient.py", "sums.teacher_ones - et_sure", "0 * et_sure"),
    (TRITON + "gradient.py", "at_sure, at_sure + f.label", "at_sure, at_sure"),
    (TRITON + "rows.py", "~risk & (tile.active |", "(tile.active |"),
    (TRITON + "rows.py", "asked.inplace and judged", "False and judged"),
    (TRITON + "rows.py", "keep | tile.idle", "keep"),
    (TRITON + "rows.py", "flag == 2", "flag > 0"),
    (TRITON + "batch.py", "if not DISTILL_IGNORED:", "if False:"),
    (TRITON + "batch.py", "_largest(weight, classes, WIDE, BLOCK)", "one"),
    (TRITON + "batch.py", "tl.where(g == 0, g, g *", "tl.where(g != g, g, g *"),
    (TRITON + "batch.py", "of_soft *= tl.load(scales + LARGEST)", "pass"),
    # Divergences: a weight, a temperature, the sum of v; the hole, and what fills it.
    (TRITON + "divergences.py", "total.v + _times(w, terms[1])", "total.v + terms[1]"),
    (TRITON + "divergences.py", "dt * teacher_inverse", "dt * inverse"),
    (TRITON + "divergences.py", "mean = vees.others + vees.at", "mean = vees.others"),
    (TRITON + "divergences.py", "tl.where(w.beta == 1, w.jsd, 0.0)", "0.0 * w.jsd"),
    (TRITON + "gradient.py", "& (asked.mixture is None)", ""),
    (TRITON + "sums.py", "s), tl.where(hole", "s), tl.where(s != s"),
    (TRITON + "decoupled.py", "sums.student + d.more, student", "sums.student, student"),
    ("kdkernels/backends/triton.py", "grad_scale = scales[scale_at : scale_at + 1]", "pass"),
    ("kdkernels/backends/triton.py", "inplace and source is not student", "False"),
]  # fmt: skip


def suite_of(file: str) -> Suite:
    return next(suite for suite in SUITES if file.startswith(suite.prefix))


def noticed_by(file: str, old: str, new: str) -> str:
    """The first test that fails with the fault in a copy of the tree; nothing if all pass."""
    suite = suite_of(file)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "kdkernels"
        ignored = [".git", "build", "*.egg-info", ".*_cache", "runs"]
        ignored += ["*.so"] if suite.builds else []
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*ignored))
        text = (copy / file).read_text(encoding="utf-8")
        (copy / file).write_text(text.replace(old, new) if old else text, encoding="utf-8")
        if suite.builds:
            build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            subprocess.run(build, cwd=copy, check=True, capture_output=True)
        if not list((copy / "kdkernels").glob("_cpu.*.so")):
            raise SystemExit(f"{file} does not compile with {new!r}")
        names = [str(copy / "tests" / a) if a.endswith(".py") else a for a in suite.tests]
        tests = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *names]
        status, output = run(tests, copy, suite.environment | {"PYTHONPATH": str(copy)})
        if "CalledProcessError" in output and "c++" in output:
            raise SystemExit(f"{file} does not compile with {new!r}:\n{output}")
        # 1: tests failed, which is what is wanted. Ended from outside they have noticed nothing.
        if status > 1 or status in (-signal.SIGTERM, -signal.SIGINT):
            raise SystemExit(f"the tests did not run:\n{output}")
        failed = re.search(r"^(?:FAILED|ERROR) \S*::(\S+)", output, re.M)
        return "" if status == 0 else failed[1] if failed else "a crash, or no end"


def run(command: list[str], folder: Path, environment: dict[str, str]) -> tuple[int, str]:
    """The exit status and what was printed; negative for a crash or a barrier that never opens."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that what the tests start ends with them
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    return process.returncode, output


def main(part: str = "") -> int:
    faults = [fault for fault in FAULTS if part in fault[0]]
    for file, old, _ in faults:
        if (ROOT / file).read_text(encoding="utf-8").count(old) == 0:
            raise SystemExit(f"{file} no longer holds {old!r}: mend the list")
    first_files = {suite_of(file).prefix: file for file, _, _ in reversed(faults)}
    for file in first_files.values():
        if test := noticed_by(file, "", ""):
            raise SystemExit(f"the tests of {file} fail without a fault, too: {test}")
    survivors = 0
    for file, old, new in faults:
        test = noticed_by(file, old, new)
        survivors += not test
        outcome = f"noticed by {test}" if test else "SURVIVED"
        print(f"{file}: {old!r} -> {new!r}: {outcome}", flush=True)
    print(f"{len(faults) - survivors} of {len(faults)} faults noticed")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
