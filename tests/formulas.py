"""The objectives in float64, a row at a time and by autograd: written from their papers and the
code published with them, and independent of kdkernels.reference."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_numerics import GRAD_BOUND, LOSS_BOUND

from kdkernels import kd_loss

INF = math.inf
# The reference is the truth in float64, and what it is in float32.
everywhere = pytest.mark.parametrize(
    ("backend", "dtype"),
    [*(("cpu", dtype) for dtype in GRAD_BOUND), ("reference", torch.float64)],
    ids=str,
)
backend = pytest.mark.parametrize("backend", ["cpu", "reference"])
sizes = pytest.mark.parametrize("c", [3, 10, 100, 1000, 2049, 5000])


def kl(log_a, log_b):
    seen = log_a > -INF
    return (log_a[seen].exp() * (log_a[seen] - log_b[seen])).sum()


def forward_kl(s, t, y, T):
    return T**2 * kl(F.log_softmax(t / T, 0), F.log_softmax(s / T, 0))


def reverse_kl(s, t, y, T):
    return T**2 * kl(F.log_softmax(s / T, 0), F.log_softmax(t / T, 0))


def jsd(s, t, y, T, beta=0.5):
    log_p, log_q = F.log_softmax(t / T, 0), F.log_softmax(s / T, 0)
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    return T**2 * (beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m))


def nkd(s, t, y, T, nkd_gamma=1.5):
    others = torch.arange(len(s)) != y
    at_label = -F.softmax(t, 0)[y] * F.log_softmax(s, 0)[y]
    p, log_q = F.softmax(t[others] / T, 0), F.log_softmax(s[others] / T, 0)
    return at_label - nkd_gamma * T**2 * torch.where(p > 0, p * log_q, 0.0).sum()


def wsld(s, t, y, T, wsld_alpha=2.25):
    def cross_entropy(v):
        others = torch.arange(len(v)) != y
        return F.softplus(torch.logsumexp(v[others], 0) - v[y])

    ratio = cross_entropy(s.detach()) / (cross_entropy(t) + 1e-7)
    p, log_q = F.softmax(t / T, 0), F.log_softmax(s / T, 0)
    soft = -torch.where(p > 0, p * log_q, 0.0).sum()
    return -torch.expm1(-ratio) * wsld_alpha * T**2 * soft


def dist(s, t, y, T, dist_beta=1.0):
    p, q = F.softmax(t / T, 0), F.softmax(s / T, 0)
    p, q = p - p.mean(), q - q.mean()
    return T**2 * dist_beta * (1 - (p @ q) / (p.norm() * q.norm()))


def hard(s, t, y, T):
    return T**2 * F.cross_entropy(s[None] / T, t.argmax()[None])


def standardized(v):
    return (v - v.mean()) / (v.std(correction=1) + 1e-7)


def reduced(rows, kept, y, s, reduction="mean", alpha=0.9, weights=None, **_):
    """alpha · soft + (1 - alpha) · cross entropy of the kept rows, and what it is made of."""
    weights = torch.ones(len(s)).double() if weights is None else weights.double()
    soft = torch.stack(rows) * weights[kept]
    ce = F.cross_entropy(s[kept], y[kept], reduction="none") * weights[kept]
    total = weights[kept].sum() if reduction == "mean" else 1.0
    return (alpha * soft.sum() + (1 - alpha) * ce.sum()) / total


def truth(row_loss, s, t, y, **options):
    """The loss of the batch in float64 and its gradient. ``row_loss(s, t, label, i)``."""
    x = s.detach().double().requires_grad_()
    kept = [i for i in range(len(s)) if y[i] != -100]
    rows = [row_loss(x[i], t, y[i], i) for i in kept]
    loss = reduced(rows, kept, y, x, **options)
    (grad,) = torch.autograd.grad(loss, x)
    return loss.detach(), grad


def compare(expected, s, t, y, backend="cpu", **options):
    """kd_loss within the promise of ``expected``, as ``truth`` gives it."""
    loss, grad = expected
    x = s.detach().requires_grad_()
    got = kd_loss(x, t, y, backend=backend, **options)
    assert abs(got.item() - loss) <= LOSS_BOUND * (1 + loss.abs()), (got.item(), loss)
    largest = grad.abs().max().item()
    fits = s.dtype == torch.float16 and largest > 0
    scale = 2.0 ** math.floor(math.log2(3e4 / largest)) if fits else 1.0
    (got * scale).backward()
    error = (x.grad.double() / scale - grad).norm()
    bound = 1e-10 if s.dtype == torch.float64 else GRAD_BOUND[s.dtype]  # of sums that cancel
    assert error <= bound * grad.norm() + 1e-14, f"gradient: off by {error / grad.norm():.3g}"
