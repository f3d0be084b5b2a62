"""The divergences between teacher and student: each in a few lines of PyTorch, and their table.

p is the teacher's distribution and q the student's, as ``log_p`` and ``log_q`` of shape (N, C).
What each function returns is (N,), twice differentiable in ``log_q``, and exact for classes of
probability 0: 0 log 0 is 0, and mass on a class that the other has masked (-inf) is infinite where
the formula says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Parameter = float | Tensor  # a Tensor holds one value per row: (N,)


def _column(parameter: Parameter) -> Parameter:
    return parameter.unsqueeze(-1) if isinstance(parameter, Tensor) else parameter


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Sum of a (log a - log b)."""
    nothing = log_a == -torch.inf
    # Infinite even where a is too small to represent.
    infinite = ~nothing & (log_a.exp() == 0) & (log_b == -torch.inf)
    left_out = nothing | infinite  # and not reached by the backward, where 0 * inf would be NaN
    a, b = torch.where(left_out, 0.0, log_a), torch.where(left_out, 0.0, log_b)
    terms = torch.where(left_out, 0.0, a.exp() * (a - b))
    return torch.where(infinite, torch.inf, terms).sum(-1)


def _log_mixture(log_a: Tensor, log_b: Tensor, share: Parameter) -> Tensor:
    """log(share a + (1 - share) b)."""
    share = torch.as_tensor(_column(share), dtype=log_a.dtype, device=log_a.device)
    a, b = log_a + share.log(), log_b + torch.log1p(-share)
    nothing = (a == -torch.inf) & (b == -torch.inf)
    a, b = torch.where(nothing, 0.0, a), torch.where(nothing, 0.0, b)
    return torch.where(nothing, -torch.inf, torch.logaddexp(a, b))


def forward_kl(log_p: Tensor, log_q: Tensor, parameter: Parameter = 0.0) -> Tensor:
    """KL(p ‖ q): Hinton, Vinyals and Dean 2015, arXiv:1503.02531."""
    return _kl(log_p, log_q)


def reverse_kl(log_p: Tensor, log_q: Tensor, parameter: Parameter = 0.0) -> Tensor:
    """KL(q ‖ p): Gu et al. 2024 (MiniLLM), arXiv:2306.08543."""
    return _kl(log_q, log_p)


def jsd(log_p: Tensor, log_q: Tensor, beta: Parameter) -> Tensor:
    """β KL(p ‖ m) + (1 - β) KL(q ‖ m), m = β p + (1 - β) q: Agarwal et al. 2024, arXiv:2306.13649.

    At β = 0 and 1, where that is 0, forward and reverse KL, as there.
    """
    if not isinstance(beta, Tensor):
        if beta in (0, 1):
            return _kl(log_p, log_q) if beta == 0 else _kl(log_q, log_p)
        return _jsd_between(log_p, log_q, beta)
    rows = log_q.new_zeros(log_q.shape[:1])
    for chosen, divergence in (
        (beta == 0, lambda p, q, b: _kl(p, q)),
        (beta == 1, lambda p, q, b: _kl(q, p)),
        ((beta > 0) & (beta < 1), _jsd_between),
    ):
        rows = rows.index_put((chosen,), divergence(log_p[chosen], log_q[chosen], beta[chosen]))
    return rows


def _jsd_between(log_p: Tensor, log_q: Tensor, beta: Parameter) -> Tensor:
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def skew_forward_kl(log_p: Tensor, log_q: Tensor, skew: Parameter) -> Tensor:
    """KL(p ‖ λ p + (1 - λ) q): Ko et al. 2024 (DistiLLM), arXiv:2402.03898."""
    return _kl(log_p, _log_mixture(log_p, log_q, skew))


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, skew: Parameter) -> Tensor:
    """KL(q ‖ λ q + (1 - λ) p): Ko et al. 2024 (DistiLLM), arXiv:2402.03898."""
    return _kl(log_q, _log_mixture(log_q, log_p, skew))


def total_variation(log_p: Tensor, log_q: Tensor, parameter: Parameter = 0.0) -> Tensor:
    """½ Σ|p - q|: Wen et al. 2023 (f-distill), arXiv:2307.15190."""
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def sum_of_powers(log_p: Tensor, log_q: Tensor, a: float) -> Tensor:
    """Sum of p^a q^(1 - a)."""
    no_p, no_q = log_p == -torch.inf, log_q == -torch.inf
    left_out = no_p | no_q
    exponents = torch.where(left_out, 0.0, a * log_p + (1 - a) * torch.where(left_out, 0.0, log_q))
    terms = torch.where(left_out, 0.0, exponents.exp())
    infinite = (no_q & ~no_p) if a > 1 else (no_p & ~no_q) if a < 0 else torch.zeros_like(no_p)
    return torch.where(infinite, torch.inf, terms).sum(-1)


