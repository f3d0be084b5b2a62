"""What the general kernel is told, passes, terms and teachers as a table of numbers; its launch.

The sums over the batch before and after it are PyTorch's: they stay on the device, too.
"""

from __future__ import annotations

import functools
import warnings
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kdkernels.backends.base import Result, items_of
from kdkernels.backends.native import laid_out
from kdkernels.backends.plan import AGREEMENT, ENTROPY_GAP, Plan
from kdkernels.backends.reference import ReferenceBackend
from kdkernels.backends.triton_device import current, has_double, launch_options
from kdkernels.backends.triton_mixture import in_two_parts
from kdkernels.divergences import DIVERGENCES, PerRow, Term
from kdkernels.reference import accumulation_dtype
from kdkernels.teachers import TAILS, Teacher, TopKTeacher

if TYPE_CHECKING:
    from kdkernels.options import Options

# Of triton_kernels/general.py, general_terms.py and general_rows.py.
SOFT, HARD, ADDED, NOTHING = range(4)
NO_TEACHER, EACH, MEAN_OF_PROBABILITIES, MEAN_OF_LOGITS = range(4)
OTHERS, LABEL, LABEL_BY_TEACHER, METRICS = 9, 15, 16, 17
JOINT = {"probs": MEAN_OF_PROBABILITIES, "losses": EACH, "logits": MEAN_OF_LOGITS}

SCRATCH_BYTES = 1 << 27  # of all programs
PROGRAMS = 1024
BLOCK = 256  # classes at a time: more of them to a thread would spill its registers
PER_THREAD = 1
REGISTERS = 255  # of a thread
LEAST_BLOCK = 64  # AMD's warps
KEPT = 16
NUMBERS = 32  # that one launch writes into the table


class _Pass(NamedTuple):
    """A row of the table: see triton_kernels/general.py."""

    term_of: int
    temperature: float
    teacher_temperature: float
    share: float
    at_one: bool
    squared: bool
    reads: int
    views: int
    hole: bool
    labelled: bool
    first: int
    terms: int


class _Plan(NamedTuple):
    """All of the table that options decide."""

    header: tuple[float, ...]
    passes: tuple[_Pass, ...]
    terms: tuple[tuple[float, ...], ...]
    largest: tuple[float, ...]  # of the gradient, by pass: what float16 has to hold
    columns: tuple[str, ...]  # what each row has of its own


@functools.lru_cache(maxsize=256)
def _plan(
    options: Options,
    teachers: int,
    taken_at: float,
    soft: bool,
    hard: bool,
    own: tuple[str, ...],
) -> _Plan:
    making = _Making(options, teachers, own)
    if soft:
        making.add_soft()
    making.add_added()
    if hard:
        making.add_pass(HARD, [(LABEL, 1.0, 0.0, 0.0, -1, -1)], reads=NO_TEACHER)
    if options.metrics:
        reads = EACH if teachers == 1 else JOINT[options.ensemble]
        reads = MEAN_OF_PROBABILITIES if teachers > 1 and reads == EACH else reads
        making.add_pass(NOTHING, [(METRICS, 1.0, 0.0, 0.0, -1, -1)], reads=reads)
    header = (
        len(making.passes),
        max((p.views for p in making.passes), default=0),
        options.student_scale,
        options.teacher_scale,
        options.softcap or 0.0,
        1.0 if options.taid is None else options.taid,
        options.standardize,
        options.label_smoothing,
        options.z_loss,
        taken_at,
        making.column("sample_weight"),
        making.column("temperature"),
    )
    passes, terms = tuple(making.passes), tuple(making.terms)
    return _Plan(tuple(map(float, header)), passes, terms, tuple(making.largest), own)


