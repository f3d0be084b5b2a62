"""The objectives of image classification, and several looks at a row, against their formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from formulas import (
    backend,
    compare,
    dist,
    everywhere,
    forward_kl,
    hard,
    jsd,
    nkd,
    reverse_kl,
    sizes,
    standardized,
    truth,
    wsld,
)
from test_dkd import truth as dkd_truth
from test_numerics import GRAD_BOUND, LOSS_BOUND, inputs

from kdkernels import FusedKDLoss, KDMetrics, kd_loss

INF = math.inf
OBJECTIVES = {"nkd": nkd, "wsld": wsld, "dist": dist, "hard": hard}
LOOKS = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}
WITHIN_ROWS = {"dist_gamma": 0.0}


@everywhere
@sizes
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective(backend, dtype, c, name):
    formula = OBJECTIVES[name]
    more = WITHIN_ROWS if name == "dist" else {}
    for scale, T, alpha in ((1.0, 1.0, 0.9), (4.0, 4.0, 1.0), (8.0, 2.0, 0.5)):
        s, t, y = inputs(4, c, scale, dtype)
        y[1] = -100
        expected = truth(
            lambda row, t, label, i, T=T: formula(row, t[i].double(), label, T),
            s,
            t,
            y,
            alpha=alpha,
        )
        compare(expected, s, t, y, backend, divergence=name, temperature=T, alpha=alpha, **more)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("near", [1e-2, 1e-4])
@pytest.mark.parametrize("c", [3, 100, 5000])
def test_a_student_next_to_its_teacher(name, near, c):
    """Where float32 would lose what little is left of the gradient, it is computed in double."""
    options = {"divergence": name, "temperature": 1.0, "alpha": 1.0}
    options |= WITHIN_ROWS if name == "dist" else {}
    s, t, y = inputs(8, c, 4.0)
    s = t + near * s
    for row in zip(s.split(1), t.split(1), y.split(1), strict=True):  # each has to be right
        expected = truth(
            lambda v, t, label, i: OBJECTIVES[name](v, t[i].double(), label, 1.0), *row, alpha=1.0
        )
        compare(expected, *row, "cpu", **options)


def test_their_papers_temperatures_are_the_defaults():
    s, t, y = inputs(4, 10)
    for name, T in (("nkd", 1.0), ("wsld", 4.0), ("dist", 1.0), ("hard", 1.0), ("dkd", 4.0)):
        got = kd_loss(s, t, y, divergence=name)
        assert torch.equal(got, kd_loss(s, t, y, divergence=name, temperature=T))
        assert FusedKDLoss(divergence=name).temperature == T


@backend
@pytest.mark.parametrize("margin", [15.0, 40.0, 300.0])
def test_a_label_that_is_all_there_is(backend, margin):
    """WSLD's weight is a ratio of two cross entropies next to 0; NKD's others are next to 0."""
    dtype = torch.float64 if backend == "reference" else torch.float32
    for c in (7, 2049):
        for sure in ("student", "teacher"):
            s, t, y = inputs(3, c, 1.0, dtype)
            (s if sure == "student" else t)[torch.arange(3), y] += margin
            for name in ("nkd", "wsld"):
                formula = OBJECTIVES[name]
                expected = truth(
                    lambda row, t, label, i, formula=formula: formula(
                        row, t[i].double(), label, 2.0
                    ),
                    s,
                    t,
                    y,
                    alpha=1.0,
                )
                compare(expected, s, t, y, backend, divergence=name, temperature=2.0, alpha=1.0)


COMBINED = [
    {"standardize": True},
    {"weight": torch.linspace(0.5, 2.0, 9), "label_smoothing": 0.1},
    {"z_loss": 0.05},
    {"agreement": 0.3, "temperature": [1.0, 3.0], "sample_weight": torch.tensor([0.5, 2.0, 0.0])},
    {"logit_softcap": 4.0, "logit_scale": (0.5, 2.0), "taid": 0.4},
    {"inplace": True, "reduction": "sum", "num_classes": 8},
]


def check_together(options, name, ensemble, backend="cpu"):
    s, t, y = inputs(3, 9)
    y = y.clamp(max=7)
    teacher = t if ensemble is None else [t, t.roll(1, 0), t.roll(1, 1)]
    options = options | (WITHIN_ROWS if name == "dist" else {}) | {"divergence": name}
    options |= {} if ensemble is None else {"ensemble": ensemble, "teacher_weights": [1, 2, 0.5]}
    x, z = s.clone().requires_grad_(), s.double().requires_grad_()
    loss = kd_loss(x * 1, teacher, y, backend=backend, **options)
    wide = [u.double() for u in teacher] if isinstance(teacher, list) else teacher.double()
    expected = kd_loss(z, wide, y, backend="reference", **options | {"inplace": False})
    (loss + expected).backward()
    assert abs(loss.item() - expected.item()) <= LOSS_BOUND * (1 + abs(expected.item()))
    error = (x.grad - z.grad).norm()
    assert error <= GRAD_BOUND[torch.float32] * z.grad.norm()


@pytest.mark.parametrize("options", COMBINED, ids=lambda o: " ".join(o)[:40])
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("ensemble", [None, "probs", "losses", "logits"])
def test_options_go_together(options, name, ensemble):
    """Against the reference, which knows nothing of passes: each of these has been wrong once."""
    check_together(options, name, ensemble)


@backend
@pytest.mark.parametrize("name", ["nkd", "wsld", "dist", "hard"])
def test_masked_classes(backend, name):
    s, t, y = inputs(3, 12, dtype=torch.float64)
    y[:] = 1
    options = {"divergence": name, "backend": backend, "alpha": 0.5}
    options |= WITHIN_ROWS if name == "dist" else {}
    s[1, 5:], t[1, 5:] = -INF, -INF  # in both: as if they were not there
    s[2, 2:], t[2, 2:], s[2, 0], t[2, 0] = -INF, -INF, -INF, -INF  # nothing but the label
    x = s.clone().requires_grad_()
    losses = kd_loss(x, t, y, reduction="none", **options)
    losses.sum().backward()
    if name != "dist":  # the mean of a row counts its classes
        small = kd_loss(s[1:2, :5], t[1:2, :5], y[:1], **options)
        torch.testing.assert_close(losses[1], small)
        assert losses[2] == 0
    assert torch.isfinite(losses).all()
    assert torch.isfinite(x.grad).all()
    assert x.grad[1, 5:].eq(0).all()


@backend
def test_dist_across_the_batch(backend):
    """As published: beta · inter-class + gamma · intra-class, of softmax(v / tau)."""

    def correlation(a, b):
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        return F.cosine_similarity(a, b, dim=1).mean()

    s, t, y = inputs(6, 9, dtype=torch.float64)
    y[2] = -100
    kept = y != -100
    x = s.clone().requires_grad_()
    q, p = (F.softmax(v[kept] / 2.0, 1) for v in (x, t))
    expected = 4 * (1.5 * (1 - correlation(q, p)) + 0.7 * (1 - correlation(q.T, p.T)))
    (grad,) = torch.autograd.grad(expected, x, create_graph=True)
    options = {"dist_beta": 1.5, "dist_gamma": 0.7, "temperature": 2.0, "alpha": 1.0}
    got = kd_loss(x, t, y, divergence="dist", backend=backend, **options)
    (first,) = torch.autograd.grad(got, x, retain_graph=True)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(first, grad)
    (again,) = torch.autograd.grad(got, x, create_graph=True)
    second, expected_second = (torch.autograd.grad((g**3).sum(), x)[0] for g in (again, grad))
    torch.testing.assert_close(second, expected_second)
    terms = kd_loss(s, t, y, divergence="dist", return_terms=True, backend=backend, **options)
    torch.testing.assert_close(terms.soft, expected.detach())


@backend
def test_constant_distributions_have_no_correlation(backend):
    s, t, y = inputs(2, 5, dtype=torch.float64)
    s[0], t[1] = 1.0, 2.0
    options = {"divergence": "dist", "backend": backend, "alpha": 1.0, **WITHIN_ROWS}
    x = s.clone().requires_grad_()
    rows = kd_loss(x, t, y, reduction="none", **options)
    rows.sum().backward()
    assert rows.tolist() == [1.0, 1.0]
    assert x.grad.eq(0).all()


# ---- several looks at a row ----------------------------------------------------------------------


@everywhere
@sizes
def test_a_temperature_for_each_row(backend, dtype, c):
    s, t, y = inputs(4, c, 3.0, dtype)
    y[2] = -100
    temperature = torch.tensor([0.7, 2.0, 3.0, 5.5])
    for name, formula in LOOKS.items():
        expected = truth(
            lambda row, t, label, i, formula=formula: formula(
                row, t[i].double(), label, temperature[i].double()
            ),
            s,
            t,
            y,
        )
        compare(expected, s, t, y, backend, divergence=name, temperature=temperature)


@everywhere
@pytest.mark.parametrize("c", [3, 100, 2049])
def test_several_temperatures(backend, dtype, c):
    s, t, y = inputs(3, c, 3.0, dtype)
    for reduction, share in (("sum", 1.0), ("mean", 1 / 3)):
        expected = truth(
            lambda row, t, label, i, share=share: sum(
                share * forward_kl(row, t[i].double(), label, T) for T in (1.0, 2.5, 6.0)
            ),
            s,
            t,
            y,
        )
        compare(
            expected,
            s,
            t,
            y,
            backend,
            temperature=[1.0, 2.5, 6.0],
            temperature_reduction=reduction,
        )


@everywhere
@sizes
def test_standardised_logits(backend, dtype, c):
    for scale in (0.1, 5.0):
        s, t, y = inputs(3, c, scale, dtype)
        for name, formula in LOOKS.items():
            expected = truth(
                lambda row, t, label, i, formula=formula: formula(
                    standardized(row), standardized(t[i].double()), label, 2.0
                ),
                s,
                t,
                y,
            )
            compare(expected, s, t, y, backend, divergence=name, temperature=2.0, standardize=True)


@backend
def test_standardised_dkd(backend):
    s, t, y = inputs(5, 12, dtype=torch.float64)
    z, u = (torch.stack([standardized(row) for row in v]) for v in (s, t))
    expected, _ = dkd_truth(z, u, y, alpha=1.0)
    x = s.clone().requires_grad_()
    got = kd_loss(x, t, y, divergence="dkd", standardize=True, alpha=1.0, backend=backend)
    torch.testing.assert_close(got, expected)

    def loss(v):
        return kd_loss(v, t, y, divergence="dkd", standardize=True, backend=backend)

    assert torch.autograd.gradcheck(loss, (x,))


@backend
@pytest.mark.parametrize("c", [1, 2, 6])
def test_a_constant_row_can_be_standardised(backend, c):
    """It is 0, its deviation has no derivative, and what it is divided by is 1e-7."""
    s, t, y = inputs(2, c)
    s[0], t[1] = 3.0, -2.0
    x, z = s.clone().requires_grad_(), torch.zeros(1, c, dtype=torch.float64, requires_grad=True)
    rows = kd_loss(x, t, y, standardize=True, alpha=1.0, reduction="none", backend=backend)
    rows.sum().backward()
    u = standardized(t[0].double())[None] if c > 1 else torch.zeros(1, 1)
    expected = kd_loss(z, u, y[:1], alpha=1.0, backend="reference")
    (expected * 1e7).backward()
    torch.testing.assert_close(rows[0].double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad[:1].double(), z.grad, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(rows).all()
    assert torch.isfinite(x.grad).all()


@backend
def test_standardising_looks_only_at_classes_that_are_there(backend):
    s, t, y = inputs(2, 8, dtype=torch.float64)
    y[:] = 1
    expected = kd_loss(s[:, :5], t[:, :5], y, standardize=True, backend=backend)
    s[:, 5:], t[:, 5:] = -INF, -INF
    x = s.clone().requires_grad_()
    got = kd_loss(x, t, y, standardize=True, backend=backend)
    got.backward()
    torch.testing.assert_close(got, expected)
    assert x.grad[:, 5:].eq(0).all()


# ---- terms beside the divergence -----------------------------------------------------------------


def agreement(s, t):
    return -torch.logsumexp(F.log_softmax(s, 0) + F.log_softmax(t, 0), 0)


def entropy_gap(s, t):
    entropies = [-(F.softmax(v, 0) * F.log_softmax(v, 0)).sum() for v in (s, t)]
    return (entropies[0] - entropies[1]) ** 2


@everywhere
@sizes
def test_agreement_and_entropy_gap(backend, dtype, c):
    for scale in (0.5, 6.0):
        s, t, y = inputs(3, c, scale, dtype)
        y[0] = -100
        for weights in (
            {"agreement": 0.7},
            {"entropy_gap": 0.3},
            {"agreement": 1, "entropy_gap": 2},
        ):

            def row_loss(row, t, label, i, weights=weights):
                u = t[i].double()
                added = weights.get("agreement", 0) * agreement(row, u)
                added = added + weights.get("entropy_gap", 0) * entropy_gap(row, u)
                return forward_kl(row, u, label, 3.0) + added / 0.9

            compare(truth(row_loss, s, t, y), s, t, y, backend, temperature=3.0, **weights)


def check_far_apart(backend="cpu"):
    s, t = torch.tensor([[200.0, 0.0, 0.0]]), torch.tensor([[0.0, 200.0, 0.0]])
    x = s.clone().requires_grad_()
    loss = kd_loss(x, t, torch.tensor([0]), alpha=0.0, agreement=1.0, backend=backend)
    loss.backward()
    assert abs(loss.item() - (200 - math.log(2))) < 1e-3
    assert torch.isfinite(x.grad).all()


def test_distributions_that_agree_in_nothing_that_float32_holds():
    """-log of e^-200: the products of their probabilities are 0 in float32."""
    check_far_apart()


@backend
def test_the_composite_of_the_tutorial(backend):
    """L = CE + lam · E + beta · S, E = -sum over i of log sum over k of p_ik q_ik, S = E / tau."""
    s, t, y = inputs(5, 10, dtype=torch.float64)
    E = -(F.softmax(s, 1) * F.softmax(t, 1)).sum(1).log().sum()
    expected = F.cross_entropy(s, y) + 0.3 * E + 0.2 * E / 5.0
    got = FusedKDLoss.tutorial(lam=0.3, beta=0.2, tau=5.0, backend=backend)(s, t, y)
    torch.testing.assert_close(got, expected)
    with pytest.raises(ValueError, match="tau must be a number > 0, got 0"):
        FusedKDLoss.tutorial(1.0, 1.0, 0)


# ---- what holds for all of them ------------------------------------------------------------------

ALL = [
    {"divergence": "nkd"},
    {"divergence": "wsld"},
    {"divergence": "dist", **WITHIN_ROWS},
    {"divergence": "hard"},
    {"standardize": True},
    {"temperature": [1.0, 3.0]},
    {"temperature": torch.tensor([1.0, 2.0, 3.0])},
    {"agreement": 0.5, "alpha": 0.0},
    {"entropy_gap": 0.5},
    {"taid": 0.4},
    {"logit_softcap": 5.0, "logit_scale": (0.5, 1.5)},
    {"z_loss": 0.1},
    {"sample_weight": torch.tensor([0.5, 2.0, 1.0])},
    {"divergence": {"forward_kl": 1.0, "hard": 0.5, "nkd": 2.0}},
]
of_all = pytest.mark.parametrize("options", ALL, ids=lambda o: " ".join(o)[:40])


def doubled(options):
    return {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}


@of_all
def test_derivatives(options):
    s, t, y = inputs(3, 5, 1.5, torch.float64)
    x = s.requires_grad_()
    detached = "wsld" in str(options) or "taid" in options  # what is detached fools differences

    def loss(v, backend="cpu"):
        return kd_loss(v, t, y, backend=backend, **doubled(options))

    assert detached or torch.autograd.gradcheck(loss, (x,))
    (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
    (expected,) = torch.autograd.grad(loss(x, "reference"), x, create_graph=True)
    torch.testing.assert_close(first, expected)
    second = [torch.autograd.grad(g.square().sum(), x)[0] for g in (first, expected)]
    torch.testing.assert_close(*second)


@backend
@of_all
def test_ignored_rows_are_not_read_and_nan_comes_out(backend, options):
    s, t, y = inputs(3, 40, dtype=torch.float64)
    y[1] = -100
    options = doubled(options) | {"backend": backend}
    clean = kd_loss(s, t, y, **options)
    s[1], t[1] = math.nan, -INF
    x = s.clone().requires_grad_()
    loss = kd_loss(x, t, y, **options)
    loss.backward()
    assert torch.equal(loss.detach(), clean)
    assert x.grad[1].eq(0).all()
    x.grad = None
    nothing = kd_loss(x, t, torch.full_like(y, -100), **options)
    nothing.backward()
    assert nothing == 0
    assert x.grad.eq(0).all()
    t[2, 3] = math.nan
    rows = kd_loss(s, t, y, reduction="none", **options)
    assert torch.isnan(rows).tolist() == [False, False, True]


@of_all
def test_in_place_terms_and_threads_change_no_bit(options):
    rows, c = 30, 1500
    s, t, y = inputs(rows, c)
    options = {
        k: v.repeat(rows // 3) if isinstance(v, torch.Tensor) else v for k, v in options.items()
    }
    x = s.clone().requires_grad_()
    loss = kd_loss(x, t, y, **options)
    loss.backward()
    assert torch.equal(kd_loss(s, t, y, return_terms=True, **options).loss, loss)
    leaf = s.clone().requires_grad_()
    kd_loss(leaf * 1, t, y, inplace=True, **options).backward()
    assert torch.equal(leaf.grad, x.grad)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(kd_loss(s, t, y, **options), loss)
    finally:
        torch.set_num_threads(before)


@backend
@pytest.mark.parametrize("name", ["dist", "forward_kl"])
def test_a_student_that_is_its_teacher_is_at_the_minimum(backend, name):
    s, t, y = inputs(4, 30, dtype=torch.float64)
    for options in ({}, {"standardize": True}, {"temperature": [1.0, 4.0]}, {"logit_softcap": 9.0}):
        options = {"divergence": name, "alpha": 1.0, "backend": backend, **options}
        options |= WITHIN_ROWS if name == "dist" else {}
        x = s.clone().requires_grad_()
        loss = kd_loss(x, s, y, **options)
        loss.backward()
        assert 0 <= loss <= 1e-12
        assert x.grad.norm() <= 1e-7 * s.norm()
        assert kd_loss(s + t, s, y, **options) > 0
        torch.testing.assert_close(
            kd_loss(s + t, s + 1e3, y, **options | {"logit_softcap": None}),
            kd_loss(s + t - 5e3, s, y, **options | {"logit_softcap": None}),
        )


@backend
def test_metrics(backend):
    s, t, y = inputs(6, 12, dtype=torch.float64)
    y[0], y[1] = -100, s[1].argmax()
    t[2, s[2].argmax()] = 50.0
    x = s.clone().requires_grad_()
    metrics = kd_loss(x, t, y, return_terms="metrics", backend=backend)
    assert isinstance(metrics, KDMetrics)
    metrics.loss.backward()
    plain = s.clone().requires_grad_()
    terms = kd_loss(plain, t, y, return_terms=True, backend=backend)
    terms.loss.backward()
    torch.testing.assert_close(metrics[:3], tuple(terms))
    torch.testing.assert_close(x.grad, plain.grad)
    kept = y != -100
    entropies = [-(F.softmax(v, 1) * F.log_softmax(v, 1)).sum(1) for v in (s, t)]
    expected = [e[kept].mean() for e in entropies]
    expected += [(s.argmax(1) == v)[kept].double().mean() for v in (t.argmax(1), y)]
    torch.testing.assert_close(list(metrics[3:]), expected)
    rows = kd_loss(s, t, y, return_terms="metrics", reduction="none", backend=backend)
    torch.testing.assert_close(rows.student_entropy, torch.where(kept, entropies[0], 0.0))
    assert rows.accuracy.tolist() == ((s.argmax(1) == y) & kept).double().tolist()


# ---- bad input -----------------------------------------------------------------------------------

WRONG = [
    ({"nkd_gamma": 1.0}, "nkd_gamma is for divergence 'nkd', and divergence is 'forward_kl'"),
    ({"divergence": "nkd", "nkd_gamma": -1.0}, "nkd_gamma must be a finite number >= 0, got -1.0"),
    ({"divergence": "wsld", "wsld_alpha": INF}, "wsld_alpha must be a finite number >= 0, got inf"),
    ({"dist_gamma": 2.0}, "dist_gamma is for divergence 'dist'"),
    ({"divergence": "dist", "reduction": "none"}, "dist_gamma and reduction='none' do not go"),
    ({"divergence": "dist", "inplace": True}, "dist_gamma and inplace do not go together"),
    (
        {"divergence": "dist", "sample_weight": torch.ones(3)},
        "dist_gamma and sample_weight per",
    ),
    ({"divergence": "dist", "temperature": torch.ones(3)}, "dist_gamma and temperature per row"),
    ({"divergence": "nkd", "distill_ignored": True}, "divergence='nkd' and distill_ignored do not"),
    ({"divergence": "wsld", "teacher_temperature": 2.0}, "divergence='wsld' and teacher_temper"),
    ({"temperature": [1.0, 2.0], "teacher_temperature": 2.0}, "several temperatures and teacher_"),
    ({"temperature": torch.ones(4)}, r"temperature must hold one value per row, shape \(3,\)"),
    ({"temperature": torch.zeros(3)}, r"temperature must be in \[1e-06, 1e\+06\] in every row"),
    ({"temperature_reduction": "none"}, "temperature_reduction must be one of"),
    ({"taid": 1.5}, r"taid must be in \[0, 1\], got 1.5"),
    ({"agreement": math.nan}, "agreement must be a finite number, got nan"),
    ({"agreement_reduction": "mean", "reduction": "sum"}, "agreement_reduction must be None, or"),
    ({"logit_softcap": 0.0}, "logit_softcap must be a finite number > 0, got 0.0"),
    ({"logit_scale": (1.0, 2.0, 3.0)}, r"logit_scale must be one number or \(student, teacher\)"),
    ({"logit_scale": (1.0, -2.0)}, "logit_scale must be a finite number > 0, got -2.0"),
    ({"logit_bias": torch.ones(3)}, r"logit_bias must hold one value per class, shape \(5,\)"),
    ({"z_loss": -1.0}, "z_loss must be a finite number >= 0, got -1.0"),
    ({"z_loss": 0.1, "weight": torch.ones(5)}, "z_loss and weight do not go together"),
    ({"num_classes": 6}, "num_classes must be at most the classes of student_logits, 5, got 6"),
    ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
    ({"ensemble": "votes"}, "ensemble must be one of"),
    ({"teacher_weights": [1.0, 2.0]}, "teacher_weights must hold one weight per teacher, 1, got 2"),
    ({"teacher_weights": [0.0]}, "teacher_weights must not all be 0"),
    ({"sample_weight": torch.tensor([1.0, -1.0, 0.0])}, "sample_weight must be finite and >= 0"),
    ({"sample_weight": torch.ones(2)}, "sample_weight must hold one value per row"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=lambda v: str(v)[:50])
def test_what_is_wrong_is_named(options, message):
    s, t, y = inputs(3, 5)
    with pytest.raises(ValueError, match=message):
        kd_loss(s, t, y, **options)


# ---- across the batch ----------------------------------------------------------------------------


def columns_truth(s, t, rows, T, teacher_T, gamma):
    """gamma · T² · the mean over the classes of 1 - Pearson of p and q in ``rows``, in float64."""
    x = s.double().requires_grad_()
    q, p = torch.softmax(x[rows] / T, -1), torch.softmax(t.double()[rows] / teacher_T, -1)
    distances = []
    for k in range(s.shape[-1]):
        a, b = p[:, k] - p[:, k].mean(), q[:, k] - q[:, k].mean()
        constant = a.norm() <= 1e-12 or b.norm() <= 1e-12
        distances.append(torch.tensor(1.0) if constant else 1 - a @ b / (a.norm() * b.norm()))
    loss = gamma * T**2 * sum(distances) / len(distances)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


@pytest.mark.parametrize("dtype", GRAD_BOUND)
@pytest.mark.parametrize(("n", "c"), [(4, 3), (7, 16), (40, 17), (64, 600)])
@pytest.mark.parametrize("scale", [0.3, 3.0, 12.0])
def test_the_columns_of_a_batch(dtype, n, c, scale):
    """Compiled on the CPU; the teacher is of another type, both lie in memory as slices do."""
    torch.manual_seed(n + c)
    s, t = ((torch.randn(n, c + 3) * scale).to(d)[:, :c] for d in (dtype, torch.float32))
    y = torch.randint(c, (n,))
    y[n // 2] = -100
    t[n // 2] = s[n // 2] = math.nan
    if c > 3:
        s[0, 1] = t[0, 1] = t[1, 2] = -INF
    options = {"dist_beta": 0.0, "dist_gamma": 0.7, "temperature": 2.0, "alpha": 1.0}
    x = s.detach().requires_grad_()
    loss = kd_loss(x, t, y, divergence="dist", teacher_temperature=1.5, backend="cpu", **options)
    scaler = 2.0**12  # as one would for float16
    grad = torch.autograd.grad(loss * scaler, x)[0].double() / scaler
    expected, truth_grad = columns_truth(s, t, y != -100, 2.0, 1.5, 0.7)
    assert abs(loss.double() - expected) <= LOSS_BOUND * (1 + expected)
    bound = GRAD_BOUND[dtype] * truth_grad.norm() + 1e-30
    assert (grad - truth_grad).norm() <= bound
    assert grad[n // 2].eq(0).all()


def test_the_columns_of_a_batch_sum_with_what_autograd_does():
    """Scaled from above, twice through a kept graph, summed, and without a gradient."""
    s, t, y = inputs(9, 33, 2.0)
    options = {"divergence": "dist", "temperature": 2.0, "alpha": 0.6}
    for reduction in ("mean", "sum"):
        grads, losses = [], []
        for backend_name in ("cpu", "reference"):
            x = s.clone().requires_grad_()
            loss = kd_loss(x, t, y, backend=backend_name, reduction=reduction, **options)
            (3 * loss).backward(retain_graph=True)
            (-loss).backward()
            grads.append(x.grad), losses.append(loss.detach())
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    with torch.inference_mode():
        torch.testing.assert_close(kd_loss(s, t, y, reduction="sum", **options), losses[0])


def test_columns_of_equal_logits_have_no_distance():
    s, _, y = inputs(9, 33, 2.0)
    x = s.clone().requires_grad_()
    loss = kd_loss(x, s, y, divergence="dist", alpha=1.0)
    loss.backward()
    assert 0 <= loss <= LOSS_BOUND
    assert x.grad.abs().max() <= 1e-6


def test_columns_are_the_same_bits_for_any_number_of_threads():
    s, t, y = inputs(65, 700, 2.0)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        x = s.clone().requires_grad_()
        loss = kd_loss(x, t, y, divergence="dist")
        loss.backward()
        found.append((loss.detach(), x.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_a_nan_is_not_taken_for_a_constant_column():
    s, t, y = inputs(5, 4)
    t[2, 1] = math.nan
    for backend_name in ("cpu", "reference"):
        loss = kd_loss(s, t, y, divergence="dist", dist_beta=0.0, alpha=1.0, backend=backend_name)
        assert loss.isnan()


def test_columns_of_ignored_rows_alone_are_nothing():
    s, t, y = inputs(5, 4)
    x = s.clone().requires_grad_()
    loss = kd_loss(x, t, torch.full_like(y, -100), divergence="dist")
    loss.backward()
    assert loss == 0
    assert x.grad.eq(0).all()


def test_hooks_of_the_logits_run_once_for_a_second_derivative_of_the_columns():
    s, t, y = inputs(5, 4, dtype=torch.float64)
    leaf = s.requires_grad_()
    x, calls = leaf * 1, []
    x.register_hook(lambda grad: calls.append(grad))
    loss = kd_loss(x, t, y, divergence="dist", backend="cpu")
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    assert len(calls) == 1
    grad.square().sum().backward()
    assert leaf.grad.isfinite().all()
    freed = kd_loss(leaf, t, y, divergence="dist", backend="cpu")
    freed.backward()
    with pytest.raises(RuntimeError, match="second time"):
        freed.backward()