def alpha_divergence(log_p: Tensor, log_q: Tensor, a: Parameter) -> Tensor:
    """(Σ p^a q^(1-a) - 1) / (a (a - 1)): Amari 1985.

    Its limits at a = 1 and 0 are forward and reverse KL.
    """
    assert not isinstance(a, Tensor)
    if a == 1:
        return _kl(log_p, log_q)
    if a == 0:
        return _kl(log_q, log_p)
    return (sum_of_powers(log_p, log_q, a) - 1) / (a * (a - 1))


def renyi(log_p: Tensor, log_q: Tensor, a: Parameter) -> Tensor:
    """log(Σ p^a q^(1-a)) / (a - 1): Rényi 1961; its limit at a = 1 is forward KL."""
    assert not isinstance(a, Tensor)
    return _kl(log_p, log_q) if a == 1 else sum_of_powers(log_p, log_q, a).log() / (a - 1)


class Row(NamedTuple):
    """What an objective of image classification knows of the rows beside the two distributions."""

    labels: Tensor  # (N,)
    log_p: Tensor  # at temperature 1
    log_q: Tensor
    factor: Parameter  # what the soft term is multiplied with: T², or 1


def _at(log: Tensor, labels: Tensor) -> Tensor:
    return log.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def _without_labels(log: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """log of the other classes' total, and of each among them; -inf at the label."""
    label = torch.zeros_like(log, dtype=torch.bool).scatter(-1, labels.unsqueeze(-1), True)
    rest = log.masked_fill(label, -torch.inf)
    # Where nothing but the label has mass, what is divided by that stays -inf, and has no gradient.
    nothing = (rest == -torch.inf).all(-1)
    # 1 less the label's probability, without forming that.
    total = torch.logsumexp(torch.where(nothing.unsqueeze(-1), 0.0, rest), -1)
    others = rest - torch.where(nothing, 0.0, total).unsqueeze(-1)
    return torch.where(nothing, -torch.inf, total), others


def _cross_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """-Σ p log q, with the entropy of p as a constant beside the divergence."""
    p = log_p.exp()
    return _kl(log_p, log_q) - torch.where(p == 0, 0.0, p * log_p.clamp(min=-1e30)).sum(-1)


def dkd(log_p: Tensor, log_q: Tensor, alpha: float, beta: float, row: Row) -> Tensor:
    """α KL(label or not) + β KL(all but the label): Zhao et al. 2022, arXiv:2203.08679.

    Two classes have nothing beside the label's divergence.
    """
    of_p, of_q = _without_labels(log_p, row.labels), _without_labels(log_q, row.labels)
    p = torch.stack((_at(log_p, row.labels), of_p[0]), -1)
    q = torch.stack((_at(log_q, row.labels), of_q[0]), -1)
    return _weighted(alpha, _kl(p, q)) + _weighted(beta, _kl(of_p[1], of_q[1]))


def nkd(log_p: Tensor, log_q: Tensor, gamma: float, _: float, row: Row) -> Tensor:
    """-p_y log q_y - γ Σ p' log q' of the classes but the label, p' and q' normalised among them,
    and T² γ if those are at a temperature T: Yang et al. 2023, arXiv:2303.13005."""
    p, q = _without_labels(log_p, row.labels)[1], _without_labels(log_q, row.labels)[1]
    at_label = -_at(row.log_p, row.labels).exp() * _at(row.log_q, row.labels)
    return at_label / row.factor + _weighted(gamma, _cross_entropy(p, q))


def wsld(log_p: Tensor, log_q: Tensor, alpha: float, _: float, row: Row) -> Tensor:
    """-α w Σ p log q, w = 1 - exp(-CE of the student / CE of the teacher), which has no gradient:
    Zhou et al. 2021, arXiv:2102.00650."""
    student, teacher = -_at(row.log_q, row.labels).detach(), -_at(row.log_p, row.labels)
    # A teacher that is as sure as can be has no cross entropy to divide by.
    weight = -torch.expm1(-(student / (teacher + 1e-7)).clamp(min=0))
    return _weighted(alpha, weight * _cross_entropy(log_p, log_q))


def dist(log_p: Tensor, log_q: Tensor, beta: Parameter = 1.0) -> Tensor:
    """β (1 - Pearson's correlation of p and q): Huang et al. 2022, arXiv:2205.10536."""
    return beta * one_minus_correlation(log_p.exp(), log_q.exp())


def one_minus_correlation(p: Tensor, q: Tensor) -> Tensor:
    """1 - Pearson's correlation along the last dimension; 1 where one of the two is constant."""
    units = []
    for x in (p, q):
        x = x - x.mean(-1, keepdim=True)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        constant = norm <= 1e-12
        units.append(torch.where(constant, 0.0, x / torch.where(constant, 1.0, norm)))
    p, q = units
    either = (p == 0).all(-1) | (q == 0).all(-1)
    # Half the squared distance of unit vectors does not cancel.
    return torch.where(either, 1.0, ((p - q) ** 2).sum(-1) / 2)


def hard(log_p: Tensor, log_q: Tensor, parameter: Parameter = 0.0) -> Tensor:
    """-log q of the teacher's first largest class: Touvron et al. 2021 (DeiT), arXiv:2012.12877."""
    decided = -_at(log_q, log_p.argmax(-1))
    return torch.where(log_p.isnan().any(-1), torch.nan, decided)


def agreement(log_p: Tensor, log_q: Tensor) -> Tensor:
    """-log Σ p q: the chance that both draw the same class."""
    return -torch.logsumexp(log_p + log_q, -1)


def entropy(log_p: Tensor) -> Tensor:
    """-Σ p log p."""
    seen = log_p > -torch.inf
    log = torch.where(seen, log_p, 0.0)
    return -torch.where(seen, log.exp() * log, torch.where(log_p.isnan(), log_p, 0.0)).sum(-1)


def entropy_gap(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(H(p) - H(q))²."""
    return (entropy(log_p) - entropy(log_q)) ** 2


def _weighted(weight: float, rows: Tensor) -> Tensor:
    # A term of weight zero is no part of the loss: 0 * inf must not make it NaN.
    return weight * rows if weight != 0 else torch.zeros_like(rows)


class Divergence(NamedTuple):
    """A row of the table: what is known of a divergence beside its name."""

    rows: Callable[..., Tensor]  # (log_p, log_q, parameter), or as `labelled` says
    code: int  # KdDivergence of csrc/plan.h
    option: str | None = None  # the option that is its parameter
    second: str | None = None  # and its other one
    labelled: bool = False  # rows is (log_p, log_q, parameter, second, Row)
    temperature: float = 4.0  # unless another is asked for
    alone: bool = False  # shares no sweep with others


DIVERGENCES = {
    "forward_kl": Divergence(forward_kl, 0),
    "reverse_kl": Divergence(reverse_kl, 1),
    "jsd": Divergence(jsd, 2, "beta"),
    "skew_forward_kl": Divergence(skew_forward_kl, 3, "skew"),
    "skew_reverse_kl": Divergence(skew_reverse_kl, 4, "skew"),
    "total_variation": Divergence(total_variation, 5),
    "alpha": Divergence(alpha_divergence, 6, "divergence_alpha"),
    "renyi": Divergence(renyi, 7, "divergence_alpha"),
    "dkd": Divergence(dkd, 8, "dkd_alpha", "dkd_beta", labelled=True, alone=True),
    "nkd": Divergence(nkd, 9, "nkd_gamma", labelled=True, temperature=1.0, alone=True),
    "wsld": Divergence(wsld, 10, "wsld_alpha", labelled=True, alone=True),
    "dist": Divergence(dist, 11, "dist_beta", temperature=1.0),
    "hard": Divergence(hard, 12, temperature=1.0, alone=True),
}


class Term(NamedTuple):
    """One divergence of a mixture; its numbers hold where none are given per row."""

    name: str
    weight: float
    parameter: float
    second: float = 0.0


PerRow = Mapping[str, Tensor]  # options that are given as tensors, by name
FORWARD_KL = (Term("forward_kl", 1.0, 0.0),)


def of_term(term: Term, per_row: PerRow) -> tuple[Tensor | None, Tensor | None]:
    """The weights and the parameters of a term that are given per row."""
    option = DIVERGENCES[term.name].option
    return per_row.get(term.name), None if option is None else per_row.get(option)


def mixture_rows(
    log_p: Tensor, log_q: Tensor, row: Row, mixture: tuple[Term, ...], per_row: PerRow
) -> Tensor:
    """The weighted sum of a mixture's divergences, (N, C), (N, C) -> (N,)."""
    total = log_q.new_zeros(log_q.shape[:1])
    for term in mixture:
        weights, parameters = of_term(term, per_row)
        weight = term.weight if weights is None else weights.reshape(-1).to(log_q.dtype)
        parameter = term.parameter if parameters is None else parameters.reshape(-1).to(log_q.dtype)
        divergence = DIVERGENCES[term.name]
        if divergence.labelled:
            rows = divergence.rows(log_p, log_q, parameter, term.second, row)
        else:
            rows = divergence.rows(log_p, log_q, parameter)
        # A term of weight zero is no part of the loss: 0 * inf must not make it NaN.
        left_out = torch.as_tensor(weight, device=rows.device) == 0
        total = total + torch.where(left_out, 0.0, torch.where(left_out, 0.0, rows) * weight)
    return total
