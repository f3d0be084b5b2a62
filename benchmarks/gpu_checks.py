"""What has to hold on a GPU: loss and gradient against float64, and what only a device can show.

Each function is one step of ``gpu_report.py``. On the CPU they run with other backends, so that the
report itself can be tried without a GPU.
"""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_providers import Inputs, kdkernels
from benchmarks.gpu_results import write_part
from kdkernels import kd_loss

# What the README promises; half precision is off by the rounding of its format alone.
LOSS_BOUND = 2e-6  # times (1 + |loss|)
GRAD_BOUND = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}
# The reference has PyTorch's own rounding. It stands in for a GPU backend in the dry run.
LOSS_ALLOWANCE = {"reference": 10.0}
# Lifts float16 gradients out of the subnormals, as a gradient scaler does.
GRAD_SCALE = {torch.float16: 65536.0}
INF, NAN = float("inf"), float("nan")


class Checks:
    """The checks of one step: printed as they are made, and on disk from then on."""

    def __init__(self, work: Path, step: str) -> None:
        self.work, self.step = work, step
        self.made: list[dict[str, Any]] = []
        write_part(work, f"checks-{step}", self.made)

    def record(self, name: str, passed: bool | None, detail: str = "") -> None:
        """``passed`` None: does not apply here, for the reason in ``detail``."""
        print(f"{ {True: 'PASS', False: 'FAIL', None: 'SKIP'}[passed] } {name}  {detail}".rstrip())
        self.made.append(
            {"step": self.step, "name": name, "passed": passed, "detail": detail.strip()}
        )
        write_part(self.work, f"checks-{self.step}", self.made)

    def attempt(self, name: str, check: Callable[[], tuple[bool | None, str]]) -> None:
        """Record what ``check`` returns; whatever it raises is a failure, and the next one runs."""
        try:
            passed, detail = check()
        except Exception as error:
            passed, detail = False, f"{type(error).__name__}: {error}"
        self.record(name, passed, detail)

    def all_passed(self) -> bool:
        return all(check["passed"] is not False for check in self.made)