class _Making:
    """A plan in the making."""

    def __init__(self, options: Options, teachers: int, own: tuple[str, ...]) -> None:
        self.options, self.own = options, own
        self.passes: list[_Pass] = []
        self.terms: list[tuple[float, ...]] = []
        self.largest: list[float] = []
        self.reads = EACH if teachers == 1 else JOINT[options.ensemble]
        self.views = teachers if self.reads == EACH else 1

    def column(self, name: str | None) -> int:
        return self.own.index(name) if name in self.own else -1

    def add_pass(
        self,
        term_of: int,
        terms: list[tuple[float, ...]],
        temperature: float | None = None,
        share: float = 1.0,
        reads: int | None = None,
        hole: bool = False,
        labelled: bool = False,
    ) -> None:
        """``temperature``: None is 1, whatever else is asked for."""
        at_one, options = temperature is None, self.options
        reads, views = (self.reads, self.views) if reads is None else (reads, 1)
        self.passes.append(
            _Pass(
                term_of,
                temperature or 1.0,
                0.0 if at_one else options.teacher_temperature or 0.0,
                share,
                at_one,
                options.scale_by_t2 and not at_one,
                reads,
                views,
                hole,
                labelled,
                len(self.terms),
                len(terms),
            )
        )
        self.terms += terms
        factor = (temperature or 1.0) if options.scale_by_t2 else 1.0
        factor = max(factor, 1.0) * (64 if options.standardize else 1)
        self.largest.append(share * factor * sum(map(_largest, terms)))

    def add_soft(self) -> None:
        options = self.options
        temperatures = options.temperatures or (options.temperature,)
        share = 1 / len(temperatures) if options.temperature_reduction == "mean" else 1.0
        together = [t for t in options.divergence if not DIVERGENCES[t.name].alone]
        for temperature in temperatures:
            for term in options.divergence:
                if DIVERGENCES[term.name].alone:
                    self.add_alone(term, temperature, share)
            if together:
                self.add_pass(SOFT, [self.numbers(t) for t in together], temperature, share)

    def add_alone(self, term: Term, temperature: float, share: float) -> None:
        numbers = self.numbers(term)
        labelled = DIVERGENCES[term.name].labelled
        if term.name == "nkd":
            label = (LABEL_BY_TEACHER, *numbers[1:])
            self.add_pass(SOFT, [label], None, share, labelled=True)
        if term.name == "wsld":  # a look at the label
            self.add_pass(SOFT, [], None, share, labelled=True)
        hole = term.name in ("dkd", "nkd")
        self.add_pass(SOFT, [numbers], temperature, share, hole=hole, labelled=labelled)

    def add_added(self) -> None:
        options = self.options
        for code, weight in ((AGREEMENT, options.agreement), (ENTROPY_GAP, options.entropy_gap)):
            if weight:
                self.add_pass(ADDED, [(code, weight, 0.0, 0.0, -1, -1)])

    def numbers(self, term: Term) -> tuple[float, ...]:
        option = DIVERGENCES[term.name].option
        columns = self.column(term.name), self.column(option)
        return (DIVERGENCES[term.name].code, *term[1:], *columns)


def _largest(term: tuple[float, ...]) -> float:
    """At most the largest entry of a row's gradient: see largest_factor in csrc/cpu/run.cpp."""
    kind, weight, a, second = term[:4]
    factor = 16.0
    if kind in (0, 5):
        factor = 1.0
    elif kind in (6, 7) and not 0 <= a <= 1:
        factor = 1024.0
    elif kind == DIVERGENCES["dkd"].code:
        factor = abs(a) + abs(second)
    elif kind in (9, 10, 11):
        factor = 1 + 4 * abs(a)
    return factor * (1.0 if term[4] >= 0 else abs(weight))


class _Batch(NamedTuple):
    """What the means divide by, on the device."""

    soft: Tensor
    hard: Tensor
    added: Tensor


def _batch(
    student: Tensor,
    labels: Tensor | None,
    class_weight: Tensor | None,
    classes: int,
    options: Options,
    tensors: PerRow,
) -> _Batch:
    one = torch.ones((), dtype=torch.float64, device=student.device)
    if options.reduction != "mean":
        return _Batch(one, one, one)
    weights = one.expand(student.shape[:-1])
    if "sample_weight" in tensors:
        weights = tensors["sample_weight"].to(torch.float64)
    soft, hard = weights.sum(), one
    if labels is not None:
        active = labels != options.ignore_index
        of_labels = torch.where(active, weights, 0.0)
        if not options.distill_ignored:
            soft = of_labels.sum()
        if class_weight is not None:
            inside = active & (labels >= 0) & (labels < classes)
            of_labels = of_labels * class_weight[torch.where(inside, labels, 0)]
        hard = of_labels.sum()
    if "num_items" in tensors:
        soft, hard = tensors["num_items"].unbind()
    # Nothing active is 0, not 0/0.
    soft, hard = (torch.where(n == 0, one, n) for n in (soft, hard))
    return _Batch(soft, hard, one if options.agreement_reduction == "sum" else soft)


