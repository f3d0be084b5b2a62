"""Divergences on the Triton backend, by Triton's interpreter: each against the formulas of
``test_divergences.py`` and ``test_dkd.py``, in every regime of the kernels.

They run in the process that ``test_triton.py`` speaks of, where is also what they compile to.
"""

import math

import pytest
import test_divergences as divergences
import test_dkd as dkd
import torch
from comparing import assert_same_bits, value_and_grad
from test_divergences import DEFAULT, OPTION, PARAMETERS, asked, truth
from test_numerics import LOSS_BOUND, inputs
from test_triton import interpreted

from kdkernels import kd_loss

INF, NAN = math.inf, math.nan
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    interpreted,
]
names = pytest.mark.parametrize("name", divergences.FORMULAS)
HARD_CASES = ["jsd", "renyi", "dkd"]  # one of each way to the gradient
HALVES = [torch.bfloat16, torch.float16]
# A tile of several rows, a warp or two to a row, a row in registers, blocks.
ONE_OF_EACH = [(5, 10), (2, 200), (1, 1000), (1, 1100)]
DKD = {"divergence": "dkd", "dkd_alpha": 1.0, "dkd_beta": 2.0}


def check(s, t, y, name, value=None, temperature=4.0, alpha=0.9, **options):
    parameter = DEFAULT.get(OPTION.get(name)) if value is None else value
    expected = truth(s, t, y, [(name, 1.0, parameter)], temperature, alpha=alpha)
    options |= {"temperature": temperature, "alpha": alpha} | asked(name, value)
    divergences.check(s, t, y, expected, "triton", **options)


@names
def test_value_and_gradient(name):
    for n, c in ONE_OF_EACH:
        check(*inputs(n, c), name)
    for value in PARAMETERS.get(OPTION.get(name), ()):
        check(*inputs(2, 15, 1.0), name, value, temperature=1.0, alpha=1.0)


@names
@pytest.mark.parametrize("dtype", [torch.float64, *HALVES], ids=str)
def test_every_dtype(name, dtype):
    check(*inputs(2, 12, dtype=dtype), name, temperature=2.0)


@pytest.mark.parametrize("dtype", [torch.float64, *HALVES], ids=str)
def test_every_dtype_in_blocks(dtype):
    check(*inputs(1, 1100, dtype=dtype), "jsd", temperature=2.0)


@names
def test_a_student_next_to_its_teacher_is_done_again_in_double(name):
    s, t, y = inputs(2, 30)
    check(s, s + 1e-4 * t, y, name, temperature=2.0, alpha=1.0)


def test_next_to_its_teacher_decoupled():
    for c in (2, 30, 1100):
        s, t, y = inputs(2, c)
        options = {"temperature": 1.0, "alpha": 1.0, "dkd_beta": 1.0}  # the loss is not at risk
        dkd.check(s, s + 1e-4 * t, y, "triton", **options)


def test_signs_that_float32_cannot_tell():
    s, t, y = inputs(2, 100)
    check(s, s + 1e-6 * t, y, "total_variation", temperature=1.0, alpha=1.0)


def test_probabilities_that_are_the_same_in_float32_alone():
    """All of float32's gradient is 0, and the gradient is not."""
    t, _, y = inputs(1, 30)
    t[0, 0] = 2.0**-24
    s = t.clone()
    s[0, 0] = 2.0**-23
    check(s, t, y, "total_variation", alpha=1.0)


@pytest.mark.parametrize("name", HARD_CASES)
@pytest.mark.parametrize("c", [30, 1100])
def test_in_place_what_is_to_be_done_again_has_not_been_overwritten(name, c):
    s, t, y = inputs(2, c)
    t[0] = s[0] + 1e-4 * t[0]
    options = {"alpha": 1.0, "temperature": 2.0, "backend": "triton", "divergence": name}
    x, leaf = s.clone().requires_grad_(), s.clone().requires_grad_()
    loss = kd_loss(x, t, y, **options)
    loss.backward()
    assert torch.equal(kd_loss(s, t, y, **options), loss)
    kd_loss(leaf * 1, t, y, inplace=True, **options).backward()
    assert torch.equal(leaf.grad, x.grad)


