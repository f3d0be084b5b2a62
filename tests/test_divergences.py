"""Every divergence against its formula, written down here in float64 and on its own."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from test_numerics import GRAD_BOUND, LOSS_BOUND, inputs

from kdkernels import FusedKDLoss, backends, kd_loss
from kdkernels.divergences import DIVERGENCES

INF = math.inf
BACKENDS = ("cpu", "reference")
backend = pytest.mark.parametrize("backend", BACKENDS)


def _kl(a, b):
    some = a > 0
    return (a[some] * (a[some].log() - b[some].log())).sum()


# (p, q, parameter) of one row -> its divergence. Probabilities are float64 and may be 0.
FORMULAS = {
    "forward_kl": lambda p, q, _: _kl(p, q),
    "reverse_kl": lambda p, q, _: _kl(q, p),
    "jsd": lambda p, q, b: b * _kl(p, b * p + (1 - b) * q) + (1 - b) * _kl(q, b * p + (1 - b) * q),
    "skew_forward_kl": lambda p, q, s: _kl(p, s * p + (1 - s) * q),
    "skew_reverse_kl": lambda p, q, s: _kl(q, s * q + (1 - s) * p),
    "total_variation": lambda p, q, _: (p - q).abs().sum() / 2,
    "alpha": lambda p, q, a: (_powers(p, q, a) - 1) / (a * (a - 1)),
    "renyi": lambda p, q, a: _powers(p, q, a).log() / (a - 1),
}
OPTION = {
    "jsd": "beta",
    "skew_forward_kl": "skew",
    "skew_reverse_kl": "skew",
    "alpha": "divergence_alpha",
    "renyi": "divergence_alpha",
}
DEFAULT = {"beta": 0.5, "skew": 0.1, "divergence_alpha": 0.5}
PARAMETERS = {"beta": (0.1, 0.5, 0.9), "skew": (0.1, 0.7), "divergence_alpha": (0.3, 0.5, 1.5)}
CASES = [
    (name, value) for name in FORMULAS for value in PARAMETERS.get(OPTION.get(name, ""), (None,))
]
cases = pytest.mark.parametrize(("name", "value"), CASES, ids=str)
names = pytest.mark.parametrize("name", FORMULAS)


def _powers(p, q, a):
    both = (p > 0) & (q > 0)
    return (p[both] ** a * q[both] ** (1 - a)).sum()


def asked(name, value=None):
    """The options that ask for it."""
    return {"divergence": name} | ({} if value is None else {OPTION[name]: value})


def truth(s, t, y, mixture, temperature=4.0, teacher_temperature=None, alpha=0.9, factor=None):
    """Mean loss and its gradient; ``mixture``: names with weights and parameters, rows or one."""
    x = s.detach().double().requires_grad_()
    factor = temperature**2 if factor is None else factor
    rows, hard = [], []
    for i in range(len(s)):
        if y[i] == -100:
            continue
        p = F.softmax(t[i].double() / (teacher_temperature or temperature), -1)
        q = F.softmax(x[i] / temperature, -1)
        rows.append(factor * sum(w * FORMULAS[name](p, q, v) for name, w, v in mixture))
        hard.append(-F.log_softmax(x[i], -1)[y[i]])
    soft, hard = sum(rows) / len(rows), sum(hard) / len(hard)
    loss = alpha * soft + (1 - alpha) * hard if alpha < 1 else soft
    (grad,) = torch.autograd.grad(loss, x)
    return loss.detach(), grad


def check(s, t, y, expected, backend="cpu", **options):
    loss, grad = expected
    x = s.detach().requires_grad_()
    got = kd_loss(x, t, y, backend=backend, **options)
    bound = LOSS_BOUND * (1 + loss.abs())
    assert abs(got.item() - loss) <= bound, f"loss: {got.item()}, not {loss}"
    # As a gradient scaler does, to the end of float16.
    scale = 2.0 ** math.floor(math.log2(3e4 / grad.abs().max())) if s.dtype == torch.float16 else 1
    (got * scale).backward()
    error = (x.grad.double() / scale - grad).norm()
    bound = GRAD_BOUND[s.dtype]
    if s.dtype == torch.float64:  # of sums that cancel, in another order
        bound = 1e-11
    assert error <= bound * grad.norm() + 1e-30, f"gradient: off by {error / grad.norm():.3g}"


def test_the_table_is_complete():
    elsewhere = {"dkd", "nkd", "wsld", "dist", "hard"}  # test_dkd.py, test_objectives.py
    assert set(FORMULAS) | elsewhere == set(DIVERGENCES)
    codes = [d.code for d in DIVERGENCES.values()]
    assert sorted(codes) == list(range(len(codes)))
    options = {n: d.option for n, d in DIVERGENCES.items() if d.option and n not in elsewhere}
    assert options == OPTION


# The reference is the truth in float64, and what it is in float32.
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [*(("cpu", dtype) for dtype in GRAD_BOUND), ("reference", torch.float64)],
    ids=str,
)
@cases
@pytest.mark.parametrize("alpha", [0.9, 1.0])
def test_value_and_gradient(backend, name, value, dtype, alpha):
    for (n, c), scale, temperature in itertools.product(
        ((3, 2), (5, 10), (4, 133)), (0.3, 3.0), (1.0, 4.0)
    ):
        s, t, y = inputs(n, c, scale, dtype)
        expected = truth(
            s,
            t,
            y,
            [(name, 1.0, DEFAULT.get(OPTION.get(name)) if value is None else value)],
            temperature,
            alpha=alpha,
        )
        options = {"temperature": temperature, "alpha": alpha} | asked(name, value)
        check(s, t, y, expected, backend, **options)


@cases
@pytest.mark.parametrize("c", [2049, 5000, 32000])
def test_rows_of_many_blocks(name, value, c):
    for scale, temperature in ((3.0, 2.0), (12.0, 3.3)):
        s, t, y = inputs(3, c, scale)
        parameter = DEFAULT.get(OPTION.get(name)) if value is None else value
        expected = truth(s, t, y, [(name, 1.0, parameter)], temperature)
        check(s, t, y, expected, temperature=temperature, **asked(name, value))


@cases
@pytest.mark.parametrize("near", [1e-2, 1e-4, 1e-6])
def test_a_student_next_to_its_teacher(name, value, near):
    """Where everything cancels, the gradient keeps its digits."""
    s, t, y = inputs(4, 300)
    t = s + near * t
    parameter = DEFAULT.get(OPTION.get(name)) if value is None else value
    expected = truth(s, t, y, [(name, 1.0, parameter)], 2.0, alpha=1.0)
    check(s, t, y, expected, temperature=2.0, alpha=1.0, **asked(name, value))


@backend
@names
def test_two_temperatures_and_no_square(backend, name):
    s, t, y = inputs(6, 200)
    term = [(name, 1.0, DEFAULT.get(OPTION.get(name)))]
    options = {"temperature": 2.0, "teacher_temperature": 3.5, "scale_by_t2": False}
    expected = truth(s, t, y, term, 2.0, 3.5, factor=1.0)
    check(s, t, y, expected, backend, divergence=name, **options)


MIXTURES = [
    {"forward_kl": 0.3, "reverse_kl": 0.7},
    {"forward_kl": 2.0},
    {"jsd": 1.0, "renyi": 0.5, "total_variation": 0.0, "alpha": 3.0},
    dict.fromkeys(FORMULAS, 0.125),
]


@backend
@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
@pytest.mark.parametrize("c", [7, 3000])
def test_a_mixture_is_the_weighted_sum(backend, mixture, c):
    s, t, y = inputs(4, c)
    terms = [(name, w, DEFAULT.get(OPTION.get(name))) for name, w in mixture.items()]
    check(s, t, y, truth(s, t, y, terms), backend, divergence=mixture)
    module = FusedKDLoss(divergence=mixture, backend=backend)
    assert torch.equal(module(s, t, y), kd_loss(s, t, y, divergence=mixture, backend=backend))


@backend
@pytest.mark.parametrize("shape", [(6,), (2, 3)], ids=str)
def test_options_per_row(backend, shape):
    """As if each row were computed alone with its own (DistiLLM-2 sets them per sample)."""
    s, t, y = inputs(6, 50)
    beta = torch.tensor([0.0, 0.2, 0.5, 1.0, 0.9, 0.4])
    skew = torch.tensor([0.1, 0.0, 1.0, 0.3, 0.6, 0.2], dtype=torch.float64)
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5, -1.0, 3.0])
    mixture = {"jsd": 0.5, "skew_reverse_kl": weight, "reverse_kl": 1.0}

    def asked_for(rows):
        return {"beta": beta[rows], "skew": skew[rows]} | {
            "divergence": mixture | {"skew_reverse_kl": weight[rows]}
        }

    x = s.clone().requires_grad_()
    everything = {
        k: v.reshape(shape) if isinstance(v, torch.Tensor) else v for k, v in asked_for(...).items()
    }
    everything["divergence"] = mixture | {"skew_reverse_kl": weight.reshape(shape)}
    losses = kd_loss(
        x.reshape(*shape, 50),
        t.reshape(*shape, 50),
        y.reshape(shape),
        reduction="none",
        backend=backend,
        **everything,
    )
    assert losses.shape == shape
    losses.sum().backward()
    for i in range(6):
        alone = s[i : i + 1].clone().requires_grad_()
        numbers = {
            "beta": beta[i].item(),
            "skew": skew[i].item(),
            "divergence": mixture | {"skew_reverse_kl": weight[i].item()},
        }
        loss = kd_loss(alone, t[i : i + 1], y[i : i + 1], backend=backend, **numbers)
        loss.backward()
        torch.testing.assert_close(losses.flatten()[i], loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(x.grad[i], alone.grad[0], rtol=1e-5, atol=1e-7)


@backend
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_jsd_ends_in_both_kls(backend, beta):
    """Exactly, as in GKD (and TRL's generalized_jsd_loss)."""
    s, t, y = inputs(5, 40)
    name = "reverse_kl" if beta else "forward_kl"
    for ends in (beta, torch.full((5,), beta)):
        got = kd_loss(s, t, y, divergence="jsd", beta=ends, backend=backend)
        torch.testing.assert_close(got, kd_loss(s, t, y, divergence=name, backend=backend))


@backend
@pytest.mark.parametrize("name", ["alpha", "renyi"])
def test_powers_end_in_kl(backend, name):
    s, t, y = inputs(5, 40)
    got = kd_loss(s, t, y, divergence=name, divergence_alpha=1.0, backend=backend)
    torch.testing.assert_close(got, kd_loss(s, t, y, backend=backend))
    if name == "alpha":
        got = kd_loss(s, t, y, divergence=name, divergence_alpha=0.0, backend=backend)
        torch.testing.assert_close(got, kd_loss(s, t, y, divergence="reverse_kl", backend=backend))


def test_jsd_is_trl_s():
    """TRL's generalized_jsd_loss with a temperature, as published: its beta is ours."""
    s, t, _ = inputs(6, 30)
    beta, temperature = 0.3, 2.0
    log_q, log_p = F.log_softmax(s / temperature, -1), F.log_softmax(t / temperature, -1)
    log_beta, log_rest = math.log(beta), math.log(1 - beta)
    log_m = torch.logsumexp(torch.stack([log_q + log_rest, log_p + log_beta]), 0)
    kl_teacher = F.kl_div(log_m, log_p, reduction="none", log_target=True)
    kl_student = F.kl_div(log_m, log_q, reduction="none", log_target=True)
    expected = (beta * kl_teacher + (1 - beta) * kl_student).sum() / len(s)
    options = {"temperature": temperature, "alpha": 1.0, "scale_by_t2": False}
    got = kd_loss(s, t, divergence="jsd", beta=beta, **options)
    torch.testing.assert_close(got, expected)


@backend
@names
def test_a_student_equal_to_its_teacher_is_the_minimum(backend, name):
    s, _, y = inputs(5, 60, dtype=torch.float64 if backend == "reference" else torch.float32)
    x = s.clone().requires_grad_()
    options = {"alpha": 1.0, "divergence": name, "backend": backend}
    at_minimum = kd_loss(x, s.clone(), y, **options)
    assert -1e-12 <= at_minimum <= 2e-6
    at_minimum.backward()
    assert x.grad.norm() <= 1e-6
    generator = torch.Generator().manual_seed(5)
    for size in (1e-2, 1.0, 30.0):
        moved = s + size * torch.randn(s.shape, generator=generator)
        assert kd_loss(moved, s, y, **options) > at_minimum


@backend
@names
def test_a_shift_of_a_row_changes_nothing(backend, name):
    s, t, y = (v.double() if v.is_floating_point() else v for v in inputs(4, 30))
    shift = torch.tensor([[0.0], [6e4], [-6e4], [7.0]], dtype=torch.float64)
    options = {"divergence": name, "backend": backend, "temperature": 2.0}
    expected = kd_loss(s, t, y, **options)
    for moved in ((s + shift, t), (s, t + shift), (s + shift, t - shift)):
        torch.testing.assert_close(kd_loss(*moved, y, **options), expected, rtol=1e-9, atol=1e-9)


# Whether mass on a class that only the student, or only the teacher, has masked is infinite.
INFINITE = {
    "forward_kl": (True, False),
    "reverse_kl": (False, True),
    "jsd": (False, False),
    "skew_forward_kl": (False, False),
    "skew_reverse_kl": (False, False),
    "total_variation": (False, False),
    "alpha": (False, False),
    "renyi": (False, False),
}


@backend
@names
@pytest.mark.parametrize("c", [9, 3000])
def test_masked_classes(backend, name, c):
    s, t, y = inputs(4, c)
    y[:] = 0
    s[1, c // 2 :], t[1, c // 2 :] = -INF, -INF  # in both: as if they were not there
    s[2, c // 2], t[3, c // 2] = -INF, -INF  # in one
    options = {"divergence": name, "backend": backend, "alpha": 1.0}
    x = s.clone().requires_grad_()
    losses = kd_loss(x, t, y, reduction="none", **options)
    by_student, by_teacher = INFINITE[name]
    assert (losses == INF).tolist() == [False, False, by_student, by_teacher]
    losses[losses < INF].sum().backward()
    parameter = DEFAULT.get(OPTION.get(name))
    for row in (losses < INF).nonzero().flatten().tolist():
        one = slice(row, row + 1)
        expected = truth(s[one], t[one], y[:1], [(name, 1.0, parameter)], alpha=1.0)
        assert abs(losses[row] - expected[0]) <= LOSS_BOUND * (1 + expected[0])
        grad = expected[1].nan_to_num(0.0)  # of the formula, where 0 has no logarithm
        if not torch.isfinite(expected[1]).all():
            continue
        error = (x.grad[row].double() - grad).norm()
        assert error <= GRAD_BOUND[torch.float32] * grad.norm()
    small = kd_loss(s[1:2, : c // 2], t[1:2, : c // 2], y[:1], **options)
    torch.testing.assert_close(losses[1], small, rtol=1e-6, atol=1e-6)
    assert torch.isfinite(x.grad[:2]).all()
    assert x.grad[1, c // 2 :].eq(0).all()


@backend
@pytest.mark.parametrize("a", [-1.5, 0.5, 3.0])
def test_a_class_masked_in_both_is_nothing_at_two_temperatures(backend, a):
    """Powers outside [0, 1] of no mass at all, further apart the more the temperatures differ."""
    s, t, y = inputs(3, 8)
    y[:] = 1
    options = {"divergence": "alpha", "divergence_alpha": a, "backend": backend}
    options |= {"temperature": 1.0, "alpha": 1.0}
    for of_teacher in (0.5, 4.0):
        small = s[:, :5].clone().requires_grad_()
        expected = kd_loss(small, t[:, :5], y, teacher_temperature=of_teacher, **options)
        expected.backward()
        x = s.clone()
        x[:, 5:], t[:, 5:] = -INF, -INF
        x.requires_grad_()
        got = kd_loss(x, t, y, teacher_temperature=of_teacher, **options)
        got.backward()
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(x.grad[:, :5], small.grad)
        assert x.grad[:, 5:].eq(0).all()


def test_powers_too_small_for_float32_beside_a_masked_class():
    s = torch.tensor([[300.0, 0.0, -INF, -2.0]])
    t = torch.tensor([[0.0, 300.0, 1.0, -2.0]])
    options = {"divergence": "renyi", "temperature": 1.0, "alpha": 1.0}
    expected = kd_loss(s.double(), t.double(), backend="reference", **options)
    assert torch.isfinite(expected)
    torch.testing.assert_close(kd_loss(s, t, **options).double(), expected)


@backend
@pytest.mark.parametrize(("order", "infinite"), [(1.5, (True, False)), (-0.5, (False, True))])
def test_powers_outside_0_and_1_are_infinite_as_kls_are(backend, order, infinite):
    s, t, y = inputs(3, 9)
    y[:] = 0
    s[1, 3], t[2, 3] = -INF, -INF
    options = {"divergence_alpha": order, "backend": backend, "reduction": "none"}
    losses = kd_loss(s, t, y, divergence="alpha", **options)
    assert (losses == INF).tolist() == [False, *infinite]


@backend
@names
def test_rows_left_out_and_rows_that_are_no_numbers(backend, name):
    s, t, y = inputs(5, 300)
    y[0] = -100
    clean = kd_loss(s, t, y, divergence=name, backend=backend)
    s[0], t[0] = math.nan, -INF
    x = s.clone().requires_grad_()
    loss = kd_loss(x, t, y, divergence=name, backend=backend)
    loss.backward()
    assert torch.equal(loss, clean)
    assert x.grad[0].eq(0).all()
    for bad in (s, t):
        broken = bad.clone()
        broken[2, 7] = math.nan
        pair = (broken, t) if bad is s else (s, broken)
        losses = kd_loss(*pair, y, divergence=name, backend=backend, reduction="none")
        assert torch.isnan(losses).tolist() == [False, False, True, False, False]
    ignored = torch.full_like(y, -100)
    assert kd_loss(s, t, ignored, divergence=name, backend=backend) == 0


@backend
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("c", [5, 3000])
def test_without_a_share_the_teacher_is_not_touched(backend, name, c):
    s, t, y = inputs(4, c)
    s[0, y[0]] += 30.0  # a class that the student is sure of: the label, and another
    s[1, (y[1] + 1) % c] += 30.0
    x, expected = s.clone().requires_grad_(), s.double().requires_grad_()
    options = {"alpha": 0.0, "divergence": name, "backend": backend}
    kd_loss(x, torch.full_like(t, math.nan), y, **options).backward()
    F.cross_entropy(expected, y).backward()
    error = (x.grad - expected.grad).norm()
    assert error <= GRAD_BOUND[torch.float32] * expected.grad.norm()


@names
def test_the_spread_of_real_training(name):
    """log(0.5 p + 0.5 q) with both about e^-104, T below 1: NaN elsewhere (Liger-Kernel #1453)."""
    s, t, y = inputs(4, 500, 40.0)
    for temperature in (0.05, 0.5, 1.0):
        x = s.clone().requires_grad_()
        loss = kd_loss(x, t, y, divergence=name, temperature=temperature, divergence_alpha=0.5)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(x.grad).all()


@names
def test_in_place_and_terms_and_threads_change_no_bit(name):
    s, t, y = inputs(40, 1500)
    x = s.clone().requires_grad_()
    loss = kd_loss(x, t, y, divergence=name)
    loss.backward()
    assert torch.equal(kd_loss(s, t, y, divergence=name), loss)
    terms = kd_loss(s, t, y, divergence=name, return_terms=True)
    assert torch.equal(terms.loss, loss)
    assert torch.equal(terms.hard, kd_loss(s, t, y, alpha=0.0))
    leaf = s.clone().requires_grad_()
    logits = leaf * 1
    kd_loss(logits, t, y, divergence=name, inplace=True).backward()
    assert torch.equal(leaf.grad, x.grad)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = s.clone().requires_grad_()
        kd_loss(one, t, y, divergence=name).backward()
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one.grad, x.grad)


@names
def test_finite_differences_and_the_second_derivative(name):
    s, t, y = (v.double() if v.is_floating_point() else v for v in inputs(3, 6, 1.0))
    x = s.requires_grad_()

    def loss(v):
        return kd_loss(v, t, y, divergence=name, temperature=2.0, label_smoothing=0.1)

    assert torch.autograd.gradcheck(loss, (x,))
    assert torch.autograd.gradgradcheck(loss, (x,))


WRONG = [
    ({"divergence": "kl"}, ValueError, r"divergence must be one of .*'reverse_kl'.* got 'kl'"),
    ({"divergence": {}}, ValueError, "divergence must name at least one"),
    ({"divergence": 3}, TypeError, "divergence must be one of .* got int"),
    ({"divergence": ("jsd", "renyi")}, TypeError, "divergence must be one of .* got tuple"),
    ({"divergence": {"kl": 1.0}}, ValueError, "divergence must be one of .* got 'kl'"),
    ({"divergence": {"jsd": INF}}, ValueError, "weight of 'jsd' in divergence must be a fini"),
    ({"divergence": {"jsd": "1"}}, TypeError, "weight of 'jsd' in divergence must be a finite"),
    ({"beta": 0.3}, ValueError, "beta is for divergence 'jsd', and divergence is 'forward_kl'"),
    (
        {"divergence": {"jsd": 1, "renyi": 1}, "skew": 0.3},
        ValueError,
        "skew is for divergence 'skew_",
    ),
    ({"dkd_beta": 2.0}, ValueError, "dkd_beta is for divergence 'dkd'"),
    ({"skew": torch.zeros(3)}, ValueError, "skew is for divergence 'skew_forward_kl' or 'skew_rev"),
    ({"beta": 1.5}, ValueError, r"beta must be in \[0, 1\], got 1.5"),
    ({"skew": -0.1}, ValueError, r"skew must be in \[0, 1\], got -0.1"),
    (
        {"divergence": "alpha", "divergence_alpha": INF},
        ValueError,
        "divergence_alpha must be a f",
    ),
    ({"divergence": "renyi", "divergence_alpha": 0.0}, ValueError, "divergence_alpha must be > 0"),
    ({"teacher_temperature": 0.0}, ValueError, "teacher_temperature must be a finite number > 0"),
    ({"scale_by_t2": 1}, TypeError, "scale_by_t2 must be True or False"),
    (
        {"divergence": "jsd", "beta": torch.zeros(4)},
        ValueError,
        r"beta must hold one value per row, shape \(3,\)",
    ),
    (
        {"divergence": "jsd", "beta": torch.tensor([0, 1, 0])},
        TypeError,
        "beta must be floating point",
    ),
    (
        {"divergence": "jsd", "beta": torch.tensor([0.1, 2.0, 0.3])},
        ValueError,
        r"beta must be in \[0, 1\] in every row",
    ),
    (
        {"divergence": "skew_forward_kl", "skew": torch.tensor([0.1, math.nan, 0.3])},
        ValueError,
        "skew must be in",
    ),
    (
        {"divergence": "jsd", "beta": torch.zeros(3, requires_grad=True)},
        ValueError,
        "beta must not require grad",
    ),
    (
        {"divergence": {"jsd": torch.tensor([1.0, INF, 0.0])}},
        ValueError,
        "the weight of 'jsd' in divergence must be finite in every row",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), WRONG, ids=lambda v: str(v)[:50])
def test_what_is_wrong_is_named(options, error, message):
    s, t, y = inputs(3, 5)
    x = s.clone().requires_grad_()
    with pytest.raises(error, match=message):
        kd_loss(x, t, y, **options)
    with pytest.raises(error, match=message):
        FusedKDLoss(**options)(x, t, y)


MISSING = {
    "triton": [
        (
            {"temperature": torch.tensor(2.0, requires_grad=True), "standardize": True},
            "a temperature that requires grad beside standardize",
        ),
    ],
}


@pytest.mark.parametrize("name", MISSING)
def test_a_backend_without_the_divergence_says_so(name, monkeypatch):
    s, t, y = inputs(3, 5)
    monkeypatch.setattr(backends.BACKENDS[name], "why_not", lambda *_: None, raising=False)
    backends.select.cache_clear()
    try:
        for options, what in MISSING[name]:
            with pytest.raises(RuntimeError, match=f"{name}.*no kernel yet for {what}"):
                kd_loss(s, t, y, backend=name, **options)
    finally:
        backends.select.cache_clear()


def test_the_module_sees_its_attributes_change():
    s, t, y = inputs(3, 5)
    loss_fn = FusedKDLoss()
    for name, options in (
        ("divergence", {"divergence": "jsd"}),
        ("beta", {"divergence": "jsd", "beta": 0.9}),
        ("temperature", {"divergence": "jsd", "beta": 0.9, "temperature": 2.0}),
    ):
        setattr(loss_fn, name, options[name])
        assert torch.equal(loss_fn(s, t, y), kd_loss(s, t, y, **options))
    loss_fn.divergence = {"jsd": 1.0}
    loss_fn.divergence["jsd"] = 2.0
    assert torch.equal(loss_fn(s, t, y), kd_loss(s, t, y, **options | {"divergence": {"jsd": 2.0}}))
    loss_fn.beta = 7.0
    with pytest.raises(ValueError, match="beta"):
        loss_fn(s, t, y)
