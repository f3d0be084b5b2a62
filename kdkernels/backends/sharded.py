"""The loss of logits whose classes are spread over processes, in PyTorch, some rows at a time.

Three looks at the logits and two exchanges. The first look takes the logarithms of this shard's
sums, which the processes add up to normalise with, and the forward KL within the shard: where that
is all that is asked for, it is the whole's but for the shards' shares. The second takes another
divergence's sums over the shard's classes, and Σ ∂D/∂log q, which a row's gradient needs of all
classes:

    ∂D/∂s_j = (∂D/∂log q_j - q_j Σ_k ∂D/∂log q_k) / T

The third writes the gradient. What is exchanged is gathered, not reduced on the way, and added in
the order of the processes: all of them come to the same bits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kdkernels.backends.base import Backend, Result
from kdkernels.backends.reference import ReferenceBackend
from kdkernels.backends.triton_device import has_double
from kdkernels.divergences import DIVERGENCES, Term, forward_kl, sum_of_powers
from kdkernels.reference import accumulation_dtype, effective

if TYPE_CHECKING:
    from kdkernels.divergences import PerRow
    from kdkernels.options import Options
    from kdkernels.teachers import Teacher
    from kdkernels.vocab_parallel import VocabParallel

# What is found of a row in a shard: log of the sums of e^(s/T), e^(t/T) and e^s, the label's logit,
# whether the label is here, the forward KL of the shard's distributions, and the sum of its logits.
LOG_Q, LOG_P, LOG_R, AT_LABEL, FOUND, KL, SUM = range(7)
COLUMNS = 7
# Logits at a time: a few tensors of them in double beside each other.
CHUNK = {"cpu": 2**17}
LARGE_CHUNK = 2**23


class ShardedBackend(ReferenceBackend):
    """Serves what the reference does; ``base`` scales the gradient in the backward, as its own."""

    name = "vocab_parallel"

    def __init__(self, shard: VocabParallel, base: Backend) -> None:
        self.shard = shard
        self.scale = base.scale  # type: ignore[method-assign]

    def run(
        self,
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
        assert isinstance(teacher, Tensor)  # or it were refused
        rows = _Rows.of(student, labels, self.shard, options, tensors)
        call = _Call(self.shard, student, teacher, rows, options, want_terms)
        call.normalise()
        soft, hard = call.compare(want_grad), call.cross_entropy()
        reduced = [rows.reduced(soft, 0, options), rows.reduced(hard, 1, options)]
        shape = student.shape[:-1] if options.reduction == "none" else ()
        dtype = accumulation_dtype(student.dtype)
        # A term of weight zero is no part of the loss: 0 * inf must not make it NaN.
        shares = (options.alpha, 1 - options.alpha)
        parts = [w * x for w, x in zip(shares, reduced, strict=True) if w != 0]
        soft, hard, loss = (
            x.reshape(shape).to(dtype) for x in (*reduced, sum(parts[1:], parts[0]))
        )
        grad, grad_scale = call.gradient(inplace) if want_grad else (None, 1.0)
        return Result(loss, soft, hard, grad, grad_scale)


class _Rows(NamedTuple):
    """What takes part, (N,) each, and what the means divide by."""

    soft: Tensor  # bool
    hard: Tensor  # bool
    here: Tensor  # bool: the label is one of this shard's
    target: Tensor  # the label in this shard, or 0
    weight: Tensor  # the sample's
    items: Tensor  # (2,)

    @classmethod
    def of(
        cls,
        student: Tensor,
        labels: Tensor | None,
        shard: VocabParallel,
        options: Options,
        tensors: PerRow,
    ) -> _Rows:
        wide = torch.float32
        if has_double(student.device.type, student.device.index):
            wide = torch.float64
        ones = torch.ones(student.shape[:-1].numel(), dtype=wide, device=student.device)
        weight = ones
        if "sample_weight" in tensors:
            weight = tensors["sample_weight"].reshape(-1).to(ones)
        counted = weight != 0
        if labels is None:
            target, hard = torch.zeros_like(counted, dtype=torch.long), torch.zeros_like(counted)
            soft = counted
        else:
            target = labels.reshape(-1).long()
            hard = (target != options.ignore_index) & counted
            soft = counted if options.distill_ignored else hard
        here = hard & (target >= shard.start) & (target < shard.stop)
        target = torch.where(here, target - shard.start, 0)
        items = torch.stack([torch.where(active, weight, 0.0).sum() for active in (soft, hard)])
        if "num_items" in tensors:
            items = tensors["num_items"].to(wide)
        if options.reduction != "mean":
            items = torch.ones_like(items)
        # Nothing active is 0, not 0/0.
        return cls(soft, hard, here, target, weight, torch.where(items == 0, 1.0, items))

    def reduced(self, values: Tensor, term: int, options: Options) -> Tensor:
        values = torch.where((self.soft, self.hard)[term], values * self.weight, 0.0)
        return values if options.reduction == "none" else values.sum() / self.items[term]


class _Measure(NamedTuple):
    """A divergence of whole rows as a last step of a sum over the classes."""

    sums: Callable[[Tensor, Tensor], Tensor]  # of (log p, log q) here, (n,)
    slope: Callable[[Tensor, Tensor], Tensor]  # its derivative by log q, (n, c)
    last: Callable[[Tensor], Tensor]


def _measure(term: Term) -> _Measure:
    a, rows = term.parameter, DIVERGENCES[term.name].rows
    if term.name == "forward_kl":
        return _Measure(lambda p, q: rows(p, q, a), lambda p, q: -p.exp(), lambda x: x)

    def slope(log_p: Tensor, log_q: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = log_q.detach().requires_grad_()
            (of_leaf,) = torch.autograd.grad(sums(log_p, leaf).sum(), leaf)
            return of_leaf

    def sums(log_p: Tensor, log_q: Tensor) -> Tensor:
        return sum_of_powers(log_p, log_q, a) if of_powers else rows(log_p, log_q, a)

    of_powers = (term.name == "alpha" and a not in (0, 1)) or (term.name == "renyi" and a != 1)
    if not of_powers:
        return _Measure(sums, slope, lambda x: x)
    if term.name == "alpha":
        return _Measure(sums, slope, lambda x: (x - 1) / (a * (a - 1)))
    return _Measure(sums, slope, lambda x: x.log() / (a - 1))


class _Chunk(NamedTuple):
    """Some rows, their effective logits in double, (n, c)."""

    at: slice
    student: Tensor
    teacher: Tensor | None


class _Call:
    """One call of the loss, from look to look."""

    parts: Tensor  # what all processes have found, (processes, rows, COLUMNS)
    # After normalise(): log of the sums over all classes, of e^(s/T), e^(t/T) and e^s.
    log_q: Tensor
    log_p: Tensor
    log_r: Tensor
    at_label: Tensor  # the student's logit of the label, 0 without one
    smooth: Tensor  # the sum of the student's logits
    classes: Tensor  # all of them
    # After compare(): of each divergence, the derivative by its sum, and the row's Σ ∂D/∂log q.
    slopes: Tensor
    total: Tensor

    def __init__(
        self,
        shard: VocabParallel,
        student: Tensor,
        teacher: Tensor,
        rows: _Rows,
        options: Options,
        want_terms: bool,
    ) -> None:
        self.shard, self.rows, self.options = shard, rows, options
        self.student, self.shape = student.detach(), student.shape
        self.flat = self.student.reshape(-1, student.shape[-1])
        self.teacher = teacher.detach().reshape(self.flat.shape)
        self.temperature = options.temperature
        self.teacher_temperature = options.teacher_temperature or options.temperature
        self.factor = self.temperature**2 if options.scale_by_t2 else 1.0
        self.want_soft = options.alpha > 0 or want_terms
        self.want_hard = options.alpha < 1 or want_terms
        # A term of weight zero is no part of the loss, whatever its value.
        self.terms = [t for t in options.divergence if t.weight != 0]
        self.is_plain = {term.name for term in self.terms} == {"forward_kl"}
        self.measures = [_measure(term) for term in self.terms]
        self.grad_scale = _float16_scale(self) if student.dtype == torch.float16 else 1.0

    def chunks(self, soft: bool = True) -> Iterator[_Chunk]:
        o, wide = self.options, self.rows.weight.dtype
        chunk = CHUNK.get(self.flat.device.type, LARGE_CHUNK)
        at_once = max(1, chunk // self.flat.shape[1])
        for first in range(0, len(self.flat), at_once):
            at = slice(first, min(first + at_once, len(self.flat)))
            # Ignored rows are replaced before any arithmetic: 0 * NaN would reach the gradient.
            keep, teacher = self.rows.soft[at], None
            student = self.flat[at].to(wide)
            student = effective(student, keep, None, o.student_scale, o.softcap)
            if soft and self.want_soft:
                teacher = self.teacher[at].to(wide)
                teacher = effective(teacher, keep, None, o.teacher_scale, o.softcap)
            yield _Chunk(at, student, teacher)

    # ---- the first look --------------------------------------------------------------------------

    @torch.no_grad()
    def normalise(self) -> None:
        here = self.rows.weight.new_zeros(len(self.flat) + 1, COLUMNS)
        self._look(here)
        here[-1, 0], here[-1, 1] = self.shard.start, self.shard.stop
        parts = _exchange(here, self.shard)
        starts, stops = parts[:, -1, 0], parts[:, -1, 1]
        self.classes = (stops - starts).sum()
        self._check(parts, starts, stops)
        self.parts = parts = parts[:, :-1]
        self.log_q, self.log_p, self.log_r = torch.logsumexp(parts[..., :3], 0).unbind(-1)
        self.at_label, self.smooth = parts[..., AT_LABEL].sum(0), parts[..., SUM].sum(0)
        # The label of a row must be one process's; on the CPU another has raised.
        found = parts[..., FOUND].sum(0) == 1
        self.valid = torch.where(self.rows.hard & ~found, torch.nan, 1.0)

    def _look(self, here: Tensor) -> None:
        smoothing = self.options.label_smoothing > 0 and self.want_hard
        for at, s, t in self.chunks():
            q = s / self.temperature
            here[at, LOG_Q] = torch.logsumexp(q, -1)
            here[at, LOG_R] = torch.logsumexp(s, -1)
            if t is not None:
                p = t / self.teacher_temperature
                here[at, LOG_P] = torch.logsumexp(p, -1)
                if self.is_plain:
                    log_q, log_p = (x - here[at, k, None] for x, k in ((q, LOG_Q), (p, LOG_P)))
                    here[at, KL] = forward_kl(log_p, log_q)
            label = s.gather(-1, self.rows.target[at, None]).squeeze(-1)
            here[at, AT_LABEL] = torch.where(self.rows.here[at], label, 0.0)
            here[at, FOUND] = self.rows.here[at]
            if smoothing:
                here[at, SUM] = s.sum(-1)

    def _check(self, parts: Tensor, starts: Tensor, stops: Tensor) -> None:
        asked = os.environ.get("KDKERNELS_CHECK_LABELS") == "1"
        if self.flat.device.type != "cpu" and not asked:  # the host would wait
            return
        ends = [0, *sorted(int(stop) for stop in stops)]
        if sorted(int(start) for start in starts) != ends[:-1]:
            shards = [(int(a), int(b)) for a, b in zip(starts, stops, strict=True)]
            raise ValueError(
                "vocab_parallel: the shards of the group must make [0, C) without gaps, got "
                f"{shards}"
            )
        bad = self.rows.hard & (parts[:, :-1, FOUND].sum(0) != 1)
        if bad.any():
            raise IndexError(
                f"labels[{int(bad.nonzero()[0])}] is none of the {ends[-1]} classes of the group: "
                f"expected 0 <= label < {ends[-1]} or ignore_index {self.options.ignore_index}"
            )

    # ---- the second ------------------------------------------------------------------------------

    def logarithms(self, chunk: _Chunk) -> tuple[Tensor, Tensor]:
        """log p and log q of a chunk's classes here."""
        at, s, t = chunk
        assert t is not None
        log_p = t / self.teacher_temperature - self.log_p[at, None]
        return log_p, s / self.temperature - self.log_q[at, None]

    @torch.no_grad()
    def compare(self, want_grad: bool) -> Tensor:
        """The soft term of each row."""
        count, terms = len(self.flat), len(self.terms)
        if not self.want_soft or not terms:
            return self.log_q.new_zeros(count)
        if self.is_plain:
            return self._forward_kl()
        want_grad = want_grad and self.options.alpha > 0
        here = self.log_q.new_zeros(count, 2 * terms if want_grad else terms)
        for chunk in self.chunks():
            log_p, log_q = self.logarithms(chunk)
            for k, measure in enumerate(self.measures):
                here[chunk.at, k] = measure.sums(log_p, log_q)
                if want_grad:
                    here[chunk.at, terms + k] = measure.slope(log_p, log_q).sum(-1)
        parts = _exchange(here, self.shard).sum(0)
        with torch.set_grad_enabled(want_grad):
            sums = parts[:, :terms].requires_grad_(want_grad)
            each = [m.last(x) for m, x in zip(self.measures, sums.unbind(-1), strict=True)]
            weights = [self.factor * term.weight for term in self.terms]
            rows = torch.stack([w * x for w, x in zip(weights, each, strict=True)]).sum(0)
            if want_grad:
                (self.slopes,) = torch.autograd.grad(rows.sum(), sums)
                self.total = (self.slopes * parts[:, terms:]).sum(-1).detach()
        return rows.detach()

    def _forward_kl(self) -> Tensor:
        """Of what each process has found between its own distributions: nothing is looked at again.

        With P and Q the shares of a shard, KL(p ‖ q) = Σ P (KL of the shard + log P - log Q).
        """
        log_p, log_q = (self.parts[..., k] for k in (LOG_P, LOG_Q))
        share = (log_p - self.log_p).exp()
        between = torch.where(log_q == -torch.inf, torch.inf, self.parts[..., KL])
        apart = (log_p - self.log_p) - (log_q - self.log_q)
        rows = torch.where(log_p == -torch.inf, 0.0, share * (between + apart)).sum(0)
        weight = self.factor * sum(term.weight for term in self.terms)
        # NaN where all classes of one of the two are masked: they are no distributions.
        nowhere = (self.log_p == -torch.inf) | (self.log_q == -torch.inf)
        self.slopes = torch.full_like(rows, weight)[:, None]
        self.total = torch.full_like(rows, -weight)
        return torch.where(nowhere, torch.nan, weight * rows)

    def cross_entropy(self) -> Tensor:
        """The hard term of each row."""
        o = self.options
        rows = (1 - o.label_smoothing) * (self.log_r - self.at_label)
        if o.label_smoothing:
            rows = rows + o.label_smoothing * (self.log_r - self.smooth / self.classes)
        return (rows + o.z_loss * self.log_r**2) * self.valid

    # ---- the third -------------------------------------------------------------------------------

    @torch.no_grad()
    def gradient(self, inplace: bool) -> tuple[Tensor, float | Tensor]:
        """Of the student's logits here, times a scale."""
        o, rows = self.options, self.rows
        grad = self.student if inplace else self.student.new_empty(self.shape)
        flat = grad.view(self.flat.shape) if grad.is_contiguous() else torch.empty_like(self.flat)
        soft = torch.where(rows.soft, o.alpha * rows.weight / rows.items[0], 0.0)
        hard = torch.where(rows.hard, (1 - o.alpha) * rows.weight / rows.items[1], 0.0)
        hard = hard * self.valid
        for chunk in self.chunks(soft=o.alpha > 0):
            at, s, _ = chunk
            g = torch.zeros_like(s)
            if o.alpha > 0 and self.terms:
                g = self._soft(chunk).mul_(soft[at, None] / self.temperature)
            if o.alpha < 1:
                self._add_hard(g, chunk, hard[at])
            g *= o.student_scale * self.grad_scale
            if o.softcap is not None:  # which leaves a masked class as it is
                g *= torch.where(s == -torch.inf, 1.0, 1 - (s / o.softcap) ** 2)
            flat[at] = torch.where(rows.soft[at, None], g, 0.0)
        if not grad.is_contiguous():
            grad.copy_(flat.view(self.shape))
        return grad, self.grad_scale

    def _soft(self, chunk: _Chunk) -> Tensor:
        """Of log q, with what the sum over all classes takes off."""
        log_p, log_q = self.logarithms(chunk)
        slopes = self.slopes[chunk.at].unbind(-1)
        each = [
            m.slope(log_p, log_q).mul_(x[:, None])
            for m, x in zip(self.measures, slopes, strict=True)
        ]
        total = self.total[chunk.at, None]
        return sum(each[1:], each[0]).addcmul_(log_q.exp_(), total, value=-1)

    def _add_hard(self, g: Tensor, chunk: _Chunk, share: Tensor) -> None:
        o, (at, s, _) = self.options, chunk
        log_r = self.log_r[at]
        total = share * (1 + 2 * o.z_loss * log_r)
        g.addcmul_((s - log_r[:, None]).exp_(), total[:, None])
        at_label = torch.where(self.rows.here[at], share * (o.label_smoothing - 1), 0.0)
        g.scatter_add_(-1, self.rows.target[at, None], at_label[:, None])
        if o.label_smoothing:
            g -= (share * o.label_smoothing / self.classes)[:, None]


def _exchange(here: Tensor, shard: VocabParallel) -> Tensor:
    """What every process of the group has of each row, (processes, rows, columns)."""
    parts = [torch.empty_like(here) for _ in range(dist.get_world_size(shard.group))]
    dist.all_gather(parts, here, group=shard.group)
    return torch.stack(parts)


def _float16_scale(call: _Call) -> Tensor:
    """A power of two that brings the largest entries of the gradient near 2^13."""
    o, rows = call.options, call.rows
    scale = max(o.student_scale, 1.0) * rows.weight.max() if len(rows.weight) else 1.0
    size = sum(abs(t.weight) * max(1.0, abs(t.parameter)) for t in o.divergence)
    soft = o.alpha * size * call.factor / call.temperature / rows.items[0]
    hard = (1 - o.alpha) * (2 + 64 * o.z_loss) / rows.items[1]
    bound = scale * (soft + hard)
    usable = (bound > 0) & (bound < torch.inf)
    return torch.exp2(torch.log2(2**13 / torch.where(usable, bound, 2.0**13)).floor())