@names
def test_two_temperatures_and_no_square(name):
    s, t, y = inputs(3, 12)
    term = [(name, 1.0, DEFAULT.get(OPTION.get(name)))]
    for own in (3.5, 0.7):
        options = {"temperature": 2.0, "teacher_temperature": own, "scale_by_t2": False}
        expected = truth(s, t, y, term, 2.0, own, factor=1.0)
        divergences.check(s, t, y, expected, "triton", divergence=name, **options)


@pytest.mark.parametrize("mixture", divergences.MIXTURES[1:], ids=str)
def test_a_mixture_is_the_weighted_sum(mixture):
    divergences.test_a_mixture_is_the_weighted_sum("triton", mixture, 7)


def test_a_mixture_in_blocks():
    s, t, y = inputs(2, 1100)
    mixture = divergences.MIXTURES[-1]
    terms = [(name, w, DEFAULT.get(OPTION.get(name))) for name, w in mixture.items()]
    divergences.check(s, t, y, truth(s, t, y, terms), "triton", divergence=mixture)


def test_options_per_row():
    divergences.test_options_per_row("triton", (2, 3))


def test_weights_of_both_signs_and_of_zero_per_row():
    """A row without a weight has no part in the term, whatever that is."""
    s, t, y = inputs(3, 30)
    s[1, 4] = -INF  # an infinite forward KL
    weight = torch.tensor([2.0, 0.0, -1.5])
    x = s.clone().requires_grad_()
    options = {"alpha": 1.0, "backend": "triton", "reduction": "none"}
    got = kd_loss(x, t, y, divergence={"forward_kl": weight, "jsd": 1.0}, **options)
    got.sum().backward()
    for row, w in enumerate(weight.tolist()):
        one = slice(row, row + 1)
        terms = [("jsd", 1.0, 0.5)] + ([("forward_kl", w, 0.0)] if w else [])
        loss, grad = truth(s[one], t[one], y[one], terms, alpha=1.0)
        assert abs(got[row] - loss) <= LOSS_BOUND * (1 + loss.abs())
        grad = grad.nan_to_num(0.0)
        assert (x.grad[one].double() - grad).norm() <= 2e-6 * grad.norm()


@pytest.mark.parametrize(
    ("end", "options"),
    [
        ("forward_kl", {"divergence": "jsd", "beta": 0.0}),
        ("reverse_kl", {"divergence": "jsd", "beta": torch.ones(2)}),
        ("forward_kl", {"divergence": "skew_forward_kl", "skew": torch.zeros(2)}),
        ("reverse_kl", {"divergence": "skew_reverse_kl", "skew": 0.0}),
        ("forward_kl", {"divergence": "alpha", "divergence_alpha": 1.0}),
        ("reverse_kl", {"divergence": "alpha", "divergence_alpha": 0.0}),
        ("forward_kl", {"divergence": "renyi", "divergence_alpha": 1.0}),
    ],
    ids=str,
)
def test_ends_of_the_parameters(end, options):
    s, t, y = inputs(2, 9)
    got = value_and_grad("triton", s, t, y, **options)
    expected = value_and_grad("triton", s, t, y, divergence=end)
    torch.testing.assert_close(got, expected)


@names
def test_a_student_equal_to_its_teacher_is_the_minimum(name):
    s, t, y = inputs(2, 12)
    options = {"alpha": 1.0, "divergence": name}
    at_minimum, *_, grad = value_and_grad("triton", s, s.clone(), y, **options)
    assert -1e-12 <= at_minimum <= 2e-6
    assert grad.norm() <= 1e-6
    for size in (1e-2, 10.0):
        assert kd_loss(s + size * t, s, y, backend="triton", **options) > at_minimum


@names
def test_masked_classes(name):
    divergences.test_masked_classes("triton", name, 9)


def test_masked_classes_in_blocks():
    divergences.test_masked_classes("triton", "reverse_kl", 1100)


