"""What native code is told of rows that take more than one look: csrc/plan.h."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kdkernels.backends.native import DTYPE_CODES, address, laid_out
from kdkernels.divergences import DIVERGENCES, PerRow, of_term
from kdkernels.reference import accumulation_dtype
from kdkernels.teachers import TAILS, Teacher, TopKTeacher

if TYPE_CHECKING:
    from kdkernels.options import Options

AGREEMENT, ENTROPY_GAP = 13, 14  # of KdDivergence in csrc/plan.h
ENSEMBLES = {"probs": 0, "losses": 1, "logits": 2}


@functools.lru_cache(maxsize=256)
def needs_plan(options: Options) -> bool:
    """Whether the options alone ask for more than one look; tensors may do so, too."""
    return options._replace(num_classes=None).special


class Plan(NamedTuple):
    """The plan in native form, and the tensors that it points to."""

    native: Any  # Plan of the module that is to read it
    kept: list[Tensor]
    metrics: Tensor | None  # (rows, 4)

    def reduced(
        self, student: Tensor, labels: Tensor | None, options: Options, tensors: PerRow
    ) -> tuple[Tensor, ...]:
        """The last four of ``KDMetrics``, shaped as the loss."""
        if self.metrics is None:
            return ()
        columns = self.metrics.to(accumulation_dtype(student.dtype)).unbind(-1)
        if options.reduction == "none":
            return tuple(c.reshape(student.shape[:-1]) for c in columns)
        counted = student.new_ones(student.shape[:-1], dtype=torch.bool)
        if "sample_weight" in tensors:
            counted = tensors["sample_weight"] != 0
        with_label = counted & (labels != options.ignore_index) if labels is not None else ~counted
        soft = counted if labels is None or options.distill_ignored else with_label
        if labels is None:
            with_label = torch.zeros_like(counted)
        counts = [soft.sum(), soft.sum(), soft.sum(), with_label.sum()]
        return tuple(c.sum() / n.clamp(min=1) for c, n in zip(columns, counts, strict=True))


def asks_for_plan(teacher: Teacher, options: Options, tensors: PerRow) -> bool:
    other = {"temperature", "sample_weight", "student_bias", "teacher_bias"} & tensors.keys()
    return bool(other) or not isinstance(teacher, Tensor) or needs_plan(options)


def plan_of(
    module: Any, student: Tensor, teacher: Teacher, options: Options, tensors: PerRow
) -> Plan:
    """The plan of a call, for this native module."""
    plan = Plan(module.Plan(), [], _metrics(student, options))
    wide = {name: _kept(plan, values) for name, values in tensors.items()}
    _add_passes(plan, options, wide)
    _add_teachers(plan, teacher, options)
    plan.native.set_logits(
        options.softcap or 0.0,
        options.student_scale,
        options.teacher_scale,
        _pointer(wide.get("student_bias")),
        _pointer(wide.get("teacher_bias")),
        1.0 if options.taid is None else options.taid,
    )
    plan.native.set_rows(
        _pointer(wide.get("temperature")),
        _pointer(wide.get("sample_weight")),
        _pointer(plan.metrics),
    )
    plan.native.set_switches(
        options.standardize,
        options.scale_by_t2,
        options.agreement_reduction == "sum",
        ENSEMBLES[options.ensemble],
    )
    return plan


def _metrics(student: Tensor, options: Options) -> Tensor | None:
    if not options.metrics:
        return None
    return student.new_zeros(student.shape[:-1].numel(), 4, dtype=torch.float64)


def _kept(plan: Plan, values: Tensor) -> Tensor:
    wide = values.detach().to(torch.float64).resolve_neg().contiguous()
    plan.kept.append(wide)
    return wide


def _pointer(values: Tensor | None) -> int:
    return 0 if values is None else values.data_ptr()


def _add_passes(plan: Plan, options: Options, wide: PerRow) -> None:
    mixture = [
        (DIVERGENCES[t.name].code, *t[1:], *map(_pointer, of_term(t, wide)))
        for t in options.divergence
    ]
    temperatures = options.temperatures or (options.temperature,)
    share = 1 / len(temperatures) if options.temperature_reduction == "mean" else 1.0
    alone = [DIVERGENCES[term.name].alone for term in options.divergence]
    looks = [[term] for term, is_alone in zip(mixture, alone, strict=True) if is_alone]
    together = [term for term, is_alone in zip(mixture, alone, strict=True) if not is_alone]
    if together:
        looks.append(together)
    firsts = [plan.native.add_terms(look) for look in looks]
    for temperature in temperatures:
        of_teacher = options.teacher_temperature or temperature
        for first, look in zip(firsts, looks, strict=True):
            plan.native.add_pass(temperature, of_teacher, share, False, first, len(look))
    for code, weight in ((AGREEMENT, options.agreement), (ENTROPY_GAP, options.entropy_gap)):
        if weight:
            first = plan.native.add_terms([(code, weight, 0.0, 0.0, 0, 0)])
            plan.native.add_pass(1.0, 1.0, 1.0, True, first, 1)


def _add_teachers(plan: Plan, teacher: Teacher, options: Options) -> None:
    if isinstance(teacher, TopKTeacher):
        k = teacher.values.shape[-1]
        values, indices = teacher.values, teacher.indices.long().contiguous()
        if teacher.tail == "renormalize":
            values = values.double() * teacher.temperature
        values = _kept(plan, values)
        plan.kept.append(indices)
        tail = TAILS.index(teacher.tail)
        plan.native.set_top_k(values.data_ptr(), indices.data_ptr(), k, tail)
        return
    teachers = (teacher,) if isinstance(teacher, Tensor) else teacher
    weights = options.teacher_weights or (1.0,) * len(teachers)
    for weight, logits in zip(weights, teachers, strict=True):
        if weight == 0:  # no part of it, whatever it holds
            continue
        source, rows = laid_out(logits)
        plan.kept.append(source)
        code = DTYPE_CODES[source.dtype]
        share = weight / sum(weights)
        plan.native.add_teacher(address("teacher_logits", source), code, rows, share)
