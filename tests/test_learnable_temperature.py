"""A temperature that requires grad gets its gradient from the compiled kernels."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_divergences import CASES, FORMULAS, asked
from test_numerics import GRAD_BOUND, inputs

from kdkernels import TopKTeacher, kd_loss, learnable_temperature

FLOAT32 = GRAD_BOUND[torch.float32]  # of the rate also where the logits are narrower: it is summed
COMPILED = [case for case in CASES if case != ("renyi", 1.5)]


def truth(name, value, s, t, y, T, teacher_T=None, scale_by_t2=True):
    """Of each row the soft term and d(soft) / dT, in float64 and by autograd."""
    T = T.detach().double().requires_grad_()
    rows = []
    for i in range(len(s)):
        p = F.softmax(t[i].double() / (T[i] if teacher_T is None else teacher_T), -1)
        q = F.softmax(s[i].double() / T[i], -1)
        row = (T[i] ** 2 if scale_by_t2 else 1.0) * FORMULAS[name](p, q, value)
        rows.append(row if y[i] != -100 else row.detach() * 0 + 0 * T[i])
    rows = torch.stack(rows)
    (rate,) = torch.autograd.grad(rows.sum(), T)
    return rows.detach().nan_to_num(), rate


def check_rate(rate, expected, rows, T):
    # Beside its own size that of what it is the difference of.
    scale = expected.norm() + (2 * rows / T.double()).norm()
    assert (rate.double() - expected).norm() <= FLOAT32 * scale


@pytest.mark.parametrize("dtype", GRAD_BOUND)
@pytest.mark.parametrize(("name", "value"), COMPILED, ids=str)
def test_every_divergence(name, value, dtype):
    for n, c in ((5, 7), (4, 300)):
        s, t, y = inputs(n, c, dtype=dtype)
        T = torch.linspace(1.0, 6.0, n).requires_grad_()
        y[1] = -100
        s[1] = math.nan
        options = asked(name, value) | {"alpha": 0.7, "backend": "cpu"}
        rows, expected = truth(name, value, s, t, y, T)
        for reduction in ("none", "sum", "mean"):
            x = s.clone().requires_grad_()
            loss = kd_loss(x, t, y, temperature=T, reduction=reduction, **options)
            (rate,) = torch.autograd.grad(2 * loss.sum(), T)
            count = n - 1 if reduction == "mean" else 1
            check_rate(rate, 2 * 0.7 * expected / count, 2 * rows / count, T)


def test_one_for_all_rows_and_the_student_as_ever():
    """A scalar sums over the rows; the loss and the student's gradient are those of a number."""
    s, t, y = inputs(6, 33)
    T = torch.tensor(3.0, requires_grad=True)
    x, plain = s.clone().requires_grad_(), s.clone().requires_grad_()
    loss = kd_loss(x, t, y, temperature=T, backend="cpu")
    loss.backward()
    expected = kd_loss(plain, t, y, temperature=3.0)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(x.grad, plain.grad)
    wide = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    kd_loss(s.double(), t.double(), y, temperature=wide, backend="reference").backward()
    torch.testing.assert_close(T.grad.double(), wide.grad, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"teacher_temperature": 2.0},
        {"scale_by_t2": False},
        {"divergence": "jsd", "beta": torch.tensor([0.0, 0.2, 0.5, 1.0, 0.9])},
        {"divergence": {"forward_kl": 0.5, "reverse_kl": torch.linspace(0, 2, 5)}},
        {"divergence": {"renyi": torch.linspace(0, 2, 5)}, "divergence_alpha": 0.3},
        {"divergence": "skew_forward_kl", "skew": torch.linspace(0, 0.9, 5)},
        {"sample_weight": torch.tensor([1.0, 0.0, 3.0, 0.5, 2.0])},
        {"distill_ignored": True},
        {"label_smoothing": 0.1, "agreement": 0.3, "z_loss": 1e-3},
        {"entropy_gap": 0.1, "agreement": 0.2, "agreement_reduction": "sum"},
        {"num_classes": 20},
        {"return_terms": "metrics"},
        {"weight": torch.linspace(0.1, 2.0, 33)},
        {"ignore_index": 3},
    ],
    ids=str,
)
def test_beside_every_option_as_the_reference_has_it(options):
    s, t, y = inputs(5, 33)
    y[2], y[3] = -100, min(y[3], 19)
    if "ignore_index" in options:
        y[2] = 3
    y = y.clamp(max=19)
    found = []
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        T = torch.linspace(1.0, 4.0, 5, dtype=dtype).requires_grad_()
        x = s.to(dtype).requires_grad_()
        loss = kd_loss(x, t.to(dtype), y, temperature=T, backend=backend, **options)
        loss = loss.loss if "return_terms" in options else loss
        found.append([g.double() for g in torch.autograd.grad(loss, (T, x))])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-8)


