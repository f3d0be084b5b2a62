"""docs/peers.md: the losses that others have, and the calls that replace them."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kdkernels import kd_loss

DOCS = Path(__file__).parent.parent / "docs" / "peers.md"
T, A, B, C = 3.0, 0.7, 0.3, 11
# Of a weight of the labels and one of the teacher that do not add up to 1.
H, W = 0.4, 1.7


def kl(s, t, reduction="batchmean"):
    return F.kl_div(F.log_softmax(s / T, -1), F.softmax(t / T, -1), reduction=reduction)


def weighted(s, t, y, hard, soft, **options):
    return (hard + soft) * kd_loss(s, t, y, alpha=soft / (hard + soft), **options)


def rep_distiller(s, t, y):
    div = F.kl_div(F.log_softmax(s / T, dim=1), F.softmax(t / T, dim=1), reduction="sum")
    return H * F.cross_entropy(s, y) + W * div * T**2 / s.shape[0]


def deit_soft(s, t, y, d):
    log_q, log_p = F.log_softmax(d / T, dim=1), F.log_softmax(t / T, dim=1)
    soft = F.kl_div(log_q, log_p, reduction="sum", log_target=True) * (T * T) / d.numel()
    return F.cross_entropy(s, y) * (1 - A) + soft * A


def timm_logits(s, t, y):
    log_q, log_p = F.log_softmax(s / T, dim=-1), F.log_softmax(t / T, dim=-1)
    soft = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * T**2
    return H * F.cross_entropy(s, y) + W * soft


def trl_jsd(s, t, y, beta=B):
    log_q, log_p = F.log_softmax(s / T, dim=-1), F.log_softmax(t / T, dim=-1)
    if beta in (0.0, 1.0):
        pair = (log_q, log_p) if beta == 0 else (log_p, log_q)
        jsd = F.kl_div(*pair, reduction="none", log_target=True)
    else:
        b = torch.tensor(beta, dtype=s.dtype)
        mixed = torch.logsumexp(torch.stack([log_q + torch.log1p(-b), log_p + torch.log(b)]), dim=0)
        of_teacher = F.kl_div(mixed, log_p, reduction="none", log_target=True)
        of_student = F.kl_div(mixed, log_q, reduction="none", log_target=True)
        jsd = b * of_teacher + (1 - b) * of_student
    mask = y != -100
    return jsd[mask].sum() / mask.sum()


def torchtune(s, t, y):
    mask = y != -100
    crossed = (F.softmax(t, -1) * F.log_softmax(s, -1)).sum(-1)
    return -(crossed * mask).sum() / mask.sum()


def entropy(t, y):
    rows = -(F.softmax(t, -1) * F.log_softmax(t, -1)).sum(-1)
    return rows[y != -100].mean()


def distill_kit(s, t, y):
    s, t = s.reshape(3, -1, C), t.reshape(3, -1, C)
    return kl(s, t) * T**2 / s.shape[1]


def jsd(s, t, y, beta=B, **options):
    options |= {"divergence": "jsd", "beta": beta, "scale_by_t2": False, "temperature": T}
    return kd_loss(s, t, y, **options)


# name: (theirs, ours). A d in the arguments is the second head of a student.
PEERS = {
    "F.kl_div and F.cross_entropy": (
        lambda s, t, y: A * T**2 * kl(s, t) + (1 - A) * F.cross_entropy(s, y),
        lambda s, t, y: kd_loss(s, t, y, temperature=T, alpha=A),
    ),
    'F.kl_div with reduction="mean"': (
        lambda s, t, y: T**2 * kl(s, t, "mean"),
        lambda s, t, y: kd_loss(s, t, y, temperature=T, alpha=1.0) / C,
    ),
    "without T²": (
        lambda s, t, y: A * kl(s, t) + (1 - A) * F.cross_entropy(s, y),
        lambda s, t, y: kd_loss(s, t, y, temperature=T, alpha=A, scale_by_t2=False),
    ),
    "RepDistiller": (rep_distiller, lambda s, t, y: weighted(s, t, y, H, W, temperature=T)),
    "torchdistill": (
        lambda s, t, y: A * F.cross_entropy(s, y) + (1 - A) * T**2 * kl(s, t),
        lambda s, t, y: kd_loss(s, t, y, temperature=T, alpha=1 - A),
    ),
    "Keras example": (
        lambda s, t, y: A * F.cross_entropy(s, y) + (1 - A) * T**2 * kl(s, t),
        lambda s, t, y: kd_loss(s, t, y, temperature=T, alpha=1 - A),
    ),
    "DeiT, soft": (
        lambda s, t, y: deit_soft(s, t, y, s.flip(1)),
        lambda s, t, y: (
            (1 - A) * F.cross_entropy(s, y)
            + A * kd_loss(s.flip(1), t, temperature=T, alpha=1.0) / C
        ),
    ),
    "DeiT, hard": (
        lambda s, t, y: F.cross_entropy(s, t.argmax(dim=1)),
        lambda s, t, y: kd_loss(s, t, alpha=1.0, divergence="hard"),
    ),
    "timm LogitDistillationTask": (
        timm_logits,
        lambda s, t, y: weighted(s, t, y, H, W, temperature=T),
    ),
    "TRL generalized_jsd_loss": (trl_jsd, lambda s, t, y: jsd(s, t, y, alpha=1.0)),
    "Liger JSD with labels": (
        lambda s, t, y: H * F.cross_entropy(s, y) + W * trl_jsd(s, t, y),
        lambda s, t, y: (H + W) * jsd(s, t, y, alpha=W / (H + W)),
    ),
    "torchtune ForwardKLLoss": (
        torchtune,
        lambda s, t, y: kd_loss(s, t, y, temperature=1.0, alpha=1.0) + entropy(t, y),
    ),
    "DistillKit": (distill_kit, lambda s, t, y: kd_loss(s, t, temperature=T, alpha=1.0)),
}
WITH_IGNORED = ["TRL generalized_jsd_loss", "Liger JSD with labels", "torchtune ForwardKLLoss"]


def compare(theirs, ours, s, t, y):
    found = []
    for loss_fn in (theirs, ours):
        x = s.clone().requires_grad_()
        loss = loss_fn(x, t, y)
        found.append((loss.detach(), torch.autograd.grad(loss, x)[0]))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss")
@pytest.mark.parametrize("name", PEERS)
def test_the_call_that_replaces_it_is_equal(name):
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(9, C, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    y = torch.randint(C, (9,), generator=generator)
    compare(*PEERS[name], s, t, y)
    if name in WITH_IGNORED:
        y[2] = -100
        compare(*PEERS[name], s, t, y)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_the_ends_of_trls_beta_are_ours(beta):
    s, t = torch.randn(5, C).double(), torch.randn(5, C).double()
    y = torch.randint(C, (5,))
    compare(
        lambda s, t, y: trl_jsd(s, t, y, beta),
        lambda s, t, y: jsd(s, t, y, beta, alpha=1.0),
        s,
        t,
        y,
    )


def test_every_line_of_the_document_is_tested():
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ")][1:]
    assert [re.split(r" *\| *", row)[1] for row in rows] == list(PEERS)
