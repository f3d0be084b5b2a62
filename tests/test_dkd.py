"""Decoupled distillation against its formula, and where published code gives Inf and NaN."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_numerics import GRAD_BOUND, LOSS_BOUND, inputs

from kdkernels import FusedKDLoss, kd_loss

INF = math.inf
backend = pytest.mark.parametrize("backend", ["cpu", "reference"])


def truth(s, t, y, temperature=4.0, dkd_alpha=1.0, dkd_beta=8.0, alpha=0.9):
    """Mean loss and gradient in float64, by the log-odds of the label."""
    x = s.detach().double().requires_grad_()
    soft, hard = [], []
    for i in range(len(s)):
        if y[i] == -100:
            continue
        others = torch.arange(s.shape[1]) != y[i]
        logs, rests = [], []
        for v in (t[i].double() / temperature, x[i] / temperature):
            rest = torch.logsumexp(v[others], 0)
            logs.append(torch.stack([F.logsigmoid(v[y[i]] - rest), F.logsigmoid(rest - v[y[i]])]))
            rests.append(v[others] - rest)
        kl = [(a.exp() * (a - b))[a > -INF].sum() for a, b in (logs, rests)]
        soft.append(temperature**2 * (dkd_alpha * kl[0] + dkd_beta * kl[1]))
        hard.append(F.softplus(torch.logsumexp(x[i][others], 0) - x[i][y[i]]))
    soft, hard = sum(soft) / len(soft), sum(hard) / len(hard)
    loss = alpha * soft + (1 - alpha) * hard if alpha < 1 else soft
    (grad,) = torch.autograd.grad(loss, x)
    return loss.detach(), grad


def check(s, t, y, backend="cpu", **options):
    loss, grad = truth(s, t, y, **options)
    x = s.detach().requires_grad_()
    got = kd_loss(x, t, y, divergence="dkd", backend=backend, **options)
    assert abs(got.item() - loss) <= LOSS_BOUND * (1 + loss.abs())
    largest = grad.abs().max().item()
    fits = s.dtype == torch.float16 and largest > 0
    scale = 2.0 ** math.floor(math.log2(3e4 / largest)) if fits else 1.0
    (got * scale).backward()
    bound = 1e-9 if s.dtype == torch.float64 else GRAD_BOUND[s.dtype]  # of sums that cancel
    error = (x.grad.double() / scale - grad).norm()
    assert error <= bound * grad.norm() + 1e-14  # which the formula's own backward is off by


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [*(("cpu", dtype) for dtype in GRAD_BOUND), ("reference", torch.float64)],
    ids=str,
)
@pytest.mark.parametrize("c", [2, 3, 10, 100, 1000, 2049, 5000])
@pytest.mark.parametrize("alpha", [0.9, 1.0])
def test_value_and_gradient(backend, dtype, c, alpha):
    for scale in (0.3, 3.0, 12.0):
        s, t, y = inputs(4, c, scale, dtype)
        y[1] = -100
        for options in (
            {},
            {"temperature": 1.0, "dkd_alpha": 0.5, "dkd_beta": 2.0},
            {"temperature": 3.3, "dkd_beta": 0.0},
            {"temperature": 2.0, "dkd_alpha": 0.0},
            {"temperature": 2.0, "dkd_alpha": 300.0, "dkd_beta": 40.0},
        ):
            check(s, t, y, backend, alpha=alpha, **options)


# Of the last class: it is a block by itself.
@backend
@pytest.mark.parametrize("c", [2, 7, 2049])
@pytest.mark.parametrize("margin", [15.0, 40.0, 120.0, 1000.0])
def test_a_label_that_is_all_there_is(backend, c, margin):
    """1 - p_y by subtraction is 0 here, and its logarithm -Inf (mdistiller #60, CTKD #9)."""
    dtype = torch.float64 if backend == "reference" else torch.float32
    for sure in ("student", "teacher", "both", "student of another"):
        s, t, y = inputs(3, c, dtype=dtype)
        y[0] = c - 1
        rows = torch.arange(3)
        if sure in ("student", "both"):
            s[rows, y] += margin
        if sure in ("teacher", "both"):
            t[rows, y] += margin
        if sure == "student of another":
            s[rows, (y + 1) % c] += margin
        check(s, t, y, backend, temperature=1.0)
        check(s, t, y, backend, temperature=4.0, alpha=1.0)


@pytest.mark.parametrize("c", [3, 10, 42, 300])
def test_the_weights_do_not_lift_the_roundings_above_the_promise(c):
    """T² and dkd_beta multiply them, and logits of few values do not let them average out."""
    for seed in range(20):
        s, t, y = inputs(4, c, 1.0, seed=seed)
        s, t = (s * 2).round() / 2 - 0.1, (t * 2).round() / 2
        t = s + 0.05 * t
        for temperature in (4.0, 10.0):
            check(s, t, y, temperature=temperature, alpha=1.0, dkd_beta=30.0)


def test_the_labels_entry_is_no_difference_of_ones():
    s, t, y = torch.tensor([[40.0, 0.0]]), torch.tensor([[41.0, 0.0]]), torch.tensor([0])
    x = s.clone().requires_grad_()
    kd_loss(x, t, y, divergence="dkd", alpha=1.0, temperature=1.0).backward()
    label = torch.sigmoid(torch.tensor(-41.0)) - torch.sigmoid(torch.tensor(-40.0))
    torch.testing.assert_close(x.grad, torch.stack([label, -label])[None], rtol=1e-5, atol=0)


def test_it_is_what_mdistiller_publishes():
    """Where that is finite: dkd_loss(logits_student, logits_teacher, target, alpha, beta, T)."""
    s, t, y = (v.double() if v.is_floating_point() else v for v in inputs(6, 20))
    alpha, beta, temperature = 1.0, 8.0, 4.0
    label = F.one_hot(y, 20).bool()
    parts = []
    for v in (s, t):
        p = F.softmax(v / temperature, 1)
        parts.append(torch.stack([(p * label).sum(1), (p * ~label).sum(1)], 1))
    target = F.kl_div(parts[0].log(), parts[1], reduction="sum") * temperature**2 / len(y)
    others = F.kl_div(
        F.log_softmax(s / temperature - 1000.0 * label, 1),
        F.softmax(t / temperature - 1000.0 * label, 1),
        reduction="sum",
    )
    expected = alpha * target + beta * others * temperature**2 / len(y)
    got = kd_loss(s, t, y, divergence="dkd", alpha=1.0, temperature=temperature)
    torch.testing.assert_close(got, expected)


@backend
def test_two_classes_have_only_the_labels_part(backend):
    s, t, y = inputs(5, 2, dtype=torch.float64)
    options = {"alpha": 1.0, "backend": backend}
    expected = kd_loss(s, t, y, **options)
    for beta in (0.0, 8.0):
        got = kd_loss(s, t, y, divergence="dkd", dkd_beta=beta, **options)
        torch.testing.assert_close(got, expected)


@backend
def test_weights_of_one_part_each_make_kl(backend):
    """KL = TCKD + (1 - p_y) NCKD, which is what the paper takes apart."""
    s, t, y = inputs(1, 9, dtype=torch.float64)
    p = F.softmax(t / 4, -1)[0, y[0]].item()
    options = {"alpha": 1.0, "backend": backend}
    got = kd_loss(s, t, y, divergence="dkd", dkd_alpha=1.0, dkd_beta=1 - p, **options)
    torch.testing.assert_close(got, kd_loss(s, t, y, **options))


@backend
@pytest.mark.parametrize("c", [6, 3000])
def test_masked_classes(backend, c):
    s, t, y = inputs(5, c, dtype=torch.float64)
    y[:] = 1
    s[1, 3:], t[1, 3:] = -INF, -INF  # in both: as if they were not there
    t[2, 4] = -INF  # a class without teacher
    s[3, 4] = -INF  # a class that only the student masks
    s[4, 2:], t[4, 2:], s[4, 0], t[4, 0] = -INF, -INF, -INF, -INF  # nothing but the label
    x = s.clone().requires_grad_()
    losses = kd_loss(x, t, y, divergence="dkd", backend=backend, reduction="none", alpha=0.5)
    assert (losses == INF).tolist() == [False, False, False, True, False]
    assert losses[4] == 0
    (losses[:3].sum() + losses[4]).backward()
    small = kd_loss(s[1:2, :3], t[1:2, :3], y[:1], divergence="dkd", backend=backend, alpha=0.5)
    torch.testing.assert_close(losses[1], small)
    assert torch.isfinite(x.grad[:3]).all()
    assert x.grad[1, 3:].eq(0).all()
    assert torch.isfinite(x.grad[4]).all()


@backend
@pytest.mark.parametrize("name", ["dkd", "nkd"])
@pytest.mark.parametrize("c", [6, 3000])
def test_one_of_the_two_has_nothing_but_the_label(backend, name, c):
    s, t, y = inputs(2, c, dtype=torch.float64)
    t[0, torch.arange(c) != y[0]] = -INF
    s[1, torch.arange(c) != y[1]] = -INF
    x = s.clone().requires_grad_()
    options = {"divergence": name, "alpha": 1.0, "temperature": 2.0, "backend": backend}
    losses = kd_loss(x, t, y, reduction="none", **options)
    assert losses[1] == INF
    losses[0].backward()
    # Of the first row the label is all that is left: -log of the student's share of it.
    z = s[:1].clone().requires_grad_()
    T = 1.0 if name == "nkd" else 2.0
    expected = F.cross_entropy(z / T, y[:1]) * T**2
    expected.backward()
    torch.testing.assert_close(losses[:1].detach(), expected.detach()[None])
    torch.testing.assert_close(x.grad[:1], z.grad)


@backend
def test_minimum_shift_and_ignored_rows(backend):
    s, t, y = inputs(5, 40, dtype=torch.float64)
    x = s.clone().requires_grad_()
    options = {"divergence": "dkd", "backend": backend, "alpha": 1.0}
    at_minimum = kd_loss(x, s, y, **options)
    at_minimum.backward()
    assert 0 <= at_minimum <= 1e-12
    assert x.grad.norm() <= 1e-12
    assert kd_loss(s + t, s, y, **options) > 0
    expected = kd_loss(s, t, y, **options)
    torch.testing.assert_close(kd_loss(s + 6e4, t - 6e4, y, **options), expected, rtol=1e-9, atol=0)
    y[2] = -100
    clean = kd_loss(s, t, y, **options)
    s[2], t[2] = math.nan, -INF
    assert torch.equal(kd_loss(s, t, y, **options), clean)
    t[3, 5] = math.nan
    rows = kd_loss(s, t, y, reduction="none", **options)
    assert torch.isnan(rows).tolist() == [False, False, False, True, False]


def test_derivatives():
    s, t, y = inputs(3, 5, 1.0, torch.float64)

    def loss(v):
        return kd_loss(v, t, y, divergence="dkd", temperature=2.0, weight=torch.ones(5) * 2)

    assert torch.autograd.gradcheck(loss, (s.requires_grad_(),))
    assert torch.autograd.gradgradcheck(loss, (s,))


def test_in_place_terms_and_threads_change_no_bit():
    s, t, y = inputs(40, 1500)
    x = s.clone().requires_grad_()
    loss = kd_loss(x, t, y, divergence="dkd")
    loss.backward()
    terms = kd_loss(s, t, y, divergence="dkd", return_terms=True)
    assert torch.equal(terms.loss, loss)
    torch.testing.assert_close(terms.hard, F.cross_entropy(s, y))
    leaf = s.clone().requires_grad_()
    kd_loss(leaf * 1, t, y, divergence="dkd", inplace=True).backward()
    assert torch.equal(leaf.grad, x.grad)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(kd_loss(s, t, y, divergence="dkd"), loss)
    finally:
        torch.set_num_threads(before)


def test_class_weights_are_the_cross_entropys():
    s, t, y = inputs(6, 9)
    weight = torch.rand(9, generator=torch.Generator().manual_seed(1)) + 0.5
    terms = kd_loss(s, t, y, divergence="dkd", weight=weight, return_terms=True)
    torch.testing.assert_close(terms.hard, F.cross_entropy(s, y, weight=weight))
    assert torch.equal(terms.soft, kd_loss(s, t, y, divergence="dkd", return_terms=True).soft)


WRONG = [
    ({"dkd_alpha": -1.0}, "dkd_alpha must be a finite number >= 0, got -1.0"),
    ({"dkd_beta": INF}, "dkd_beta must be a finite number >= 0, got inf"),
    ({"label_smoothing": 0.1}, "divergence='dkd' and label_smoothing do not go together"),
    ({"distill_ignored": True}, "divergence='dkd' and distill_ignored do not go together"),
    ({"teacher_temperature": 2.0}, "divergence='dkd' and teacher_temperature do not go together"),
    ({"divergence": {"jsd": 1.0, "dkd": 1.0}}, "'dkd' and 'jsd' cannot be mixed"),
    ({"divergence": {"dkd": torch.ones(3)}}, "weight of 'dkd' in divergence must be a number"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=lambda v: str(v)[:40])
def test_what_does_not_go_together_is_named(options, message):
    s, t, y = inputs(3, 5)
    options = {"divergence": "dkd"} | options
    with pytest.raises(ValueError, match=message):
        kd_loss(s, t, y, **options)
    with pytest.raises(ValueError, match=message):
        FusedKDLoss(**options)(s, t, y)


def test_labels_are_needed_and_looked_at():
    s, t, y = inputs(3, 5)
    with pytest.raises(ValueError, match="labels are missing: divergence='dkd' needs them"):
        kd_loss(s, t, alpha=1.0, divergence="dkd")
    y[1] = 5
    with pytest.raises(IndexError, match=r"labels\[1\] is 5"):
        kd_loss(s, t, y, alpha=1.0, divergence="dkd")


def test_a_weight_in_a_mapping_scales_it():
    s, t, y = inputs(3, 5)
    one = kd_loss(s, t, y, divergence="dkd", alpha=1.0)
    torch.testing.assert_close(kd_loss(s, t, y, divergence={"dkd": 0.25}, alpha=1.0), one / 4)
