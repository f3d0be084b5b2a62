"""Teachers that are not one tensor of logits: the k largest of them, and several teachers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

TAILS = ("renormalize", "bucket", "zero")


@dataclass(frozen=True, eq=False)
class TopKTeacher:
    """A teacher of which only k classes per row are known: served, or stored beside a data set.

    The student's softmax runs over all C classes, whatever the tail.

    Args:
        values: (..., k), floating point: logits or log-probabilities of the teacher.
        indices: (..., k), integers: their classes, in [0, C) and none twice in a row. A class that
            is to be left out (a row with fewer than k) has the value -inf.
        tail: what stands for the other C - k classes. ``"renormalize"`` (default): nothing, the k
            entries are a distribution by themselves: values are brought to the temperature of the
            loss and normalised, so that logits and log-probabilities are the same. ``"bucket"``:
            one more class that holds the remaining mass, on both sides. ``"zero"``: nothing, and
            the sum runs over the k entries as they are. The last two need log-probabilities that
            were taken at the temperature of the loss.
        temperature: by which the teacher's logits were divided for these values. Default 1.0.

    Raises:
        TypeError, ValueError: shapes or dtypes that do not fit; indices are looked at by the loss.
    """

    values: Tensor
    indices: Tensor
    tail: str = "renormalize"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("values", "indices"):
            if not isinstance(getattr(self, name), Tensor):
                raise TypeError(
                    f"TopKTeacher.{name} must be a Tensor, got {type(getattr(self, name)).__name__}"
                )
        if not self.values.dtype.is_floating_point:
            raise TypeError(f"TopKTeacher.values must be floating point, got {self.values.dtype}")
        if self.indices.dtype.is_floating_point or self.indices.dtype == torch.bool:
            raise TypeError(f"TopKTeacher.indices must be integers, got {self.indices.dtype}")
        if self.values.shape != self.indices.shape or self.values.dim() == 0:
            raise ValueError(
                f"TopKTeacher.values and indices must both be (..., k), got "
                f"{tuple(self.values.shape)} and {tuple(self.indices.shape)}"
            )
        if self.values.device != self.indices.device:
            raise ValueError(
                f"TopKTeacher.indices must be on the device of values, {self.values.device}, got "
                f"{self.indices.device}"
            )
        if self.tail not in TAILS:
            raise ValueError(f"TopKTeacher.tail must be one of {TAILS}, got {self.tail!r}")
        number = isinstance(self.temperature, (int, float)) and self.temperature > 0
        if not number or isinstance(self.temperature, bool):
            raise ValueError(
                f"TopKTeacher.temperature must be a number > 0, got {self.temperature!r}"
            )

    @classmethod
    def from_logits(
        cls, logits: Tensor, k: int, tail: str = "renormalize", temperature: float = 1.0
    ) -> TopKTeacher:
        """The k largest of (..., C) logits, as log-probabilities at ``temperature``.

        Values keep the dtype of the logits, but are normalised in float32 or better.

        Raises:
            ValueError: k is not between 1 and C.
        """
        classes = logits.shape[-1]
        if not 1 <= k <= classes:
            raise ValueError(f"k must be between 1 and the number of classes, {classes}, got {k}")
        wide = torch.promote_types(logits.dtype, torch.float32)
        values, indices = logits.detach().topk(k, dim=-1)
        scaled = logits.detach().to(wide) / temperature
        log_probs = values.to(wide) / temperature - scaled.logsumexp(-1, keepdim=True)
        kept = log_probs.to(logits.dtype) if tail == "renormalize" else log_probs
        return cls(kept, indices.to(torch.int32), tail, temperature)

    def __getitem__(self, index: object) -> TopKTeacher:
        """Some of the rows: ``stored[batch]`` of a teacher of a whole data set."""
        if not isinstance(index, tuple):
            index = (index,)
        rows = (*index, slice(None)) if Ellipsis not in map(_ellipsis, index) else index
        return TopKTeacher(self.values[rows], self.indices[rows], self.tail, self.temperature)

    def __len__(self) -> int:
        return len(self.values)

    def to(self, device: torch.device | str) -> TopKTeacher:
        """The same on another device."""
        return TopKTeacher(
            self.values.to(device), self.indices.to(device), self.tail, self.temperature
        )

    def save(self, path: str | Path) -> None:
        """Write the teacher as a safetensors file.

        Raises:
            ImportError: safetensors is not installed, which the extra ``cache`` brings.
        """
        save_file = _safetensors("save_file")
        tensors = {"values": self.values.contiguous(), "indices": self.indices.contiguous()}
        save_file(tensors, path, {"tail": self.tail, "temperature": repr(float(self.temperature))})

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> TopKTeacher:
        """Read what :meth:`save` has written.

        Raises:
            ImportError: safetensors is not installed, which the extra ``cache`` brings.
            ValueError: the file holds something else.
        """
        with _safetensors("safe_open")(path, framework="pt", device=device) as file:
            metadata = file.metadata() or {}
            if not {"values", "indices"} <= set(file.keys()) or "tail" not in metadata:
                raise ValueError(f"{path} was not written by TopKTeacher.save")
            values, indices = file.get_tensor("values"), file.get_tensor("indices")
        return cls(values, indices, metadata["tail"], float(metadata["temperature"]))


def _ellipsis(index: object) -> object:
    return index if index is Ellipsis else None


def _safetensors(name: str):  # type: ignore[no-untyped-def]
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "stored teachers need safetensors: pip install 'kdkernels[cache]'"
        ) from error
    return safetensors.safe_open if name == "safe_open" else safetensors.torch.save_file


Teacher = Tensor | TopKTeacher | tuple[Tensor, ...]


def logits_of(teacher: Teacher) -> tuple[Tensor, ...]:
    """The tensors of a teacher that hold logits."""
    if isinstance(teacher, Tensor):
        return (teacher,)
    return (teacher.values,) if isinstance(teacher, TopKTeacher) else teacher


def tensors_of(teacher: Teacher) -> tuple[Tensor, ...]:
    """All tensors of a teacher."""
    more = (teacher.indices,) if isinstance(teacher, TopKTeacher) else ()
    return logits_of(teacher) + more