def test_powers_outside_0_and_1_are_infinite_as_kls_are():
    for case in ((1.5, (True, False)), (-0.5, (False, True))):
        divergences.test_powers_outside_0_and_1_are_infinite_as_kls_are("triton", *case)


def test_classes_masked_in_both_have_no_power_at_two_temperatures():
    """Their exponents are differences of numbers that stand for -inf."""
    s, t, y = inputs(2, 12)
    y[:] = 0
    s[:, 8:], t[:, 8:] = -INF, -INF
    options = {"teacher_temperature": 4.0, "temperature": 1.0, "divergence_alpha": 1.5}
    for name in ("alpha", "renyi"):
        options |= {"divergence": name, "alpha": 1.0}
        got = value_and_grad("triton", s, t, y, **options)
        expected = value_and_grad("triton", s[:, :8], t[:, :8], y, **options)
        torch.testing.assert_close(got[0], expected[0])
        torch.testing.assert_close(got[3][:, :8], expected[3], rtol=1e-5, atol=1e-7)
        assert got[3][:, 8:].eq(0).all()


@names
def test_distributions_far_apart_stay_finite(name):
    """No power of Renyi's can be represented beside 1, and no mixture's logarithm may be of 0."""
    s, t, y = inputs(2, 40, 40.0)
    loss, *_, grad = value_and_grad("triton", s, t, y, divergence=name, temperature=0.05)
    assert torch.isfinite(loss)
    assert torch.isfinite(grad).all()


def test_powers_far_apart_beside_a_masked_class():
    """Their sum is 0 in float32 alone, and what is infinite need not be due to the mask."""
    s, t, _ = inputs(2, 12, 40.0)
    s[:, 3] = -INF
    options = {"divergence": "renyi", "alpha": 1.0, "temperature": 0.2}
    loss, *_, grad = value_and_grad("triton", s, t, **options)
    keep = [0, 1, 2, *range(4, 12)]
    x = s[:, keep].double().requires_grad_()
    log_p = torch.log_softmax(t.double() / 0.2, -1)[:, keep]
    log_q = torch.log_softmax(x / 0.2, -1)
    expected = (-2 * torch.logsumexp((log_p + log_q) / 2, -1)).mean() * 0.2**2
    expected.backward()
    assert abs(loss - expected) <= LOSS_BOUND * (1 + expected)
    assert (grad[:, keep].double() - x.grad).norm() <= 2e-6 * x.grad.norm()


@pytest.mark.parametrize("name", [*divergences.FORMULAS, "dkd"])
def test_rows_left_out_and_rows_that_are_no_numbers(name):
    s, t, y = inputs(10, 12)
    y[0] = -100
    options = {"divergence": name, "temperature": 1.0}
    clean = value_and_grad("triton", s, t, y, **options)
    s[0], t[0] = NAN, -INF
    assert_same_bits(value_and_grad("triton", s, t, y, **options), clean)
    for row, (logits, bad) in enumerate(((s, NAN), (t, NAN), (s, INF), (t, INF))):
        logits[2 * row + 1, y[2 * row + 1]] = bad
        logits[2 * row + 2, (y[2 * row + 2] + 1) % 12] = bad
    got = value_and_grad("triton", s, t, y, reduction="none", **options)
    assert torch.isnan(got[0]).tolist() == [False, *[True] * 8, False]
    assert torch.isnan(got[3]).any(-1).tolist() == [False, *[True] * 8, False]


@pytest.mark.parametrize("name", ["jsd", "dkd"])
def test_without_a_share_the_teacher_is_not_touched(name):
    divergences.test_without_a_share_the_teacher_is_not_touched("triton", name, 5)
    s, t, y = inputs(2, 5)
    logged = value_and_grad("triton", s, torch.full_like(t, NAN), y, divergence=name, alpha=0.0)
    assert torch.isfinite(logged[0])
    assert torch.isfinite(logged[3]).all()


