"""Infinities, NaN, large offsets and empty batches: exact cases, not near-misses."""

import math

import pytest
import torch
import torch.nn.functional as F
from oracle import oracle

from kdkernels import kd_loss

INF = math.inf
# 5: less than a vector. 2049 and 5000: the first block of 2048 can be masked as a whole.
SIZES = [5, 40, 2049, 5000]
backends = pytest.mark.parametrize("backend", ["cpu", "reference"])
sizes = pytest.mark.parametrize("classes", SIZES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])


def inputs(n, c, dtype=torch.float32, scale=2.0):
    torch.manual_seed(c)
    s, t = torch.randn(2, n, c, dtype=torch.float64) * scale
    return s.to(dtype), t.to(dtype), torch.randint(c, (n,))


def value_and_grad(s, t, y=None, **options):
    x = s.clone().requires_grad_()
    loss = kd_loss(x, t, y, **options)
    loss.sum().backward()
    return loss.detach(), x.grad


@backends
@sizes
@dtypes
@pytest.mark.parametrize("pattern", ["leading", "all but one", "every third"])
def test_classes_masked_in_both_are_as_if_they_were_not_there(backend, classes, dtype, pattern):
    s, t, _ = inputs(3, classes, dtype)
    keep = torch.zeros(classes, dtype=torch.bool)
    if pattern == "leading":
        keep[-2:] = True
    elif pattern == "all but one":
        keep[classes // 2] = True
    else:
        keep[::3] = True
    y = torch.tensor([0, 1, 2]) % int(keep.sum())
    masked_s, masked_t = s.masked_fill(~keep, -INF), t.masked_fill(~keep, -INF)
    masked_y = keep.nonzero().flatten()[y]
    for temperature in (2.0, 1.3):
        loss, grad = value_and_grad(
            masked_s, masked_t, masked_y, temperature=temperature, backend=backend
        )
        expected, _, _, expected_grad = oracle(s[:, keep], t[:, keep], y, temperature=temperature)
        assert abs(loss.double() - expected) <= 2e-6 * (1 + abs(expected))
        assert (grad[:, ~keep] == 0).all()
        bound = 2.0**-8 if dtype == torch.bfloat16 else 2e-6
        error = (grad[:, keep].double() - expected_grad).norm()
        assert error <= bound * expected_grad.norm() + 1e-7


@backends
@sizes
def test_a_class_masked_in_the_teacher_has_no_mass_to_pass_on(backend, classes):
    s, t, y = inputs(3, classes)
    t[:, : classes // 2] = -INF
    loss, grad = value_and_grad(s, t, y, backend=backend)
    p, q = F.softmax(t.double() / 4, -1), F.softmax(s.double() / 4, -1)
    kept = slice(classes // 2, None)
    kl = (p[:, kept] * (p[:, kept].log() - q[:, kept].log())).sum(-1).mean()
    expected = 0.9 * 16 * kl + 0.1 * F.cross_entropy(s.double(), y)
    assert abs(loss.double() - expected) <= 2e-6 * (1 + expected)
    assert torch.isfinite(grad).all()
    assert (grad[:, : classes // 2] != 0).any()  # the student is still pushed off these classes


@backends
@sizes
@pytest.mark.parametrize("teacher_logit", [0.0, -500.0])  # -500: its probability underflows
def test_a_class_masked_in_the_student_alone_is_honestly_infinite(backend, classes, teacher_logit):
    s, t, y = inputs(2, classes)
    s[0, 1], y[0] = -INF, 0
    t[0, 1] = teacher_logit
    loss, grad = value_and_grad(s, t, y, backend=backend, reduction="none")
    assert loss[0] == INF
    assert torch.isfinite(loss[1])
    assert torch.isfinite(grad).all()  # q - p, with q = 0
    assert grad[0, 1] <= 0


@backends
@sizes
@pytest.mark.parametrize("bad", [math.nan, INF])
@pytest.mark.parametrize("where", ["student", "teacher"])
def test_nan_and_plus_infinity_come_out_as_nan_in_their_row_alone(backend, classes, bad, where):
    for position in {0, classes // 2, classes - 1}:
        s, t, y = inputs(3, classes)
        y[:] = (position + 1) % classes
        (s if where == "student" else t)[1, position] = bad
        loss, grad = value_and_grad(s, t, y, backend=backend, reduction="none", temperature=2.0)
        assert torch.isnan(loss).tolist() == [False, True, False]
        assert torch.isnan(grad).any(-1).tolist() == [False, True, False]
        assert torch.isnan(value_and_grad(s, t, y, backend=backend)[0])


@backends
@pytest.mark.parametrize("which", ["student", "teacher"])
def test_a_row_without_any_class_is_nan_and_not_zero(backend, which):
    s, t, y = inputs(2, 7)
    (s if which == "student" else t)[0] = -INF
    loss, _ = value_and_grad(s, t, y, backend=backend, reduction="none")
    assert torch.isnan(loss).tolist() == [True, False]


@sizes
@pytest.mark.parametrize("shift", [6e4, -6e4, 1e30])
def test_the_offset_of_a_row_is_exactly_nothing(classes, shift):
    torch.manual_seed(0)
    s, t = torch.randint(-8, 8, (2, 3, classes)).float()  # exact after the shift by 6e4
    y = torch.randint(classes, (3,))
    if abs(shift) > 1e6:  # all information is lost to rounding: a uniform row, and finite
        s, t = torch.zeros_like(s), torch.zeros_like(t)
    expected = value_and_grad(s, t, y)
    for shifted in ((s + shift, t), (s, t + shift), (s + shift, t - shift)):
        for got, want in zip(value_and_grad(*shifted, y), expected, strict=True):
            assert torch.equal(got, want)


@backends
@sizes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_logits_of_plus_and_minus_60000(backend, classes, dtype):
    s, t, y = inputs(3, classes, dtype)
    s[0, 0], s[1, 1], s[2, :] = 6e4, -6e4, -6e4
    t[0, 1], t[1, 0], t[2, :] = 6e4, -6e4, 6e4
    s[2, 0] = 6e4
    loss, grad = value_and_grad(s, t, y, backend=backend, temperature=2.0)
    expected, _, _, expected_grad = oracle(s, t, y, temperature=2.0)
    assert abs(loss.double() - expected) <= 2e-6 * (1 + abs(expected))
    bound = 2.0**-11 if dtype == torch.float16 else 2e-6
    assert (grad.double() - expected_grad).norm() <= bound * expected_grad.norm()


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_dtypes_lowest_number_masks_as_well(backend, dtype):
    lowest = torch.finfo(dtype).min
    s, t, y = inputs(3, 40, dtype)
    s[:, 20:], t[:, 20:], y = lowest, lowest, y % 20
    loss, grad = value_and_grad(s, t, y, backend=backend)
    expected = oracle(s[:, :20], t[:, :20], y)[0]
    assert abs(loss.double() - expected) <= 2e-6 * (1 + abs(expected))
    assert (grad[:, 20:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("temperature", [0.5, 1.0])  # at higher ones the loss exceeds float32
def test_the_lowest_number_in_the_student_alone_costs_what_it_costs(dtype, temperature):
    """It is finite: the loss is huge, and not that of some other large number."""
    lowest = torch.finfo(dtype).min if dtype != torch.float64 else -1e35
    s, t = torch.tensor([[lowest, 0, 1]], dtype=dtype), torch.zeros(1, 3, dtype=dtype)
    loss, grad = value_and_grad(s, t, temperature=temperature, alpha=1.0)
    expected, _, _, expected_grad = oracle(s, t, temperature=temperature, alpha=1.0)
    assert abs(loss.double() - expected) <= 2e-6 * expected
    bound = 2.0**-8 if dtype == torch.bfloat16 else 2e-6
    assert (grad.double() - expected_grad).norm() <= bound * expected_grad.norm()


@pytest.mark.parametrize("temperature", [0.05, 0.3, 0.9])
def test_spreads_beyond_e_to_the_104_keep_a_finite_gradient(temperature):
    """Probabilities below the smallest float32 (Liger-Kernel #1453); T = 0.05 (Soup #719)."""
    s, t, y = inputs(4, 300, scale=120.0)
    loss, grad = value_and_grad(s, t, y, temperature=temperature)
    expected, _, _, expected_grad = oracle(s, t, y, temperature=temperature)
    assert abs(loss.double() - expected) <= 2e-6 * (1 + abs(expected))
    assert torch.isfinite(grad).all()
    assert (grad.double() - expected_grad).norm() <= 2e-6 * expected_grad.norm()


@sizes
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("shift", [0.0, 0.37])
def test_equal_distributions_have_no_divergence(classes, temperature, shift):
    s, _, _ = inputs(6, classes)
    loss, grad = value_and_grad(s, s + shift, alpha=1.0, temperature=temperature, reduction="none")
    assert (loss >= 0).all()
    assert (loss <= 2e-6 * (1 if shift == 0 else temperature**2)).all()
    if shift == 0:
        assert (loss <= 1e-15).all()
        assert (grad == 0).all()


@backends
@pytest.mark.parametrize("junk", [math.nan, INF, -INF])
def test_ignored_rows_contribute_nothing_whatever_they_hold(backend, junk):
    s, t, y = inputs(6, 30)
    y[::2] = -100
    expected = value_and_grad(s[1::2], t[1::2], y[1::2], backend=backend)
    s[::2], t[::2] = junk, junk
    loss, grad = value_and_grad(s, t, y, backend=backend)
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=0)
    assert (grad[::2] == 0).all()
    torch.testing.assert_close(grad[1::2], expected[1], rtol=1e-6, atol=1e-9)


@backends
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_nothing_active_is_zero_with_a_zero_gradient(backend, reduction, rows):
    s = torch.full((rows, 8), math.nan)
    y = torch.full((rows,), -100)
    loss, grad = value_and_grad(s, s, y, backend=backend, reduction=reduction)
    assert (loss == 0).all()
    assert loss.shape == ((rows,) if reduction == "none" else ())
    assert grad.shape == s.shape
    assert (grad == 0).all()


@backends
def test_active_rows_without_weight_have_no_mean_and_give_zero(backend):
    s, t, y = inputs(4, 3)
    loss, grad = value_and_grad(s, t, y, weight=torch.zeros(3), alpha=0.0, backend=backend)
    assert loss == 0
    assert (grad == 0).all()


@backends
def test_a_term_of_weight_zero_is_no_part_of_the_loss(backend):
    s, t, y = inputs(4, 20)
    loss, grad = value_and_grad(s, torch.full_like(t, math.nan), y, alpha=0.0, backend=backend)
    expected = oracle(s, t, y, alpha=0.0)
    assert abs(loss.double() - expected[0]) <= 2e-6 * (1 + expected[0])
    assert (grad.double() - expected[3]).norm() <= 2e-6 * expected[3].norm()
    s[0, 3], y[0] = -INF, 3  # an infinite cross entropy
    t[0, 3] = -INF
    assert torch.isfinite(value_and_grad(s, t, y, alpha=1.0, backend=backend)[0])
