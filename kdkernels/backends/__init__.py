"""The backends behind ``kd_loss`` and the choice between them.

A backend is one object that meets :class:`Backend`. ``select`` picks by device and dtype, so that
it costs a dictionary look-up per call; ``report`` is what ``python -m kdkernels info`` prints.
"""

from __future__ import annotations

import functools
import warnings

import torch

from kdkernels.backends.base import NOT_COMPILED, Backend, Result
from kdkernels.backends.cpu import CPUBackend, PlainCPUBackend
from kdkernels.backends.cuda import CUDABackend
from kdkernels.backends.reference import ReferenceBackend
from kdkernels.backends.triton import TritonBackend

# Best first; the reference runs everywhere.
BACKENDS: dict[str, Backend] = {
    b.name: b for b in (CPUBackend(), CUDABackend(), TritonBackend(), ReferenceBackend())
}
NAMES = tuple(BACKENDS)
PLAIN_CPU = PlainCPUBackend()


@functools.lru_cache(maxsize=256)
def select(
    name: str | None,
    device: torch.device,
    student_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    features: frozenset[str] = frozenset(),
) -> Backend:
    """The named backend, or the best one, for logits of this device and these dtypes.

    ``features``: what is asked for that only some backends have (``Options.features``).

    Raises:
        RuntimeError: the named backend cannot run, with the reason.
    """
    if name is not None:
        reason = _why_not(BACKENDS[name], device, student_dtype, teacher_dtype, features)
        if reason:
            raise RuntimeError(f"backend {name!r} cannot run: {reason}")
        return BACKENDS[name]
    reasons: list[str] = []  # of the backends that were made for this device
    for backend in _best_first(features):
        reason = _why_not(backend, device, student_dtype, teacher_dtype, features)
        if reason is None:
            if reasons and backend.name == "reference":  # select is cached: the warning comes once
                warnings.warn(
                    f"kdkernels uses the slower reference: {'; '.join(reasons)}",
                    RuntimeWarning,
                    stacklevel=5,
                )
            return backend
        if device.type in backend.device_types:
            reasons.append(f"backend {backend.name!r} cannot run: {reason}")
    raise AssertionError("the reference serves every device and dtype")


def _best_first(features: frozenset[str]) -> list[Backend]:
    """Whoever has a kernel made for this comes before whoever has one that is made for all."""

    def rank(backend: Backend) -> int:
        if backend.name == "reference":
            return 2
        return int(backend.specialised is not None and not features <= backend.specialised)

    return sorted(BACKENDS.values(), key=rank)


def _why_not(
    backend: Backend,
    device: torch.device,
    student_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    features: frozenset[str],
) -> str | None:
    reason = backend.why_not(device, student_dtype, teacher_dtype)
    if reason is not None or backend.name == "reference":
        return reason
    missing = {name for name in features if name.startswith(NOT_COMPILED)}
    if backend.features is not None:
        missing |= features - backend.features
    return f"it has no kernel yet for {', '.join(sorted(missing))}" if missing else None


def report() -> list[tuple[str, bool, str]]:
    """(name, available, details or the reason why not) of every backend."""
    rows = []
    for backend in BACKENDS.values():
        reason = backend.unavailable()
        rows.append((backend.name, reason is None, reason or backend.details()))
    return rows


__all__ = ["BACKENDS", "NAMES", "PLAIN_CPU", "Backend", "Result", "report", "select"]