@pytest.mark.parametrize("name", HARD_CASES)
def test_asking_for_the_terms_changes_no_bit(name):
    s, t, y = inputs(2, 10)
    options = {"divergence": name, "backend": "triton"}
    terms = kd_loss(s, t, y, return_terms=True, **options)
    assert torch.equal(terms.loss, kd_loss(s, t, y, **options))
    torch.testing.assert_close(terms.hard, kd_loss(s, t, y, alpha=0.0, backend="triton"))


def test_a_float16_gradient_has_room_for_the_weights():
    s, t, y = inputs(3, 20, dtype=torch.float16)
    weight = torch.tensor([1.0, -3e4, 2.0])
    for divergence in ({"reverse_kl": weight}, {"jsd": 3e4}, {"dkd": 3e4}):
        options = {"divergence": divergence, "reduction": "none", "alpha": 1.0}
        exact = value_and_grad("triton", s.double(), t.double(), y, **options)[3]
        grad = value_and_grad("triton", s, t, y, torch.full((3,), 2.0**-6), **options)[3]
        assert (grad.double() * 64 - exact).norm() <= 2.0**-10 * exact.norm()


@pytest.mark.parametrize("c", [2, 10, 200, 1000, 1100])
def test_decoupled_distillation(c):
    s, t, y = inputs(3, c)
    y[1] = -100
    for options in (
        {},
        {"temperature": 3.3, "dkd_beta": 0.0, "alpha": 1.0},
        {"temperature": 2.0, "dkd_alpha": 300.0, "dkd_beta": 40.0},
    ):
        dkd.check(s, t, y, "triton", **options)


@pytest.mark.parametrize("dtype", [torch.float64, *HALVES], ids=str)
def test_decoupled_distillation_in_every_dtype(dtype):
    dkd.check(*inputs(3, 40, 12.0, dtype), "triton", temperature=1.0)


@pytest.mark.parametrize(("c", "margin"), [(2, 40.0), (7, 15.0), (7, 1000.0)])
def test_a_label_that_is_all_there_is(c, margin):
    dkd.test_a_label_that_is_all_there_is("triton", c, margin)


def test_a_label_that_is_all_there_is_in_a_block_of_its_own():
    s, t, y = inputs(2, 1025)
    y[:] = 1024
    s[:, 1024] += 120.0
    t[1, 1024] += 120.0
    dkd.check(s, t, y, "triton", temperature=1.0)


def test_the_labels_entry_is_no_difference_of_ones():
    s, t = torch.tensor([[40.0, 0.0]]), torch.tensor([[41.0, 0.0]])
    options = {"divergence": "dkd", "alpha": 1.0, "temperature": 1.0}
    grad = value_and_grad("triton", s, t, torch.tensor([0]), **options)[3]
    label = torch.sigmoid(torch.tensor(-41.0)) - torch.sigmoid(torch.tensor(-40.0))
    torch.testing.assert_close(grad, torch.stack([label, -label])[None], rtol=1e-5, atol=0)


def test_the_decoupled_parts():
    dkd.test_two_classes_have_only_the_labels_part("triton")
    dkd.test_weights_of_one_part_each_make_kl("triton")
    dkd.test_minimum_shift_and_ignored_rows("triton")
    dkd.test_masked_classes("triton", 6)


def test_a_decoupled_row_with_a_label_out_of_range_is_nan():
    s, t, y = inputs(3, 12)
    y[1] = 12
    loss, _, _, grad = value_and_grad("triton", s, t, y, reduction="none", **DKD)
    assert torch.isnan(loss).tolist() == [False, True, False]
    assert torch.isnan(grad).any(-1).tolist() == [False, True, False]


def test_class_weights_are_the_cross_entropys():
    s, t, y = inputs(3, 9)
    weight = torch.rand(9, generator=torch.Generator().manual_seed(1)) + 0.5
    for options in (DKD, {"divergence": "jsd"}):
        got = value_and_grad("triton", s, t, y, weight=weight, **options)
        expected = value_and_grad("cpu", s, t, y, weight=weight, **options)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("c", [6, 1100])
def test_dkd_where_one_of_the_two_has_nothing_but_the_label(c):
    dkd.test_one_of_the_two_has_nothing_but_the_label("triton", "dkd", c)