def test_a_frozen_student_and_one_that_is_overwritten():
    s, t, y = inputs(4, 9)
    rates = []
    for frozen, inplace in ((True, False), (False, False), (False, True)):
        T = torch.tensor(2.0, requires_grad=True)
        leaf = s.clone().requires_grad_(not frozen)
        kd_loss(leaf * 1, t, y, temperature=T, inplace=inplace, backend="cpu").backward()
        rates.append(T.grad)
    assert rates[0] == rates[1] == rates[2]
    T = torch.tensor(2.0, requires_grad=True)
    with torch.no_grad():
        assert not kd_loss(s, t, y, temperature=T).requires_grad
    kd_loss(s.clone().requires_grad_(), t, y, temperature=T, alpha=0.0).backward()
    assert T.grad is None  # it is no part of the loss


def test_masked_classes_have_no_part():
    s, t, y = inputs(4, 9, dtype=torch.float64)
    s[:, 5:] = t[:, 5:] = -math.inf
    y = y.clamp(max=4)
    rates = []
    for classes in (9, 5):
        T = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        kd_loss(s[:, :classes], t[:, :classes], y, temperature=T, backend="cpu").backward()
        rates.append(T.grad)
    torch.testing.assert_close(*rates)


def test_rows_are_taken_in_parts(monkeypatch):
    """As for a batch too large for all its gradients at once; and three dimensions, and one."""
    s, t, y = inputs(12, 9)
    rates = []
    for shape, chunk in (((12,), 2**24), ((12,), 20), ((4, 3), 30), ((4, 3), 1)):
        monkeypatch.setitem(learnable_temperature.CHUNK, "cpu", chunk)
        T = torch.linspace(1, 4, 12).reshape(shape).requires_grad_()
        logits = s.reshape(*shape, 9), t.reshape(*shape, 9)
        kd_loss(*logits, y.reshape(shape), temperature=T, backend="cpu").backward()
        rates.append(T.grad.reshape(-1))
    assert all(torch.equal(rate, rates[0]) for rate in rates)
    T = torch.tensor(1.0, requires_grad=True)
    kd_loss(s[0], t[0], y[0], temperature=T, reduction="sum", backend="cpu").backward()
    torch.testing.assert_close(T.grad, rates[0][0] * 12)


@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_derivatives_of_both_orders(name):
    s, t, y = inputs(3, 5, dtype=torch.float64)
    T = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)

    def loss(x, T):
        return kd_loss(x, t, y, temperature=T, divergence=name, backend="cpu")

    arguments = s.requires_grad_(), T
    assert torch.autograd.gradcheck(loss, arguments)
    assert torch.autograd.gradgradcheck(loss, arguments)


def test_equal_logits_do_not_move_the_temperature():
    s, _, y = inputs(4, 50)
    T = torch.tensor(2.0, requires_grad=True)
    kd_loss(s, s, y, temperature=T, alpha=1.0, backend="cpu").backward()
    assert T.grad.abs() <= 1e-6


@pytest.mark.filterwarnings("ignore:kdkernels uses the slower reference")
@pytest.mark.parametrize(
    ("options", "beside"),
    [
        ({"standardize": True}, "standardize"),
        ({"logit_softcap": 5.0}, "logit_softcap"),
        ({"logit_scale": (1.0, 0.5)}, "logit_scale"),
        ({"taid": 0.5}, "taid"),
        ({"divergence": "dkd"}, "divergence dkd"),
        ({"divergence": "renyi", "divergence_alpha": 1.5}, "divergence_alpha >= 1 of renyi"),
        ({"logit_bias": torch.ones(5, dtype=torch.float64)}, "logit_bias"),
    ],
    ids=str,
)
def test_the_reference_serves_what_is_left_and_its_gradient_is_true(options, beside):
    s, t, y = inputs(3, 5, dtype=torch.float64)
    T = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    kd_loss(s, t, y, temperature=T, **options).backward()
    with pytest.raises(RuntimeError, match=f"that requires grad beside {beside}"):
        kd_loss(s, t, y, temperature=T, backend="cpu", **options)
    step = 1e-6
    above, below = (kd_loss(s, t, y, temperature=3.0 + d, **options) for d in (step, -step))
    torch.testing.assert_close(T.grad, (above - below) / (2 * step), rtol=1e-6, atol=1e-9)


@pytest.mark.filterwarnings("ignore:kdkernels uses the slower reference")
def test_of_a_top_k_teacher():
    s, t, y = inputs(3, 5, dtype=torch.float64)
    T = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    kd_loss(s, TopKTeacher.from_logits(t, 5), y, temperature=T).backward()
    with pytest.raises(RuntimeError, match="that requires grad beside a top-k teacher"):
        kd_loss(s, TopKTeacher.from_logits(t, 5), y, temperature=T, backend="cpu")
    expected = T.detach().requires_grad_()
    kd_loss(s, t, y, temperature=expected, backend="reference").backward()
    torch.testing.assert_close(T.grad, expected.grad)


def test_a_second_derivative_of_tensors_that_were_written_to_is_refused():
    s, t, y = inputs(3, 5, dtype=torch.float64)
    T = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    loss = kd_loss(s, t, y, temperature=T, backend="cpu")
    t.mul_(2)
    with pytest.raises(RuntimeError, match="have been modified"):
        torch.autograd.grad(loss, T, create_graph=True)