def _float16_scale(
    plan: _Plan, batch: _Batch, options: Options, class_weight: Tensor | None, tensors: PerRow
) -> Tensor:
    """The power of two that brings the largest possible entry of the gradient to about 2^14."""

    def largest(name: str) -> Tensor | float:
        return tensors[name].abs().amax().double() if name in tensors else 1.0

    of_rows: Tensor | float = 1.0
    for name in plan.columns:
        if name in DIVERGENCES or name == "temperature":
            of_rows = of_rows * torch.clamp(tensors[name].abs().amax().double(), min=1.0)
    bound: Tensor | float = 0.0
    for of_pass, large in zip(plan.passes, plan.largest, strict=True):
        if of_pass.term_of == SOFT:
            bound = bound + options.alpha * large * of_rows / batch.soft
        elif of_pass.term_of == ADDED:
            bound = bound + large / batch.added
        elif of_pass.term_of == HARD:
            most = 1.0 if class_weight is None else class_weight.amax().clamp(min=1.0)
            bound = bound + 2 * (1 - options.alpha) * (1 + 64 * options.z_loss) * most / batch.hard
    bound = bound * largest("sample_weight") * max(options.student_scale, 1.0)
    bound = torch.as_tensor(bound + 0 * batch.soft)
    usable = (bound > 0) & (bound < torch.inf)
    exponent = torch.log2(16384 / torch.where(usable, bound, 16384.0)).floor().clamp(max=100)
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def _wide(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.detach().double().resolve_neg().contiguous()


class _Teachers(NamedTuple):
    """A teacher in whatever form it came."""

    logits: tuple[Tensor, ...]
    numbers: tuple[float, ...]  # of each its weight, and how its rows lie
    values: Tensor | None
    indices: Tensor | None
    tail: int
    taken_at: float


def _teachers(teacher: Teacher, student: Tensor, options: Options) -> _Teachers:
    if isinstance(teacher, TopKTeacher):
        tail = TAILS.index(teacher.tail)
        values = teacher.values.detach().resolve_neg().contiguous()
        indices = teacher.indices.long().contiguous()
        taken_at = 1.0 if tail else float(teacher.temperature)
        return _Teachers((student,), (1.0, 0.0, 0.0, 0.0), values, indices, tail, taken_at)
    teachers = (teacher,) if isinstance(teacher, Tensor) else teacher
    weights = options.teacher_weights or (1.0,) * len(teachers)
    logits, numbers = [], []
    for weight, t in zip(weights, teachers, strict=True):
        if weight == 0:  # no part of it, whatever it holds
            continue
        source, rows = laid_out(t.detach())
        logits.append(source)
        numbers += [weight / sum(weights), *map(float, rows)]
    return _Teachers(tuple(logits), tuple(numbers), None, None, 0, 1.0)


def _table(kernels: ModuleType, plan: _Plan, teachers: _Teachers, device: torch.device) -> Tensor:
    numbers = [*plan.header]
    for row in (*plan.passes, *plan.terms):
        numbers += map(float, row)
    numbers += teachers.numbers
    numbers += [0.0] * (-len(numbers) % NUMBERS)
    table = torch.empty(len(numbers), dtype=torch.float64, device=device)
    for first in range(0, len(numbers), NUMBERS):
        some = in_two_parts(numbers[first : first + NUMBERS])
        kernels.table_kernel[(1,)](some, table[first:], COUNT=NUMBERS)
    return table


def run(
    kernels: ModuleType,
    student: Tensor,
    teacher: Teacher,
    labels: Tensor | None,
    weight: Tensor | None,
    options: Options,
    want_terms: bool,
    want_grad: bool,
    inplace: bool,
    tensors: PerRow,
) -> Result:
    """As a backend's."""
    if not has_double(student.device.type, student.device.index):
        warnings.warn(
            "kdkernels uses the slower reference: the GPU has no float64, and only the kernels of "
            "simple divergences do without",
            RuntimeWarning,
            stacklevel=5,
        )
        student = student if inplace or not want_grad else student.detach().clone()
        rest = (teacher, labels, weight, options, want_terms, want_grad, inplace, tensors)
        return ReferenceBackend().run(student, *rest)
    call = _Call(student, teacher, labels, weight, options, want_terms, tensors)
    source, student_rows = laid_out(student)
    grad, grad_rows = None, student_rows
    if want_grad and inplace:
        grad = source.detach()
    elif want_grad:
        grad = torch.empty_like(student, memory_format=torch.contiguous_format)
        grad_rows = (1, student.shape[-1], 0)
    if grad is not None and call.classes < student.shape[-1]:
        grad[..., call.classes :] = 0  # which are no part of the loss
    grad_scale = call.grad_scale(want_grad)
    if student.numel() > 0:
        with current(student.device):
            call.launch(kernels, source, student_rows, grad, grad_rows, grad_scale)
    if grad is not None and inplace and source is not student:
        grad = student.detach().copy_(grad)
    loss, soft, hard = call.reduced()
    metrics = Plan(None, [], call.metrics).reduced(student, labels, options, tensors)
    scale: float | Tensor = 1.0 if grad_scale is None else grad_scale.reshape(1)
    if not want_terms:
        return Result(loss, None, None, grad, scale, metrics)
    return Result(loss, soft, hard, grad, scale, metrics)


class _Call:
    """The tensors of one call."""

    def __init__(
        self,
        student: Tensor,
        teacher: Teacher,
        labels: Tensor | None,
        weight: Tensor | None,
        options: Options,
        want_terms: bool,
        tensors: PerRow,
    ) -> None:
        self.student, self.options, self.tensors = student, options, tensors
        self.classes = options.num_classes or student.shape[-1]
        self.rows = student.shape[:-1].numel()
        self.labels = None if labels is None else labels.long().resolve_neg().contiguous()
        self.weight = _wide(weight)
        self.teachers = _teachers(teacher, student, options)
        _, of_rows = items_of(tensors)
        own = tuple(name for name in of_rows if not name.endswith("_bias"))
        soft = options.alpha > 0 or want_terms
        hard = labels is not None and (options.alpha < 1 or want_terms)
        self.plan = _plan(
            options, len(self.teachers.logits), self.teachers.taken_at, soft, hard, own
        )
        self.batch = _batch(student, self.labels, self.weight, self.classes, options, tensors)
        self.terms = student.new_zeros(3, self.rows, dtype=torch.float64)
        self.metrics = None
        if options.metrics:
            self.metrics = student.new_zeros(self.rows, 4, dtype=torch.float64)

    def grad_scale(self, want_grad: bool) -> Tensor | None:
        if not want_grad or self.student.dtype != torch.float16 or self.rows == 0:
            return None
        return _float16_scale(self.plan, self.batch, self.options, self.weight, self.tensors)

    def scales(self, grad_scale: Tensor | None) -> Tensor:
        alpha, batch = self.options.alpha, self.batch
        scales = torch.stack([alpha / batch.soft, (1 - alpha) / batch.hard, 1 / batch.added])
        return scales if grad_scale is None else scales * grad_scale

    def own(self) -> Tensor | None:
        """What each row has of its own, [columns, rows]."""
        if not self.plan.columns:
            return None
        wide = [self.tensors[name].detach().double().reshape(-1) for name in self.plan.columns]
        return torch.stack(wide)

    def launch(
        self,
        kernels: ModuleType,
        source: Tensor,
        student_rows: tuple[int, int, int],
        grad: Tensor | None,
        grad_rows: tuple[int, int, int],
        grad_scale: Tensor | None,
    ) -> None:
        teachers, plan = self.teachers, self.plan
        width = -(-(self.classes + 1) // 16) * 16
        programs = min(self.rows, PROGRAMS, max(1, SCRATCH_BYTES // (32 * width)))
        block = min(BLOCK, max(LEAST_BLOCK, 1 << self.classes.bit_length()))
        kernels.general_kernel[(programs,)](
            source,
            teachers.logits,
            teachers.values,
            teachers.indices,
            grad,
            self.labels,
            self.weight,
            _wide(self.tensors.get("student_bias")),
            _wide(self.tensors.get("teacher_bias")),
            _table(kernels, plan, teachers, source.device),
            self.scales(grad_scale),
            self.own(),
            self.terms,
            self.metrics,
            source.new_empty(programs, 4 * width + KEPT, dtype=torch.float64),
            self.rows,
            self.classes,
            width,
            0 if teachers.values is None else teachers.values.shape[-1],
            len(teachers.logits),
            len(plan.passes),
            len(plan.terms),
            self.options.ignore_index,
            *student_rows,
            *grad_rows,
            DISTILL_IGNORED=self.options.distill_ignored,
            TAIL=teachers.tail,
            BLOCK=block,
            **launch_options(block // PER_THREAD, self.student.get_device(), REGISTERS),
        )

    def reduced(self) -> tuple[Tensor, Tensor, Tensor]:
        """The loss and its terms, shaped as asked."""
        options, batch = self.options, self.batch
        soft, hard, added = self.terms.unbind(0)
        if options.reduction == "none":
            soft, hard, added = (x.reshape(self.student.shape[:-1]) for x in (soft, hard, added))
        else:
            soft, hard = soft.sum() / batch.soft, hard.sum() / batch.hard
            added = added.sum() / batch.added
        # A term of weight zero is no part of the loss: 0 * inf must not make it NaN.
        parts = [w * x for w, x in ((options.alpha, soft), (1 - options.alpha, hard)) if w != 0]
        loss = sum(parts, added)
        dtype = accumulation_dtype(self.student.dtype)
        return loss.to(dtype), soft.to(dtype), hard.to(dtype)
