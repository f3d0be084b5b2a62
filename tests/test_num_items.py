"""A mean over more than the rows of one call is a sum divided by the rows of all of them."""

import pytest
import torch
from formulas import INF
from oracle import oracle
from test_numerics import GRAD_BOUND, LOSS_BOUND, inputs

from kdkernels import FusedKDLoss, kd_loss

backend = pytest.mark.parametrize("backend", ["cpu", "reference"])


def batch(rows=6, classes=33, dtype=torch.float32):
    s, t, y = inputs(rows, classes, dtype=dtype)
    y[1], y[4] = -100, -100
    return s, t, y


def value_and_grad(s, t, y=None, **options):
    x = s.detach().requires_grad_()
    loss = kd_loss(x, t, y, **options)
    loss.sum().backward()
    return loss.detach(), x.grad


@backend
@pytest.mark.parametrize("dtype", GRAD_BOUND, ids=str)
def test_the_sum_of_the_rows_is_divided_by_it(backend, dtype):
    s, t, y = batch(dtype=dtype)
    loss, *_, grad = oracle(s, t, y, reduction="sum")
    got, x_grad = value_and_grad(s, t, y, backend=backend, num_items=7)
    assert abs(got - loss / 7) <= LOSS_BOUND * (1 + loss / 7)
    bound = GRAD_BOUND[dtype] if backend == "cpu" or dtype == torch.float64 else 1e-2
    assert (x_grad.double() - grad / 7).norm() <= bound * (grad / 7).norm()


@backend
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight": torch.rand(33, generator=torch.Generator().manual_seed(0)) + 0.5},
        {"label_smoothing": 0.1, "distill_ignored": True},
        {"divergence": "jsd", "temperature": 2.0},
        {"divergence": "dkd"},
        {"divergence": "nkd", "temperature": 2.0},
        {"temperature": [2.0, 4.0]},
        {"sample_weight": torch.arange(6.0)},
        {"agreement": 0.3},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_whatever_else_is_asked_for(backend, options):
    s, t, y = batch(dtype=torch.float64)
    loss, grad = value_and_grad(s, t, y, backend=backend, reduction="sum", **options)
    for given in (5, 5.0, torch.tensor(5), torch.tensor([5.0]), (5, torch.tensor(5.0))):
        got, x_grad = value_and_grad(s, t, y, backend=backend, num_items=given, **options)
        torch.testing.assert_close(got, loss / 5, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(x_grad, grad / 5, rtol=1e-11, atol=1e-14)


@backend
def test_each_term_has_its_own(backend):
    s, t, y = batch(dtype=torch.float64)
    options = {"distill_ignored": True, "backend": backend, "return_terms": True}
    summed = kd_loss(s, t, y, reduction="sum", **options)
    got = kd_loss(s, t, y, num_items=(12, 9), **options)
    assert abs(got.soft - summed.soft / 12) < 1e-12
    assert abs(got.hard - summed.hard / 9) < 1e-12
    assert abs(got.loss - (0.9 * got.soft + 0.1 * got.hard)) < 1e-12


@backend
def test_micro_batches_of_unequal_active_rows_add_up_to_the_batch(backend):
    s, t, y = inputs(9, 50, dtype=torch.float64)
    y[:3] = -100
    whole, grad = value_and_grad(s, t, y, backend=backend)
    x = s.clone().requires_grad_()
    total = 0
    for part in (slice(0, 4), slice(4, 5), slice(5, 9)):
        loss = kd_loss(x[part], t[part], y[part], num_items=(y != -100).sum(), backend=backend)
        loss.backward()
        total += loss.item()
    assert abs(total - whole) < 1e-13
    torch.testing.assert_close(x.grad, grad, rtol=1e-12, atol=1e-15)


@backend
def test_nothing_to_divide_by_is_zero(backend):
    s, t, y = batch()
    y[:] = -100
    loss, grad = value_and_grad(s, t, y, backend=backend, num_items=0)
    assert loss == 0
    assert not grad.any()


@backend
def test_a_learned_temperature(backend):
    s, t, y = batch(dtype=torch.float64)
    rates = []
    for options in ({"reduction": "sum"}, {"num_items": 5}):
        T = torch.tensor(2.0, requires_grad=True)
        kd_loss(s, t, y, temperature=T, backend=backend, **options).backward()
        rates.append(T.grad)
    torch.testing.assert_close(rates[1], rates[0] / 5)


@backend
def test_second_derivatives(backend):
    s, t, y = batch(5, 4, torch.float64)
    x = s.requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda x: kd_loss(x, t, y, num_items=5, backend=backend), (x,)
    )


def test_float16_gradients_survive_a_large_number():
    s, t, y = batch(8, 1000, torch.float16)
    _, *_, grad = oracle(s, t, y, reduction="sum")
    x = s.clone().requires_grad_()
    (kd_loss(x, t, y, num_items=100_000) * 2.0**16).backward()
    expected = grad / 100_000 * 2.0**16
    assert (x.grad.double() - expected).norm() <= GRAD_BOUND[torch.float16] * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_takes_no_pass_over_the_gradient(dtype):
    """What the forward has made is what the backward hands over."""
    s, t, y = batch(6, 200, dtype)
    with torch.profiler.profile() as seen:
        value_and_grad(s, t, y, num_items=5)
    assert {event.key for event in seen.key_averages()} & {"aten::mul_", "aten::mul"} == set()
    with torch.profiler.profile() as seen:
        value_and_grad(s, t, y, num_items=5, reduction="mean", backend="reference")
    assert any("mul" in event.key for event in seen.key_averages())  # or nothing is seen


def test_the_module_takes_it_beside_the_logits():
    s, t, y = batch()
    assert torch.equal(FusedKDLoss()(s, t, y, num_items=5), kd_loss(s, t, y, num_items=5))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled(dynamic):
    s, t, y = batch()
    loss_fn = torch.compile(FusedKDLoss(), fullgraph=True, dynamic=dynamic)
    graphs = torch._dynamo.utils.counters["stats"]
    for n in (5, 6, 7, torch.tensor(8)):
        x = s.clone().requires_grad_()
        loss = loss_fn(x, t, y, num_items=n)
        loss.backward()
        expected, grad = value_and_grad(s, t, y, num_items=n)
        torch.testing.assert_close(loss.detach(), expected, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(x.grad, grad, rtol=1e-5, atol=1e-8)
        if n == 6:
            before = graphs["unique_graphs"]
        if n == 7:
            assert graphs["unique_graphs"] == before, "one graph for each number"


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"num_items": -1}, ValueError, "num_items must be finite and >= 0, got -1"),
        ({"num_items": INF}, ValueError, "got inf"),
        ({"num_items": torch.tensor(-2)}, ValueError, "got -2"),
        ({"num_items": True}, TypeError, "num_items must be a number or a Tensor, got bool"),
        ({"num_items": "5"}, TypeError, "got str"),
        ({"num_items": torch.ones(2)}, ValueError, r"num_items must be one number, got shape \(2,"),
        ({"num_items": (1, 2, 3)}, ValueError, "got 3 values"),
        ({"num_items": 5, "reduction": "sum"}, ValueError, "num_items is of a mean"),
        ({"num_items": 5, "divergence": "dist"}, ValueError, "dist_gamma and num_items"),
        ({"group": object()}, TypeError, "group must be a process group or None, got object"),
        ({"group": object(), "reduction": "none"}, ValueError, "group is of a mean"),
    ],
)
def test_wrong_numbers_raise(options, error, text):
    with pytest.raises(error, match=text):
        kd_loss(*batch(), **options)
