"""Logits whose classes are spread over the processes of a group, as tensor parallelism leaves them.

What is asked for is checked here; :mod:`kdkernels.backends.sharded` computes it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from kdkernels.divergences import DIVERGENCES, PerRow
from kdkernels.options import SHARES, Options

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class VocabParallel(NamedTuple):
    """Which classes this process holds: the vocabulary is sharded over a process group.

    ``kd_loss(student, teacher, labels, vocab_parallel=VocabParallel(group, start, stop))`` is the
    loss of the whole logits, the same in every process, and its gradient for this process's shard.
    Student and teacher are sharded alike, shards may be uneven, labels are those of the whole
    vocabulary and the same in all processes of the group. A few numbers per row travel, never a
    logit.

    Attributes:
        group: the processes that share the rows; None is the default group.
        start, stop: the classes of ``student_logits`` and ``teacher_logits`` here, [start, stop).
            All shards together are [0, C), without gaps.
    """

    group: ProcessGroup | None
    start: int
    stop: int


class Sharded(NamedTuple):
    """A call's tensors in this process, and its shard."""

    shard: VocabParallel
    student: Tensor
    teacher: Tensor
    labels: Tensor | None
    sample_weight: Tensor | None


def is_dtensor(value: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def sharded(
    shard: VocabParallel | None,
    student: Any,
    teacher: Any,
    labels: Any,
    sample_weight: Any,
    weight: Tensor | None,
    options: Options,
    tensors: PerRow,
) -> Sharded:
    """The local tensors of a call whose student logits are sharded over the classes.

    Raises:
        TypeError, ValueError: naming what is wrong, or what has no sharded form.
    """
    if is_dtensor(student):
        if shard is not None:
            raise ValueError("vocab_parallel says what a DTensor knows: give one of the two")
        shard, student = _of_dtensor(student)
        if not is_dtensor(teacher):
            raise TypeError(
                "teacher_logits must be a DTensor sharded as student_logits are, got "
                f"{type(teacher).__name__}"
            )
        of_teacher, teacher = _of_dtensor(teacher, "teacher_logits")
        if of_teacher != shard:
            raise ValueError("teacher_logits must be sharded as student_logits are")
        labels, sample_weight = _whole("labels", labels), _whole("sample_weight", sample_weight)
    if not isinstance(shard, VocabParallel):
        raise TypeError(
            f"vocab_parallel must be VocabParallel(group, start, stop), got {type(shard).__name__}"
        )
    _check_shard(shard, student)
    _check_options(options, tensors, weight, teacher)
    return Sharded(shard, student, teacher, labels, sample_weight)


def _of_dtensor(logits: Any, name: str = "student_logits") -> tuple[VocabParallel, Tensor]:
    from torch.distributed.tensor import Replicate, Shard

    of_classes = [
        i
        for i, placement in enumerate(logits.placements)
        if isinstance(placement, Shard) and placement.dim in (-1, logits.dim() - 1)
    ]
    others = [p for i, p in enumerate(logits.placements) if i not in of_classes]
    if len(of_classes) != 1 or not all(isinstance(p, Replicate) for p in others):
        raise ValueError(
            f"{name}, a DTensor, must be sharded over the classes, Shard(-1), in one dimension of "
            f"its mesh and replicated in the others, got {logits.placements}; take .to_local() of "
            "one that is sharded over rows, too, and give vocab_parallel"
        )
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset as place

    shape, offset = place(logits.shape, logits.device_mesh, logits.placements)
    group = logits.device_mesh.get_group(of_classes[0])
    shard = VocabParallel(group, int(offset[-1]), int(offset[-1] + shape[-1]))
    return shard, logits.to_local()


def _whole(name: str, value: Any) -> Any:
    if not is_dtensor(value):
        return value
    if any(not placement.is_replicate() for placement in value.placements):
        raise ValueError(f"{name} must be replicated, got {value.placements}")
    return value.to_local()


def _check_shard(shard: VocabParallel, student: Any) -> None:
    for name in ("start", "stop"):
        if isinstance(getattr(shard, name), bool) or not isinstance(getattr(shard, name), int):
            raise TypeError(f"vocab_parallel.{name} must be an int, got {getattr(shard, name)!r}")
    if not 0 <= shard.start < shard.stop:
        raise ValueError(
            "vocab_parallel must hold at least one class, 0 <= start < stop, got "
            f"{shard.start} and {shard.stop}"
        )
    width = shard.stop - shard.start
    if isinstance(student, Tensor) and student.dim() and student.shape[-1] != width:
        raise ValueError(
            f"student_logits must hold the {width} classes of vocab_parallel, [{shard.start}, "
            f"{shard.stop}), got {student.shape[-1]}"
        )
    if dist.get_rank(shard.group) < 0:
        raise ValueError("vocab_parallel.group must be one that this process belongs to")


# What is a sum over the classes, but for a last step: not a correlation, nor what wants a label.
SHARDED = frozenset(n for n, d in DIVERGENCES.items() if not d.alone and n != "dist")


def _check_options(o: Options, tensors: PerRow, weight: Tensor | None, teacher: Any) -> None:
    names = [term.name for term in o.divergence]
    refused = {
        "a top-k teacher or several": not isinstance(teacher, Tensor),
        "several temperatures": bool(o.temperatures),
        "standardize": o.standardize,
        "taid": o.taid is not None,
        "agreement": o.agreement != 0,
        "entropy_gap": o.entropy_gap != 0,
        "num_classes": o.num_classes is not None,
        'return_terms="metrics"': o.metrics,
        "a temperature that is a tensor": "temperature" in tensors,
        "logit_bias": "student_bias" in tensors or "teacher_bias" in tensors,
        "weight": weight is not None,
    }
    refused |= {f"divergence={name!r}": name not in SHARDED for name in names}
    refused |= {f"the weight of {n!r} per row": n in tensors for n in names}
    refused |= {f"{name} per row": name in tensors for name in SHARES}
    for name, asked in refused.items():
        if asked:
            raise ValueError(f"vocab_parallel and {name} do not go together")
