"""The Triton backend without a GPU: what it computes, by Triton's interpreter, and what it compiles
to, ahead of time.

The interpreter has to be chosen before Triton is imported, so everything marked ``interpreted``
runs in a process of its own, which conftest.py starts and ``test_under_the_interpreter`` waits for.
To see one of them alone: ``TRITON_INTERPRET=1 pytest tests/test_triton.py -k name``.
"""

import functools
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile

import pytest
import torch
from comparing import assert_close, assert_same_bits, value_and_grad
from oracle import oracle
from targets import TARGETS, if_asked
from test_numerics import GRAD_BOUND, LOSS_BOUND, check, inputs

from kdkernels import backends, kd_loss

INF, NAN = math.inf, math.nan
value_and_grad = functools.partial(value_and_grad, "triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="runs in a process of its own, by test_under_the_interpreter"
)
compiled = pytest.mark.skipif(
    INTERPRETED or importlib.util.find_spec("triton") is None, reason="Triton is not to compile"
)
# The interpreter is NumPy, which warns of what the kernel then replaces.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

DTYPES = list(GRAD_BOUND)
REDUCTIONS = ["mean", "sum", "none"]
# A tile of several rows, 1 to 64 classes; a warp to a row, to 256; a row in registers, to 4096;
# blocks of 1024 from there on. In double: tiles of several to 64, then blocks of 1024, or of 512
# where a row is done again.
SIZES = [1, 2, 3, 10, 64, 65, 100, 257, 1000, 1423, 4096, 4097, 6145]
ONE_OF_EACH = [10, 100, 1423, 5000]
one_of_each = pytest.mark.parametrize("classes", ONE_OF_EACH)


# --- the numbers ----------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("classes", SIZES)
def test_float32_at_every_size(classes):
    # 4 shares an exponential between the terms, 1.7 does not; three rows of a tile of four.
    for temperature, scale in ((4.0, 1.0), (1.7, 8.0)):
        check(*inputs(3, classes, scale), backend="triton", temperature=temperature)


@interpreted
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 3.0, 6.0, 20.0])
def test_float32_at_every_temperature(temperature):
    """At 20 every row is done again in double."""
    for classes in (3, 100, 5000):
        check(*inputs(2, classes), backend="triton", temperature=temperature)