def truth(
    student: Tensor,  # [N, C]
    teacher: Tensor,  # [N, C]
    labels: Tensor,  # [N]
    *,
    temperature: float = 4.0,
    alpha: float = 0.9,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,  # [C]
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """Loss (a row's share each, for the mean) and gradient by the formulas of the README, float64.

    In chunks of rows, as float64 copies of everything would not fit beside large logits.
    """
    classes = student.shape[1]
    active = labels != ignore_index
    weight = torch.ones(classes, device=student.device) if weight is None else weight
    weight = weight.double()
    safe = torch.where(active, labels, 0)
    mean = reduction == "mean"
    one = torch.ones((), device=student.device, dtype=torch.float64)
    soft_share = alpha / (active.sum().double() if mean else one)
    hard_share = (1 - alpha) / ((weight[safe] * active).sum() if mean else one)
    losses, grads = [], []
    step = max(1, (1 << 24) // classes)
    for first in range(0, student.shape[0], step):
        rows = slice(first, first + step)
        keep = active[rows, None]
        s = torch.where(keep, student[rows].double(), 0.0)
        t = torch.where(keep, teacher[rows].double(), 0.0)
        log_q, log_p = ((v / temperature).log_softmax(-1) for v in (s, t))
        log_r = s.log_softmax(-1)
        target = (label_smoothing / classes * weight).expand_as(s).clone()
        at = safe[rows, None]
        target.scatter_add_(1, at, (1 - label_smoothing) * weight[at])
        p = log_p.exp()
        soft = temperature**2 * torch.where(t == -INF, 0.0, p * (log_p - log_q)).sum(-1)
        hard = -torch.where(target == 0, 0.0, target * log_r).sum(-1)
        soft_grad = temperature * (log_q.exp() - p)
        hard_grad = target.sum(-1, keepdim=True) * log_r.exp() - target
        losses.append((soft_share * soft + hard_share * hard) * active[rows])
        grads.append((soft_share * soft_grad + hard_share * hard_grad) * keep)
    return torch.cat(losses), torch.cat(grads)


# --- correctness ---------------------------------------------------------------------------------


@dataclass
class Problem:
    """Logits and options of one check. ``view`` takes the student's rows out of what is stored."""

    stored: Tensor
    teacher: Tensor
    labels: Tensor
    options: dict[str, Any]
    view: Callable[[Tensor], Tensor] = lambda stored: stored
    incoming: float | None = None  # the gradient that flows in, other than 1
    inplace: bool = False


@dataclass(frozen=True)
class Case:
    rows: int
    classes: int
    dtype: torch.dtype = torch.float32
    temperature: float = 4.0
    alpha: float = 0.9
    tweak: str = "as is"
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        named = f"({self.rows}, {self.classes}) {dtype} T={self.temperature} alpha={self.alpha}"
        extras = [f"{key}={value}" for key, value in self.options.items()]
        if self.tweak != "as is":
            extras.insert(0, self.tweak)
        return ", ".join([named, *extras])


def _ignore_rows(problem: Problem) -> None:
    for logits in (problem.stored, problem.teacher):
        logits[::3] = NAN
    problem.labels[::3] = -100


def _mask_classes(problem: Problem) -> None:
    """Some classes for both, some for the teacher alone; never a label."""
    problem.labels.fill_(0)
    classes = problem.teacher.shape[1]
    problem.teacher[:, classes // 2 :: 3] = -INF
    problem.stored[:, classes // 2 :: 6] = -INF


def _same_logits(problem: Problem) -> None:
    problem.teacher = problem.stored.clone()


def _near_logits(problem: Problem) -> None:
    problem.teacher = problem.stored + 1e-3 * torch.randn_like(problem.stored)


def _huge_logits(problem: Problem) -> None:
    problem.stored *= 1e3
    problem.teacher *= 1e3


def _padded_rows(problem: Problem) -> None:
    """Rows of logits[:, 1:-2]: off any alignment, at a stride of their own."""
    problem.stored = torch.nn.functional.pad(problem.stored, (1, 2))
    problem.view = lambda stored: stored[:, 1:-2]


def _shifted_tokens(problem: Problem) -> None:
    """The logits[:, :-1] of a language model: rows at two strides."""
    rows, classes = problem.stored.shape
    longer = problem.stored.new_zeros(rows, 3, classes)
    longer[:, :-1] = problem.stored[:, None] * torch.tensor([1.0, 0.5]).to(longer)[:, None]
    problem.stored = longer
    problem.view = lambda stored: stored[:, :-1]
    problem.teacher = problem.teacher[:, None].expand(rows, 2, classes)
    problem.labels = problem.labels[:, None].expand(rows, 2)


def _float32_teacher(problem: Problem) -> None:
    problem.teacher = problem.teacher.float()


def _incoming(problem: Problem) -> None:
    problem.incoming = 0.37


def _inplace(problem: Problem) -> None:
    problem.inplace = True


TWEAKS: dict[str, Callable[[Problem], None]] = {
    "as is": lambda problem: None,
    "ignored rows hold NaN": _ignore_rows,
    "masked classes": _mask_classes,
    "student equals teacher": _same_logits,
    "student near teacher": _near_logits,
    "logits in the thousands": _huge_logits,
    "padded rows": _padded_rows,
    "logits[:, :-1]": _shifted_tokens,
    "float32 teacher": _float32_teacher,
    "incoming gradient 0.37": _incoming,
    "inplace": _inplace,
}
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# Of every regime: several rows to a warp, a row to a block, rows that stay on chip and rows that do
# not; vocabularies that are no multiple of a vector (1423, 50257); batches of many waves.
CASES = [
    *(Case(37, classes, dtype) for classes in (10, 100) for dtype in (FP32, BF16)),
    *(Case(13, classes, dtype) for classes in (1000, 1423, 4096) for dtype in (FP32, BF16)),
    *(Case(5, classes, dtype) for classes in (32000, 50257) for dtype in (FP32, BF16)),
    *(Case(3, classes, dtype) for classes in (128256, 262144) for dtype in (FP32, BF16)),
    *(Case(6, classes, FP16) for classes in (10, 1423, 32000, 128256)),
    *(Case(4, classes, FP64) for classes in (10, 1423, 32000)),
    *(Case(3, classes, FP32) for classes in (1, 2, 31, 33, 257, 2049, 8191, 16385, 65537)),
    *(Case(7, 1000, FP32, temperature) for temperature in (1.0, 2.0, 2.5, 20.0)),
    *(Case(3, 128256, BF16, temperature) for temperature in (1.0, 2.5, 20.0)),
    *(Case(7, 1423, FP32, 2.0, alpha) for alpha in (0.0, 1.0)),
    *(Case(3, 50257, BF16, 2.0, alpha) for alpha in (0.0, 1.0)),
    *(
        Case(9, classes, dtype, 2.0, 0.7, tweak)
        for tweak in list(TWEAKS)[1:]
        for classes, dtype in ((100, FP32), (1423, BF16), (50257, BF16))
    ),
    Case(9, 1000, FP32, options={"label_smoothing": 0.1}),
    Case(9, 50257, BF16, options={"reduction": "sum"}),
    Case(9, 1000, FP32, options={"reduction": "none"}),
    Case(9, 1000, FP32, options={"weight": True}),
    Case(70001, 100, FP32),
    Case(4099, 4096, BF16),
]


def correctness(work: Path, device: str, backends: list[str], largest: int, seconds: float) -> bool:
    """Every case up to ``largest`` classes on all backends; one without time left has failed."""
    checks = Checks(work, "correctness")
    end = time.perf_counter() + seconds
    for backend in backends:  # one that has to compile first must not take another's time
        name = f"{backend}: a label out of range"
        checks.attempt(name, lambda b=backend: label_out_of_range(device, b))
        for case in cases_up_to(largest):
            name = f"{backend}: {case}"
            if time.perf_counter() > end:
                checks.record(name, False, "no time was left for it")
            else:
                checks.attempt(name, lambda c=case, b=backend: compare(make(c, device), b))
    return checks.all_passed()


def cases_up_to(largest: int) -> list[Case]:
    return [c for c in CASES if c.classes <= largest and c.rows * c.classes <= 1000 * largest]


def make(case: Case, device: str) -> Problem:
    generator = torch.Generator(device).manual_seed(1000 * case.rows + case.classes)
    shape = (case.rows, case.classes)
    student, teacher = (
        (torch.randn(shape, device=device, generator=generator) * 3).to(case.dtype)
        for _ in range(2)
    )
    labels = torch.randint(case.classes, shape[:1], device=device, generator=generator)
    options = {"temperature": case.temperature, "alpha": case.alpha, **case.options}
    if "weight" in options:
        options["weight"] = torch.rand(case.classes, device=device, generator=generator) + 0.1
    problem = Problem(student, teacher, labels, options)
    TWEAKS[case.tweak](problem)
    return problem


def compare(problem: Problem, backend: str) -> tuple[bool, str]:
    """Loss and gradient within their bounds, the same bits twice, nothing touched around them."""
    dtype = problem.stored.dtype
    student = problem.view(problem.stored)
    flat = (v.reshape(-1, student.shape[-1]) for v in (student, problem.teacher))
    losses, expected = truth(*flat, problem.labels.reshape(-1), **problem.options)
    incoming = problem.incoming or GRAD_SCALE.get(dtype, 1.0)
    loss, grad = loss_and_gradient(problem, backend, incoming)
    again = loss_and_gradient(problem, backend, incoming)

    off = loss_error(loss, losses if loss.dim() else losses.sum())
    taken = problem.view(grad).reshape(expected.shape).double() / incoming
    difference, norm = (taken - expected).norm().item(), expected.norm().item()
    roundings = 2 if problem.incoming else 1  # once as it is made, once as it is scaled
    around = grad.clone()
    problem.view(around).zero_()
    verdicts = {
        "loss": off <= LOSS_BOUND * LOSS_ALLOWANCE.get(backend, 1.0),
        "gradient": difference <= roundings * GRAD_BOUND[dtype] * norm + 1e-30,
        "other bits the second time": torch.equal(loss, again[0]) and torch.equal(grad, again[1]),
        "wrote beyond its rows": not around.any().item(),
    }
    wrong = [name for name, holds in verdicts.items() if not holds]
    detail = f"loss off {off:.1e}, gradient off {difference / (norm or 1):.1e} of its norm"
    return not wrong, detail + (f"; wrong: {', '.join(wrong)}" if wrong else "")


def loss_error(loss: Tensor, expected: Tensor) -> float:
    """The largest error over 1 + |loss|; NaN never passes."""
    error = (loss.double() - expected).abs() / (1 + expected.abs())
    return error.max().item()


def loss_and_gradient(problem: Problem, backend: str, incoming: float) -> tuple[Tensor, Tensor]:
    leaf = problem.stored.clone().requires_grad_()
    student = problem.view(leaf.clone() if problem.inplace else leaf)
    # The caching allocator hands this block out again: what the kernel does not write stays NaN.
    torch.full(student.shape, NAN, device=student.device, dtype=student.dtype)
    loss = kd_loss(
        student,
        problem.teacher,
        problem.labels,
        backend=backend,
        inplace=problem.inplace,
        **problem.options,
    )
    loss.backward(torch.full_like(loss, incoming))
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def label_out_of_range(device: str, backend: str) -> tuple[bool | None, str]:
    """On a GPU nothing may wait to look at labels: the row's loss is NaN, the others are right."""
    if device == "cpu":
        return None, "raises on the CPU"
    problem = make(Case(4, 1000), device)
    problem.labels[1] = 1005
    problem.options["reduction"] = "none"
    loss, _ = loss_and_gradient(problem, backend, 1.0)
    return loss.isnan().tolist() == [False, True, False, False], f"losses {loss.tolist()}"


# --- more than 2^31 elements ---------------------------------------------------------------------


def large(work: Path, device: str, backends: list[str], shape: tuple[int, int]) -> bool:
    """First rows, last rows and those around element 2^31, where a 32-bit offset turns negative."""
    checks = Checks(work, "large")
    rows, classes = shape
    crossing = min(2**31 // classes, rows - 4)
    picked = torch.tensor([*range(4), *range(crossing - 3, crossing + 3), *range(rows - 4, rows)])
    picked = picked.unique().to(device)
    inputs = Inputs(rows, classes, torch.bfloat16, device)
    for backend in backends:
        name = f"{backend}: {rows * classes:,} elements, {shape} bfloat16"
        checks.attempt(name, lambda b=backend: _picked_rows(inputs, picked, b))
        inputs.drop_gradients()
    return checks.all_passed()


def _picked_rows(inputs: Inputs, picked: Tensor, backend: str) -> tuple[bool, str]:
    options = {"temperature": 4.0, "alpha": 0.9, "reduction": "none"}
    loss = kd_loss(inputs.student, inputs.teacher, inputs.labels, backend=backend, **options)
    loss.backward(torch.ones_like(loss))
    assert inputs.student.grad is not None
    few = (v.detach()[picked] for v in (inputs.student, inputs.teacher, inputs.labels))
    losses, expected = truth(*few, **options)
    off = loss_error(loss.detach()[picked], losses)
    errors = (inputs.student.grad[picked].double() - expected).norm(dim=1) / expected.norm(dim=1)
    worst = errors.max().item()
    finite = bool(loss.detach().isfinite().all())
    passed = off <= LOSS_BOUND and worst <= GRAD_BOUND[torch.bfloat16] and finite
    return passed, f"loss off {off:.1e}, gradient off {worst:.1e}, of {len(picked)} rows"


# --- graphs, streams, devices --------------------------------------------------------------------


def streams(work: Path, device: str, backends: list[str], classes: list[int]) -> bool:
    checks = Checks(work, "streams")
    for backend in backends:
        for c in classes:
            for what in (graph_replays, two_streams, no_synchronisation, second_device):
                name = f"{backend}: {what.__name__.replace('_', ' ')}, C = {c}"
                if device == "cpu":
                    checks.record(name, None, "needs a GPU")
                else:
                    checks.attempt(name, lambda f=what, b=backend, n=c: f(b, n))
    return checks.all_passed()


def _stepped(inputs: Inputs, backend: str) -> Tensor:
    grad = kdkernels(backend).train(inputs)
    assert grad is not None
    return grad


def graph_replays(backend: str, classes: int) -> tuple[bool, str]:
    """A captured forward + backward, replayed on other logits, is the eager one bit for bit."""
    static, other = (Inputs(64, classes, torch.bfloat16, "cuda") for _ in range(2))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # a capture needs everything loaded and compiled
        for _ in range(3):
            _stepped(static, backend)
    torch.cuda.current_stream().wait_stream(side)
    static.drop_gradients()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _stepped(static, backend)
    with torch.no_grad():
        static.student.copy_(other.student)
        static.teacher.copy_(other.teacher)
        static.labels.copy_(other.labels)
    captured.fill_(NAN)
    graph.replay()
    expected = _stepped(other, backend)
    return torch.equal(captured, expected), ""


def two_streams(backend: str, classes: int) -> tuple[bool, str]:
    """Steps that run at the same time share no scratch memory."""
    inputs = [Inputs(64, classes, torch.float32, "cuda") for _ in range(2)]
    expected = [_stepped(i, backend).clone() for i in inputs]
    torch.cuda.synchronize()
    side = [torch.cuda.Stream() for _ in inputs]
    right = True
    for _ in range(20):
        grads = []
        for stream, one in zip(side, inputs, strict=True):
            with torch.cuda.stream(stream):
                grads.append(_stepped(one, backend))
        torch.cuda.synchronize()
        right &= all(torch.equal(g, e) for g, e in zip(grads, expected, strict=True))
    return right, ""


def no_synchronisation(backend: str, classes: int) -> tuple[bool, str]:
    """A step returns while the device is still busy with what came before it."""
    inputs = Inputs(64, classes, torch.float16, "cuda")
    _stepped(inputs, backend)
    busy = torch.empty(1 << 28, device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(200):  # tens of milliseconds
            busy.fill_(1.0)
        before.record()
        _stepped(inputs, backend)
        waited = before.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    return not waited, "the host waited for the device" if waited else ""


def second_device(backend: str, classes: int) -> tuple[bool | None, str]:
    """Logits on a device that is not the current one."""
    if torch.cuda.device_count() < 2:
        return None, "one GPU only"
    here = Inputs(64, classes, torch.float32, "cuda:0")
    there = Inputs(64, classes, torch.float32, "cuda:1")
    with torch.no_grad():
        there.student.copy_(here.student)
    there.teacher, there.labels = here.teacher.to("cuda:1"), here.labels.to("cuda:1")
    expected, got = _stepped(here, backend), _stepped(there, backend)
    return torch.equal(expected.cpu(), got.cpu()), ""


# --- drivers for compute-sanitizer and the profiler ----------------------------------------------

# A shape of every regime, as small as it can be: under the sanitizer a kernel is slow.
SMALL_SHAPES = [
    (5, 10),
    (5, 100),
    (3, 1423),
    (2, 4096),
    (2, 5001),
    (1, 32000),
    (1, 50257),
    (1, 128256),
]


def small_shapes(device: str, backends: list[str], largest: int) -> bool:
    """Steps on small inputs, made on the CPU so that few other kernels run beside ours."""
    right = True
    for rows, classes in [shape for shape in SMALL_SHAPES if shape[1] <= largest]:
        for dtype in (FP32, BF16, FP16):
            for backend in backends:
                problem = make(Case(rows, classes, dtype), "cpu")
                losses, _ = truth(
                    problem.stored, problem.teacher, problem.labels, **problem.options
                )
                on_device = dataclasses.replace(
                    problem,
                    stored=problem.stored.to(device),
                    teacher=problem.teacher.to(device),
                    labels=problem.labels.to(device),
                )
                loss, grad = _plain_step(on_device, backend)
                off = loss_error(loss.cpu(), losses.sum())
                fine = off <= LOSS_BOUND and bool(grad.cpu().isfinite().all())
                print(f"{backend} ({rows}, {classes}) {dtype}: {'right' if fine else 'WRONG'}")
                right &= fine
    return right


def _plain_step(problem: Problem, backend: str) -> tuple[Tensor, Tensor]:
    leaf = problem.stored.requires_grad_()
    loss = kd_loss(leaf, problem.teacher, problem.labels, backend=backend, **problem.options)
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def profiled(device: str, backends: list[str], shapes: list[tuple[int, int]]) -> None:
    """One step of each backend and shape between profiler start and stop: ours, nothing else."""
    for shape in shapes:
        inputs = Inputs(*shape, torch.bfloat16, device)
        for backend in backends:
            for _ in range(2):
                _stepped(inputs, backend)
            print(f"profiling {backend} {shape} bfloat16, forward + backward", flush=True)
            if device == "cpu":
                _stepped(inputs, backend)
                continue
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            _stepped(inputs, backend)
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
        del inputs


# --- beside a library that is not everywhere ------------------------------------------------------


def timm_example(work: Path) -> bool:
    checks = Checks(work, "timm")
    checks.attempt("a step of examples/timm_task.py is that of timm's own task", run_test_of_timm)
    return checks.all_passed()


def run_test_of_timm() -> tuple[bool | None, str]:
    """By tests/test_timm.py, on the GPU if there is one."""
    for name in ("pytest", "sklearn", "timm.task"):
        try:
            importlib.import_module(name)
        except Exception as error:  # operators of another build of torch raise what they like
            return None, f"{name} does not load: {error!r}"
    test = Path(__file__).parent.parent / "tests" / "test_timm.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    return done.returncode == 0, done.stdout.strip().rpartition("\n")[2]