@interpreted
@pytest.mark.parametrize("student_dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
def test_every_mix_of_dtypes(student_dtype, teacher_dtype):
    for classes in (3, 129):
        s, t, y = inputs(3, classes)
        s, t = s.to(student_dtype), t.to(teacher_dtype)
        check(s, t, y, backend="triton", temperature=2.5)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_in_blocks(dtype):
    check(*inputs(2, 4500, dtype=dtype), backend="triton", temperature=2.0)


@interpreted
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("distill_ignored", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
def test_every_option_of_the_cross_entropy(reduction, distill_ignored, weighted, label_smoothing):
    for dtype, (n, c) in ((torch.float32, (9, 10)), (torch.float64, (3, 300))):
        s, t, y = inputs(n, c, dtype=dtype)
        y[1::3] = -100
        weight = torch.rand(c, dtype=dtype) + 0.5 if weighted else None
        check(
            s,
            t,
            y,
            "triton",
            reduction=reduction,
            distill_ignored=distill_ignored,
            weight=weight,
            label_smoothing=label_smoothing,
        )


@interpreted
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_every_share_of_the_terms(alpha):
    for classes in (10, 5000):
        s, t, y = inputs(3, classes)
        check(s, t, y, "triton", alpha=alpha, temperature=3.0)
        weight = torch.rand(classes) + 0.5
        check(s, t, y, "triton", alpha=alpha, weight=weight, label_smoothing=0.2)


@interpreted
def test_without_labels():
    for reduction, classes in itertools.product(REDUCTIONS, (10, 5000)):
        s, t, _ = inputs(3, classes)
        check(s, t, None, "triton", alpha=1.0, reduction=reduction)


@interpreted
def test_weights_and_smoothing_in_blocks():
    s, t, y = inputs(2, 5000)
    y[0] = -100
    for weight in (None, torch.rand(5000, dtype=torch.float16) + 0.5):
        check(s, t, y, "triton", weight=weight, label_smoothing=0.1, distill_ignored=True)


@interpreted
def test_many_rows_are_counted_and_added_up_by_several_programs(monkeypatch):
    from kdkernels.backends import triton as backend

    monkeypatch.setattr(backend, "SHARE", 7)
    s, t, y = inputs(30, 5)
    y[::4] = -100
    for reduction, weight in itertools.product(("mean", "sum"), (None, torch.rand(5) + 0.5)):
        check(s, t, y, "triton", reduction=reduction, weight=weight)


@interpreted
@pytest.mark.parametrize("classes", [3, 10, 100, 5000])
def test_a_gradient_of_differences_keeps_its_digits(classes):
    """Confident rows: p, q and r are all near 1 at one class, and q - p and r - 1 cancel."""
    for confidence in (5.0, 12.0, 25.0):
        s, t, y = inputs(3, classes, 1.0)
        rows = torch.arange(3)
        s[rows, y] += confidence + s.max()
        t[rows, y] += confidence + t.max()
        y[2] = (y[2] + 1) % classes  # sure, and wrong
        for temperature in (1.0, 2.5):
            truth = oracle(s, t, y, temperature=temperature)[3]
            grad = value_and_grad(s, t, y, temperature=temperature)[3]
            # At the sure class the oracle itself cancels; a row's gradient adds up to zero.
            sure = s.argmax(-1)
            truth[rows, sure] = 0.0
            truth[rows, sure] = -truth.sum(-1)
            assert_close(grad, truth)


@interpreted
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("classes", [2, 100, 5000])
def test_a_student_close_to_its_teacher_still_gets_a_gradient(classes, inplace):
    """q - p is a small difference of exponentials: float32 alone would leave 1e-7 / |q - p|."""
    for distance, temperature, alpha in ((1e-2, 4.0, 1.0), (1e-5, 2.0, 1.0), (1e-4, 20.0, 0.9)):
        _, t, y = inputs(3, classes)
        s = t + distance * inputs(3, classes, 1.0, seed=1)[0]
        s[1] = t[1] + 1.0  # the same distribution: exactly no divergence
        options = {"temperature": temperature, "alpha": alpha}
        loss, _, _, truth = oracle(s, t, y, **options)
        x = s.clone().requires_grad_()
        got = kd_loss(x * 1, t, y, inplace=inplace, backend="triton", **options)
        got.backward()
        assert abs(got.double() - loss) <= LOSS_BOUND * (1 + loss)
        for row in (0, 2):
            error = (x.grad[row].double() - truth[row]).norm()
            assert error <= GRAD_BOUND[torch.float32] * truth[row].norm() + 1e-12


@interpreted
@pytest.mark.parametrize("label_smoothing", [0.1, 1.0])
def test_a_student_that_has_learnt_its_smoothed_labels_still_gets_a_gradient(label_smoothing):
    """Sizes: with and without classes beyond the row in a tile."""
    for classes in (8, 40):
        _, noise, y = inputs(1, classes)
        target = torch.full((1, classes), label_smoothing / classes)
        target[0, y] += 1 - label_smoothing
        s = target.log() + 0.01 * noise
        options = {"alpha": 0.0, "label_smoothing": label_smoothing}
        assert_close(value_and_grad(s, s, y, **options)[3], oracle(s, s, y, **options)[3])


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [10, 5000])
def test_asking_for_the_gradient_or_the_terms_changes_no_bit_of_the_loss(dtype, classes):
    s, t, y = inputs(3, classes)
    s, t = (s + t).to(dtype), t.to(dtype)
    for temperature in (2.0, 3.5, 17.0):
        options = {"temperature": temperature, "reduction": "none", "backend": "triton"}
        terms = kd_loss(s, t, y, return_terms=True, **options)
        del options["backend"]
        assert_same_bits(value_and_grad(s, t, y, **options)[:3], terms)
        assert torch.equal(kd_loss(s, t, y, backend="triton", **options), terms.loss)


@interpreted
def test_the_same_inputs_give_the_same_bits():
    s, t, y = inputs(5, 300)
    assert_same_bits(value_and_grad(s, t, y), value_and_grad(s, t, y))


@interpreted
def test_a_float16_gradient_survives_its_subnormals():
    s, t, y = inputs(64, 1000, 1.0, torch.float16)
    _, _, _, truth = oracle(s, t, y)
    assert truth.abs().median() < 2.0**-14  # below the smallest normal float16
    x = s.clone().requires_grad_()
    (kd_loss(x, t, y, backend="triton") * 65536).backward()
    assert (x.grad.double() / 65536 - truth).norm() <= 2.0**-11 * truth.norm()


@interpreted
@pytest.mark.parametrize("classes", [10, 300, 3000])
def test_asking_for_a_gradient_leaves_the_loss_alone(classes):
    """Not one bit of it, where the gradient alone has to be done again in double."""
    s, t, _ = inputs(4, classes)
    near = s + 1e-3 * t
    options = {"alpha": 1.0, "temperature": 1.0, "reduction": "none", "backend": "triton"}
    with torch.no_grad():
        alone = kd_loss(near, s, **options)
    assert torch.equal(kd_loss(near.requires_grad_(), s, **options).detach(), alone)


@interpreted
def test_a_large_class_weight_does_not_push_a_float16_gradient_out_of_range():
    """It is scaled by what its largest entry may be, and the largest weight is part of that."""
    s, t, y = inputs(4, 10, dtype=torch.float16)
    weight = torch.ones(10)
    weight[y[0]] = 2e5
    options = {"reduction": "sum", "weight": weight}
    assert_close(value_and_grad(s, t, y, **options)[3], oracle(s, t, y, **options)[3])


# --- exact cases ----------------------------------------------------------------------------------


@interpreted
@one_of_each
@pytest.mark.parametrize("pattern", ["leading", "all but one"])
def test_classes_masked_in_both_are_as_if_they_were_not_there(classes, pattern):
    s, t, _ = inputs(2, classes)
    keep = torch.zeros(classes, dtype=torch.bool)
    keep[-2:] = pattern == "leading"
    keep[classes // 2] |= pattern == "all but one"
    kept = keep.nonzero().flatten()
    y = torch.tensor([0, 1]) % len(kept)
    masked = [v.masked_fill(~keep, -INF) for v in (s, t)]
    for temperature in (2.0, 1.3):
        loss, _, _, grad = value_and_grad(*masked, kept[y], temperature=temperature)
        expected, _, _, truth = oracle(s[:, keep], t[:, keep], y, temperature=temperature)
        assert abs(loss.double() - expected) <= LOSS_BOUND * (1 + expected)
        assert (grad[:, ~keep] == 0).all()
        assert_close(grad[:, keep], truth)


@interpreted
@one_of_each
def test_a_class_masked_in_one_of_both(classes):
    s, t, y = inputs(3, classes)
    y[:] = classes - 1
    t[0, : classes // 2] = -INF  # no mass to pass on
    s[1, 1] = -INF  # honestly infinite
    s[2, 1], t[2, 1] = -INF, -500.0  # even where the teacher's probability underflows
    soft, grad = (value_and_grad(s, t, y, reduction="none")[k] for k in (1, 3))
    expected, truth = (oracle(s[:1], t[:1], y[:1], reduction="none")[k] for k in (1, 3))
    assert abs(soft[0].double() - expected) <= LOSS_BOUND * (1 + expected)
    assert_close(grad[:1], truth)
    assert soft[1:].tolist() == [INF, INF]
    assert torch.isfinite(grad).all()
    assert (grad[1:, 1] <= 0).all()


@interpreted
@one_of_each
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("where", [0, 1])
def test_nan_and_plus_infinity_come_out_as_nan_in_their_row_alone(classes, bad, where):
    for position in {0, classes // 2, classes - 1}:
        logits = inputs(3, classes)
        logits[2][:] = (position + 1) % classes
        logits[where][1, position] = bad
        loss, _, _, grad = value_and_grad(*logits, reduction="none", temperature=2.0)
        assert torch.isnan(loss).tolist() == [False, True, False]
        assert torch.isnan(grad).any(-1).tolist() == [False, True, False]


@interpreted
def test_plus_infinity_without_a_divergence_is_nan_too():
    s, t, y = inputs(3, 7)
    s[1, 2], y[1] = INF, 3
    loss, _, _, grad = value_and_grad(s, t, y, reduction="none", alpha=0.0)
    assert torch.isnan(loss).tolist() == [False, True, False]
    assert torch.isnan(grad).any(-1).tolist() == [False, True, False]


@interpreted
@pytest.mark.parametrize("which", [0, 1])
def test_a_row_without_any_class_is_nan_and_not_zero(which):
    logits = inputs(2, 7)
    logits[which][0] = -INF
    loss = kd_loss(*logits, reduction="none", backend="triton")
    assert torch.isnan(loss).tolist() == [True, False]


@interpreted
@one_of_each
@pytest.mark.parametrize("shift", [6e4, -6e4, 1e30])
def test_the_offset_of_a_row_is_exactly_nothing(classes, shift):
    torch.manual_seed(0)
    s, t = torch.randint(-8, 8, (2, 2, classes)).float()  # exact after the shift by 6e4
    y = torch.randint(classes, (2,))
    if abs(shift) > 1e6:  # all information is lost to rounding: a uniform row, and finite
        s, t = torch.zeros_like(s), torch.zeros_like(t)
    expected = value_and_grad(s, t, y)
    for shifted in ((s + shift, t), (s + shift, t - shift)):
        assert_same_bits(value_and_grad(*shifted, y), expected)


@interpreted
@one_of_each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_logits_of_plus_and_minus_60000(classes, dtype):
    s, t, y = inputs(3, classes, 2.0, dtype)
    s[0, 0], s[1, 1], s[2, :] = 6e4, -6e4, -6e4
    t[0, 1], t[1, 0], t[2, :] = 6e4, -6e4, 6e4
    s[2, 0] = 6e4
    check(s, t, y, "triton", temperature=2.0)


@interpreted
def test_the_lowest_number():
    """It masks where both have it; in the student alone it costs what it costs, which is finite."""
    lowest = torch.finfo(torch.float32).min
    s, t, y = inputs(2, 40)
    s[:, 20:], t[:, 20:], y = lowest, lowest, y % 20
    loss, _, _, grad = value_and_grad(s, t, y)
    expected = oracle(s[:, :20], t[:, :20], y)[0]
    assert abs(loss.double() - expected) <= LOSS_BOUND * (1 + expected)
    assert (grad[:, 20:] == 0).all()
    s, t = torch.tensor([[lowest, 0, 1]]), torch.zeros(1, 3)
    check(s, t, None, "triton", temperature=0.5, alpha=1.0)


@interpreted
@pytest.mark.parametrize("temperature", [0.05, 0.9])
def test_spreads_beyond_e_to_the_104_keep_a_finite_gradient(temperature):
    check(*inputs(3, 300, 120.0), backend="triton", temperature=temperature)


@interpreted
@one_of_each
@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_equal_distributions_have_no_divergence(classes, temperature):
    s, _, _ = inputs(3, classes)
    for shift in (0.0, 0.37):
        loss, _, _, grad = value_and_grad(
            s, s + shift, alpha=1.0, temperature=temperature, reduction="none"
        )
        assert (loss >= 0).all()
        assert (loss <= (1e-15 if shift == 0 else 2e-6 * temperature**2)).all()
        assert shift != 0 or (grad == 0).all()


@interpreted
@pytest.mark.parametrize("junk", [NAN, INF, -INF])
def test_ignored_rows_contribute_nothing_whatever_they_hold(junk):
    for classes in (30, 5000):
        s, t, y = inputs(5, classes)
        y[::2] = -100
        expected = value_and_grad(s[1::2], t[1::2], y[1::2])
        s[::2], t[::2] = junk, junk
        *terms, grad = value_and_grad(s, t, y)
        assert_same_bits(terms, expected[:3])
        assert (grad[::2] == 0).all()
        assert torch.equal(grad[1::2], expected[3])


@interpreted
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_nothing_active_is_zero_with_a_zero_gradient(reduction, rows):
    s = torch.full((rows, 8), NAN)
    y = torch.full((rows,), -100)
    loss, soft, hard, grad = value_and_grad(s, s, y, reduction=reduction)
    for term in (loss, soft, hard):
        assert term.shape == ((rows,) if reduction == "none" else ())
        assert (term == 0).all()
    assert grad.shape == s.shape
    assert (grad == 0).all()


@interpreted
def test_active_rows_without_weight_have_no_mean_and_give_zero():
    s, t, y = inputs(4, 3)
    loss, _, _, grad = value_and_grad(s, t, y, weight=torch.zeros(3), alpha=0.0)
    assert loss == 0
    assert (grad == 0).all()


@interpreted
def test_a_term_of_weight_zero_is_no_part_of_the_loss():
    s, t, y = inputs(4, 20)
    loss, _, _, grad = value_and_grad(s, torch.full_like(t, NAN), y, alpha=0.0)
    expected = oracle(s, t, y, alpha=0.0)
    assert abs(loss.double() - expected[0]) <= LOSS_BOUND * (1 + expected[0])
    assert_close(grad, expected[3])
    s[0, 3], t[0, 3], y[0] = -INF, -INF, 3  # an infinite cross entropy
    loss, _, hard, grad = value_and_grad(s, t, y, alpha=1.0)
    assert torch.isfinite(loss)
    assert hard == INF
    x = s.clone().requires_grad_()
    kd_loss(x, t, y, alpha=1.0, backend="triton").backward()
    assert torch.equal(grad, x.grad)  # logged or not, it leaves no trace


@interpreted
@pytest.mark.parametrize("label", [-1, 12, 2**40])
def test_a_label_out_of_range_makes_its_row_nan_and_reads_nothing(label):
    for classes, weighted in ((12, False), (12, True)):
        s, t, y = inputs(4, classes)
        weight = torch.rand(classes) + 0.5 if weighted else None
        expected = value_and_grad(s, t, y, reduction="none", weight=weight)
        y[2] = label
        got = value_and_grad(s, t, y, reduction="none", weight=weight)
        for k, name in enumerate(("loss", "soft", "hard", "grad")):
            good = [0, 1, 2, 3] if name == "soft" else [0, 1, 3]
            assert torch.equal(got[k][good], expected[k][good])
            assert name == "soft" or torch.isnan(got[k][2]).all()
        for reduction in ("mean", "sum"):
            assert torch.isnan(kd_loss(s, t, y, reduction=reduction, backend="triton"))
        # Nothing that is asked for depends on it.
        assert torch.isfinite(value_and_grad(s, t, y, alpha=1.0)[3]).all()


@interpreted
def test_labels_are_looked_at_on_request(monkeypatch):
    monkeypatch.setenv("KDKERNELS_CHECK_LABELS", "1")
    s, t, y = inputs(4, 5)
    y[2] = 5
    with pytest.raises(IndexError, match=r"labels\[2\] is 5"):
        kd_loss(s, t, y, backend="triton")


# --- layouts --------------------------------------------------------------------------------------

C = 37
LAYOUTS = {
    "vector": lambda: inputs(1, C)[0][0],
    "(B, L, C)": lambda: inputs(6, C)[0].view(2, 3, C),
    "every other row": lambda: inputs(12, C)[0][::2],
    "padded vocabulary": lambda: inputs(6, C + 27)[0][:, :C],
    "offset": lambda: inputs(6, C + 27)[0][:, 9:-18],
    "causal shift": lambda: inputs(12, C)[0].view(3, 4, C)[:, :-1],
    "transposed batch": lambda: inputs(12, C)[0].view(4, 3, C).transpose(0, 1),
    "a row for all": lambda: inputs(1, C)[0].expand(6, C),
    "transposed": lambda: inputs(C, 6)[0].t(),
    "every other class": lambda: inputs(6, 2 * C)[0][:, ::2],
    "one class of many": lambda: inputs(6, C)[0][:, 5:6],
}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@interpreted
@layouts
def test_the_layout_changes_no_bit(layout):
    s = layout()
    t = torch.flip(s, (-1,)).contiguous() * 0.7
    y = torch.arange(s.shape[:-1].numel()).view(s.shape[:-1]) % s.shape[-1]
    expected = value_and_grad(s.contiguous(), t, y, reduction="none")
    assert_same_bits(value_and_grad(s, t, y, reduction="none"), expected)
    strided = layout().copy_(t) if s.stride(0) else t
    assert_same_bits(value_and_grad(s, strided, y, reduction="none"), expected)


@interpreted
@pytest.mark.parametrize("name", [n for n in LAYOUTS if n not in ("a row for all", "vector")])
def test_in_place_the_gradient_takes_the_place_of_the_logits_and_of_nothing_else(name):
    s = LAYOUTS[name]()
    t = torch.flip(s, (-1,)).contiguous() * 0.7
    y = torch.arange(s.shape[:-1].numel()).view(s.shape[:-1]) % s.shape[-1]
    expected = value_and_grad(s.contiguous(), t, y)[3]
    base = s._base if s._base is not None else s
    around = base.clone()
    around.as_strided(s.shape, s.stride(), s.storage_offset()).copy_(expected * 3)
    x = s.detach().requires_grad_()
    logits = x.view_as(x)
    with torch.no_grad():
        # Straight to the backend: autograd would refuse logits that are a view of a leaf.
        from kdkernels.options import Options

        options = Options(4.0, 0.9, -100, 0.0, "mean", False)
        backend = backends.BACKENDS["triton"]
        result = backend.run(logits.detach(), t, y, None, options, False, True, True, {})
        backend.scale(result.grad, torch.tensor(3.0), result.grad_scale)
    assert torch.equal(base, around)


@interpreted
@pytest.mark.parametrize("classes", [10, 5000])
def test_in_place_through_autograd(classes):
    s, t, y = inputs(3, classes)
    expected = value_and_grad(s, t, y)
    x = s.clone().requires_grad_()
    logits = x * 1
    loss = kd_loss(logits, t, y, inplace=True, backend="triton")
    loss.backward()
    assert torch.equal(loss.detach(), expected[0])
    assert torch.equal(x.grad, expected[3])
    assert torch.equal(logits.detach(), x.grad)


@interpreted
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_labels_of_any_integer_type_and_layout(dtype):
    s, t, y = inputs(6, 20)
    expected = value_and_grad(s, t, y)
    assert_same_bits(value_and_grad(s, t, y.to(dtype)), expected)
    strided = torch.stack([y, y + 1], -1).to(dtype)[:, 0]
    assert_same_bits(value_and_grad(s, t, strided), expected)


# --- the backward ---------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_flows_in_multiplies_the_gradient(dtype):
    s, t, y = inputs(5, 40, dtype=dtype)
    y[3] = -100
    for factor in (1.0, 65536.0, -0.3, 0.0):
        # float16: out of its subnormals, whatever flows in.
        truth = oracle(s, t, y)[3] * torch.tensor(factor).double()
        grad = value_and_grad(s, t, y, torch.tensor(factor))[3]
        error = (grad.double() - truth).norm()
        subnormal = 2.0**-25 * math.sqrt(grad.numel()) if dtype == torch.float16 else 0
        assert error <= (GRAD_BOUND[dtype] * 2) * truth.norm() + subnormal + 1e-30


@interpreted
def test_each_row_gets_its_own_factor():
    s, t, y = inputs(6, 10)
    s, t, y = s.view(2, 3, 10), t.view(2, 3, 10), y.view(2, 3)
    truth = oracle(s, t, y, reduction="none")[3]
    generator = torch.Generator().manual_seed(1)
    for factors in (
        torch.randn(2, 3, generator=generator),
        torch.randn(3, 2, generator=generator).t(),
        torch.randn(2, 6, generator=generator)[:, ::2],
        torch.tensor(65536.0).expand(2, 3),
        torch.randn(2, 1, generator=generator).expand(2, 3),
    ):
        grad = value_and_grad(s, t, y, factors, reduction="none")[3]
        assert_close(grad, truth * factors[..., None].double())


@interpreted
def test_a_factor_may_be_of_any_type():
    """Autograd converts it on the way; the backend does not rely on that."""
    grad = torch.randn(4, 6)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        factors = torch.tensor([1.0, 2.0, -4.0, 0.5], dtype=dtype)
        got = backends.BACKENDS["triton"].scale(grad.clone(), factors, torch.tensor([2.0]).double())
        assert torch.equal(got, grad * factors.float()[:, None] / 2)


@interpreted
def test_a_factor_of_one_leaves_memory_alone():
    """Not even NaN is rewritten: what is there keeps its bits."""
    bits = torch.tensor([[0x7FC00001, 0x3F800000]], dtype=torch.int32)
    grad = bits.view(torch.float32)
    backends.BACKENDS["triton"].scale(grad, torch.tensor(1.0), 1.0)
    assert bits[0, 0] == 0x7FC00001
    factors = torch.tensor([8.0])
    backends.BACKENDS["triton"].scale(grad, factors, torch.tensor([8.0]).double())
    assert bits[0, 0] == 0x7FC00001


@interpreted
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_an_infinite_factor_leaves_rows_without_a_gradient_without(layout):
    s, t, y = inputs(4, 5)
    y[1] = -100
    for reduction in REDUCTIONS:
        loss = oracle(s, t, y, reduction=reduction)[0]
        incoming = torch.full(loss.shape, INF)
        grad = value_and_grad(s, t, y, incoming, reduction=reduction)[3]
        assert (grad[1] == 0).all()
        assert torch.isinf(grad[[0, 2, 3]]).all()
    grad = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    grad = grad if layout == "contiguous" else grad.t().contiguous().t()
    backends.BACKENDS["triton"].scale(grad, torch.tensor(INF), 1.0)
    assert grad.tolist() == [[INF, 0.0], [0.0, INF], [INF, 0.0]]


@interpreted
def test_a_graph_that_is_kept_gives_its_gradient_twice():
    s, t, y = inputs(3, 10)
    x = s.clone().requires_grad_()
    loss = kd_loss(x, t, y, backend="triton")
    (first,) = torch.autograd.grad(loss * 3, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(first, 3 * second)
    assert_close(second, oracle(s, t, y)[3])


@interpreted
def test_the_second_derivative_is_there():
    s, t, y = inputs(2, 4, dtype=torch.float64)
    x = s.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: kd_loss(x, t, y, backend="triton"), x)
    assert torch.autograd.gradgradcheck(
        lambda x: kd_loss(x, t, y, backend="triton"), x, fast_mode=True
    )


# --- what is available ----------------------------------------------------------------------------


@interpreted
def test_the_interpreter_says_that_it_is_one_and_is_only_taken_by_name():
    backend = backends.BACKENDS["triton"]
    assert backend.unavailable() is None
    assert "interpreter" in backend.details()
    assert "TRITON_INTERPRET" in backend.why_not(torch.device("cuda"), torch.float32, torch.float32)
    assert backends.select(None, torch.device("cpu"), torch.float32, torch.float32).name == "cpu"


def run_python(script, *arguments, **environment):
    environment = os.environ | environment
    if environment.get("TRITON_INTERPRET") == "":
        del environment["TRITON_INTERPRET"]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_triton_is_imported_when_it_is_needed_and_not_before():
    run_python("import sys, kdkernels; assert 'triton' not in sys.modules")


def test_a_missing_triton_says_how_to_get_it():
    reason = run_python(
        "import sys; sys.modules['triton'] = None\n"
        "from kdkernels.backends.triton import TritonBackend\n"
        "print(TritonBackend().unavailable())"
    )
    assert "pip install 'kdkernels[triton]'" in reason


@compiled
def test_an_installed_triton_is_not_enough_without_a_gpu():
    """pytorch PR #197476."""
    if torch.cuda.is_available() or torch.xpu.is_available():
        pytest.skip("there is a GPU")
    reason = run_python(
        "from kdkernels.backends.triton import TritonBackend\n"
        "import torch; kinds = torch.float32, torch.float32\n"
        "print(TritonBackend().unavailable())\n"
        "print(TritonBackend().why_not(torch.device('cuda'), *kinds))"
    )
    assert reason.count("finds no GPU") == 2


@pytest.fixture
def interpreter_run(beside):
    return beside["interpreter"].result()


@pytest.fixture
def compiled_for(beside):
    """What became of the kernels for a target."""
    return lambda target: beside[target].result()


@compiled
def test_under_the_interpreter(interpreter_run):
    assert interpreter_run.returncode == 0, interpreter_run.stdout[-5000:]
    print(interpreter_run.stdout[-300:])


# --- what it compiles to --------------------------------------------------------------------------

# Everything is launched as on a GPU, by the backend's own code, up to where the device would start:
# a driver that only names a target makes Triton compile, and CPU tensors give addresses and
# strides. Prints what became of each kernel.
COMPILE_SCRIPT = r"""
import contextlib, io, json, re, subprocess, sys, tempfile, types
from pathlib import Path
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from kdkernels.backends import triton as backend, triton_kernels
from kdkernels.backends.triton_mixture import WEIGHTS
from kdkernels.divergences import Term
from kdkernels.options import Options
from kdkernels.teachers import TopKTeacher

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TARGET = TARGETS[sys.argv[1]]

class Driver:
    def get_current_target(self):
        return TARGET
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0

driver.set_active(Driver())
triton.knobs.nvidia.dump_ptxas_log = True
compiled = []
spilled = {}  # by kernel; a stack need not be a spill, so ptxas is asked

class Compiling:
    def __init__(self, kernel):
        self.kernel = kernel
    def __getitem__(self, grid):
        def launch(*arguments, **options):
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                kernel = self.kernel.warmup(*arguments, grid=grid, **options)
            for stored in re.findall(r"(\d+) bytes spill stores", said.getvalue()):
                spilled[kernel.hash] = int(stored)
            compiled.append((self.kernel.__name__, kernel))
        return launch

kernels = types.SimpleNamespace(**vars(triton_kernels))
for name in dir(triton_kernels):
    if name.endswith("_kernel"):
        setattr(kernels, name, Compiling(getattr(triton_kernels, name)))
backend._kernels = lambda: kernels

def resources(kernel):
    found = {"shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps}
    if TARGET.backend == "hip":
        for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count",
                     "private_segment_fixed_size"):
            found[name] = int(re.search(rf"\.{name}:\s+(\d+)", kernel.asm["amdgcn"])[1])
        wide = r"(?:global|buffer)_load_dwordx4"
        found["wide_loads"] = len(re.findall(wide, kernel.asm["amdgcn"]))
        return found
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True).stdout
    pattern = r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)"
    registers, stack, local = re.search(pattern, usage).groups()
    found |= {"registers": int(registers), "stack": int(stack), "spilled": spilled[kernel.hash]}
    found["wide_loads"] = len(re.findall(
        r"ld\.global[a-z:_0-9.]*\.(?:v4\.b32|v2\.b64)", kernel.asm["ptx"]))
    return found

PLAIN = Options(4.0, 0.9, -100, 0.0, "mean", False)
FULL = Options(2.5, 0.9, -100, 0.1, "mean", True)
results = []
def launch(case, classes, dtype, options, weight=None, inplace=False, rows=4, labels=True,
           per_row=(), bucket=0):
    compiled.clear()
    s, t = (torch.zeros(rows, classes, dtype=dtype) for _ in range(2))
    y = torch.zeros(rows, dtype=torch.long) if labels else None
    one = backend.TritonBackend()
    tensors = dict.fromkeys(per_row, torch.ones(rows))
    if bucket:
        t = TopKTeacher(*t.float().topk(bucket), "bucket", options.temperature)
    result = one.run(s, t, y, weight, options, False, True, inplace, tensors)
    one.scale(result.grad, torch.tensor(1.0), result.grad_scale)
    for name, kernel in compiled:
        results.append({"case": case, "kernel": name, "classes": classes, "dtype": str(dtype)[6:],
                        "hash": kernel.hash, **resources(kernel)})

SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 32000)  # a size of every compiled shape
if sys.argv[1] != "sm_90":
    SIZES = (16, 64, 256, 4096, 32000)  # and of every line of the table: compiling takes its time
# Every divergence at once, which takes the most registers, one of them, and the decoupled one: in
# all regimes between them.
if sys.argv[1] != "sm_80":
    every = PLAIN._replace(divergence=tuple(Term(name, 1.0, 0.5) for name in WEIGHTS))
    for classes, dtype in ((256, torch.float32), (32000, torch.bfloat16), (32000, torch.float64)):
        launch("mixture", classes, dtype, every)
    one = PLAIN._replace(divergence=(Term("jsd", 1.0, 0.5),))
    for classes, dtype in ((16, torch.float32), (1024, torch.float16)):
        launch("jsd", classes, dtype, one)
    launch("jsd", 31999, torch.float32, one, inplace=True, per_row=("jsd", "beta"))
    decoupled = PLAIN._replace(divergence=(Term("dkd", 1.0, 1.0, 8.0),))
    for classes in (64, 1024, 32000):
        launch("decoupled", classes, torch.float32, decoupled)
# The general kernel has one shape, but for rows of few classes.
if sys.argv[1] != "sm_80":
    several = PLAIN._replace(z_loss=0.1, metrics=True)
    launch("general", 10, torch.float32, several)
    launch("general", 31999, torch.bfloat16, several, torch.ones(31999), True,
           per_row=("sample_weight", "temperature"))
    launch("general", 32000, torch.float16, several, bucket=40)
for classes in SIZES:
    for dtype in (torch.float32, torch.bfloat16):
        launch("plain", classes, dtype, PLAIN)
for classes in (64, 1024, 32000):
    launch("unaligned", classes - 1, torch.float32, PLAIN)
for classes in (16, 128, 1024, 32000) if sys.argv[1] == "sm_90" else (16, 32000):
    launch("double", classes, torch.float64, PLAIN)
    weight = torch.ones(classes - 1)
    launch("full", classes - 1, torch.float32, FULL, weight, True)
    launch("full", classes - 1, torch.bfloat16, FULL, weight, True)
print(json.dumps(results))
"""


def compile_for(target):
    """What becomes of each kernel; in a process of its own, which takes a minute or two."""
    with tempfile.TemporaryDirectory() as cache:
        output = run_python(COMPILE_SCRIPT, target, TRITON_INTERPRET="", TRITON_CACHE_DIR=cache)
    return json.loads(output.splitlines()[-1])


targets = pytest.mark.parametrize("target", TARGETS or [None])


@if_asked
@compiled
@targets
def test_no_kernel_spills_a_register(compiled_for, target, record_property):
    """What ships: every shape of the table, aligned rows and not, with its gradient."""
    for found in compiled_for(target):
        record_property(f"{target} {found['case']} {found['kernel']}", found)
        print(target, *(f"{key}={value}" for key, value in found.items() if key != "hash"))
        if target == "gfx942":
            # Scalar registers are kept in lanes of vector registers: no memory is touched.
            assert found["vgpr_spill_count"] == found["private_segment_fixed_size"] == 0, found
        else:
            assert found["spilled"] == 0, found


@if_asked
@compiled
@targets
def test_aligned_rows_are_read_16_bytes_at_a_time(compiled_for, target):
    """From where every thread has 16 bytes of a row to read."""
    enough = {"float32": 128, "bfloat16": 512, "float64": 64}
    rows = [
        found
        for found in compiled_for(target)
        if found["kernel"] == "rows_kernel"
        and found["case"] in ("plain", "double")
        and found["classes"] >= enough[found["dtype"]] * (2 if target == "gfx942" else 1)
    ]
    assert len(rows) > 5
    for found in rows:
        assert found["wide_loads"] >= 2, found  # both the student and the teacher


@if_asked
@compiled
@targets
def test_sizes_of_one_shape_share_one_kernel(compiled_for, target):
    """Vocabularies and batches of all sizes must not each bring a compilation."""
    kernels = {}
    for found in compiled_for(target):
        if found["case"] == "full" and found["kernel"] in ("scales_kernel", "finish_kernel"):
            kernels.setdefault(found["kernel"], set()).add(found["hash"])
    assert kernels
    assert all(len(hashes) == 1 for hashes in kernels.values())
