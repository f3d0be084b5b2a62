"""The general kernel of the Triton backend, by Triton's interpreter: what the tests of objectives
and teachers ask of the CPU, in rows of one block and of two.

They run in the process that ``test_triton.py`` speaks of, where is also what it compiles to.
"""

import math

import pytest
import test_divergences as divergences
import test_objectives as objectives
import test_teachers as teachers
import test_triton_divergences as specialised
import torch
from comparing import assert_close, assert_same_bits, value_and_grad
from formulas import compare, truth
from test_numerics import GRAD_BOUND, LOSS_BOUND, inputs
from test_triton import interpreted

from kdkernels import TopKTeacher, kd_loss
from kdkernels.backends import triton, triton_general

INF, NAN = math.inf, math.nan
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"), interpreted]
F32 = torch.float32
other_dtypes = pytest.mark.parametrize("dtype", [t for t in GRAD_BOUND if t != F32], ids=str)
TWO_BLOCKS = 300


def against_the_reference(s, t, y, teacher=None, **options):
    """Value and gradient as those of the reference in float64."""
    x, z = s.clone().requires_grad_(), s.double().requires_grad_()
    loss = kd_loss(x, t if teacher is None else teacher, y, backend="triton", **options)
    of_reference = t.double() if teacher is None else teacher
    expected = kd_loss(z, of_reference, y, backend="reference", **options)
    (loss + expected).sum().backward()
    assert (loss.detach() - expected.detach()).abs().max() <= LOSS_BOUND * (1 + expected.max())
    assert (x.grad - z.grad).norm() <= GRAD_BOUND[F32] * z.grad.norm()


def test_a_temperature_that_is_learned():
    s, t, y = inputs(3, TWO_BLOCKS)
    y[1] = -100
    rates = []
    for backend, dtype in (("triton", F32), ("reference", torch.float64)):
        T = torch.tensor([2.0, 3.0, 1.5], dtype=dtype, requires_grad=True)
        options = {"divergence": "jsd", "beta": 0.3, "backend": backend}
        kd_loss(s.to(dtype), t.to(dtype), y, temperature=T, **options).backward()
        rates.append(T.grad.double())
    torch.testing.assert_close(*rates, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("options", [{}, {"standardize": True}], ids=["simple", "general"])
@pytest.mark.parametrize("dtype", [F32, torch.float16], ids=str)
def test_a_mean_over_the_rows_of_other_calls_too(options, dtype):
    s, t, y = inputs(5, TWO_BLOCKS, dtype=dtype)
    y[1] = -100
    whole = value_and_grad("triton", s, t, y, reduction="sum", **options)
    part = value_and_grad("triton", s, t, y, num_items=(8, torch.tensor(4)), **options)
    assert abs(part[1] * 8 / whole[1] - 1) < 1e-6
    assert abs(part[2] * 4 / whole[2] - 1) < 1e-6
    soft = value_and_grad("triton", s, t, y, alpha=1.0, num_items=8, **options)
    summed = value_and_grad("triton", s, t, y, alpha=1.0, reduction="sum", **options)
    assert_close(soft[-1], summed[-1].double() / 8)


# ---- divergences ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_objective(name):
    objectives.test_objective("triton", F32, TWO_BLOCKS, name)
    objectives.test_masked_classes("triton", name)


@pytest.mark.parametrize("name", divergences.FORMULAS)
def test_divergences_that_have_kernels_of_their_own(name, monkeypatch):
    """In a row of many passes they are the general kernel's."""
    monkeypatch.setattr(triton, "_is_general", lambda *_: True)
    s, t, y = inputs(2, TWO_BLOCKS)
    specialised.check(s, t, y, name)
    specialised.check(s, s + 1e-4 * t, y, name, temperature=2.0, alpha=1.0)
    for value in divergences.PARAMETERS.get(divergences.OPTION.get(name), ()):
        specialised.check(*inputs(1, 15, 1.0), name, value, temperature=1.0, alpha=1.0)
    divergences.test_masked_classes("triton", name, 9)
    loss, *_, grad = value_and_grad("triton", s, s.clone(), y, divergence=name, alpha=1.0)
    assert loss <= 1e-12
    assert grad.norm() <= 1e-12


def test_distributions_far_apart(monkeypatch):
    monkeypatch.setattr(triton, "_is_general", lambda *_: True)
    for name in ("renyi", "jsd", "skew_reverse_kl"):
        specialised.test_distributions_far_apart_stay_finite(name)
    specialised.test_powers_far_apart_beside_a_masked_class()
    specialised.test_powers_outside_0_and_1_are_infinite_as_kls_are()
    objectives.check_far_apart("triton")


@pytest.mark.parametrize("margin", [40.0, 300.0])
def test_a_label_that_is_all_there_is(margin):
    s, t, y = inputs(3, 7, 1.0)
    s[0, y[0]] += margin
    t[1, y[1]] += margin
    for name in ("nkd", "wsld"):
        formula = objectives.OBJECTIVES[name]
        expected = truth(
            lambda row, t, label, i, formula=formula: formula(row, t[i].double(), label, 2.0),
            s,
            t,
            y,
            alpha=1.0,
        )
        options = {"divergence": name, "temperature": 2.0, "alpha": 1.0}
        compare(expected, s, t, y, "triton", **options)
    against_the_reference(s, t, y, divergence="dkd", z_loss=0.0, num_classes=7)
    against_the_reference(s, t, y, divergence="dkd", standardize=True, dkd_beta=2.0)


# ---- looks, options and teachers -----------------------------------------------------------------


@other_dtypes
def test_every_dtype(dtype):
    objectives.test_objective("triton", dtype, 3, "nkd")
    teachers.test_several_teachers("triton", dtype, 3, "probs")


@pytest.mark.parametrize("case", range(12))
def test_options_go_together(case):
    names = list(objectives.OBJECTIVES)
    ensemble = [None, "probs", "losses", "logits"][case // 2 % 4]
    name = names[(case + case // 4) % 4]
    objectives.check_together(objectives.COMBINED[case % 6], name, ensemble, "triton")


def test_several_looks():
    objectives.test_a_temperature_for_each_row("triton", F32, 10)
    objectives.test_several_temperatures("triton", F32, 10)
    objectives.test_agreement_and_entropy_gap("triton", F32, 10)
    objectives.test_the_composite_of_the_tutorial("triton")
    objectives.test_constant_distributions_have_no_correlation("triton")
    objectives.test_dist_across_the_batch("triton")


def test_standardised_logits():
    objectives.test_standardised_logits("triton", F32, 10)
    objectives.test_standardising_looks_only_at_classes_that_are_there("triton")
    for c in (1, 6):
        objectives.test_a_constant_row_can_be_standardised("triton", c)
    against_the_reference(*inputs(1, TWO_BLOCKS), standardize=True)


def test_logits_that_are_more_than_they_seem(monkeypatch):
    teachers.test_softcap_scale_and_bias("triton", F32, 10)
    teachers.test_taid("triton", F32, 10)
    teachers.test_z_loss("triton", F32, 10)
    teachers.test_sample_weight("triton", F32, 10)
    teachers.test_a_teacher_of_weight_zero_is_not_read("triton")
    monkeypatch.setenv("KDKERNELS_CHECK_LABELS", "1")
    teachers.test_padded_classes("triton")


@pytest.mark.parametrize("ensemble", ["probs", "losses", "logits"])
def test_several_teachers(ensemble):
    teachers.test_several_teachers("triton", F32, 10, ensemble)


@pytest.mark.parametrize("tail", ["renormalize", "bucket", "zero"])
def test_top_k(tail):
    teachers.test_top_k("triton", torch.float64, 10, tail)
    s, t, y = inputs(1, TWO_BLOCKS)
    teacher = TopKTeacher.from_logits(t.bfloat16(), 260, tail, 2.0)
    for name in ("renyi", "jsd"):
        against_the_reference(s, t, y, teacher, divergence=name, temperature=2.0)


def test_top_k_that_is_not_usual():
    teachers.test_masked_and_left_out_classes_of_top_k("triton")
    teachers.test_top_k_beside_all_else("triton")
    for sign in (90.0, -90.0):
        s, t, y = inputs(2, 9, 1.0)
        teacher = TopKTeacher.from_logits(t, 4, "bucket")
        s = s.scatter_add(1, teacher.indices.long(), torch.full((2, 4), sign))
        row_loss = teachers.of_top_k(teachers.kl, "bucket", teacher.values, teacher.indices, 1.0)
        options = {"temperature": 1.0, "alpha": 1.0}
        expected = truth(row_loss, s, t, y, alpha=1.0)
        compare(expected, s, teacher, y, "triton", **options)


def test_metrics():
    objectives.test_metrics("triton")
    s, t, y = inputs(3, 9, dtype=torch.float64)
    for ensemble in ("losses", "logits"):
        options = {"ensemble": ensemble, "return_terms": "metrics"}
        got, expected = (
            kd_loss(s, [t, t.roll(1, 0)], y, backend=name, **options)
            for name in ("triton", "reference")
        )
        torch.testing.assert_close(got, expected)


# ---- what holds for all of them ------------------------------------------------------------------


@pytest.mark.parametrize("case", [0, 1, 3, 4, 8, 9, 13])
def test_ignored_rows_are_not_read_and_nan_comes_out(case):
    objectives.test_ignored_rows_are_not_read_and_nan_comes_out("triton", objectives.ALL[case])


def test_programs_take_rows_in_turn_and_change_no_bit(monkeypatch):
    s, t, y = inputs(5, 10)
    options = {"divergence": {"nkd": 1.0, "jsd": 0.5}, "entropy_gap": 0.1}
    expected = value_and_grad("triton", s, t, y, **options)
    monkeypatch.setattr(triton_general, "PROGRAMS", 2)
    assert_same_bits(value_and_grad("triton", s, t, y, **options), expected)
    leaf = s.clone().requires_grad_()
    loss = kd_loss(leaf * 1, t, y, inplace=True, backend="triton", **options)
    loss.backward()
    assert torch.equal(loss, expected[0])
    assert torch.equal(leaf.grad, expected[3])


def test_without_a_share_the_teacher_is_not_touched():
    s, t, y = inputs(2, 5)
    for options in ({"divergence": "wsld"}, {"temperature": [1.0, 2.0]}):
        options |= {"alpha": 0.0, "z_loss": 0.1}
        got = value_and_grad("triton", s, torch.full_like(t, NAN), y, **options)
        expected = value_and_grad("cpu", s, t, y, **options)
        torch.testing.assert_close((got[0], got[3]), (expected[0], expected[3]))


@pytest.mark.parametrize("name", ["nkd", "forward_kl"])
def test_a_label_out_of_range_is_nan_in_its_row_alone(name):
    s, t, y = inputs(3, 12)
    y[1] = 12
    options = {"reduction": "none", "divergence": name, "z_loss": 0.1}
    loss, _, _, grad = value_and_grad("triton", s, t, y, **options)
    assert torch.isnan(loss).tolist() == [False, True, False]
    assert torch.isnan(grad).any(-1).tolist() == [False, True, False]


def test_an_entry_of_top_k_out_of_range_is_nan_in_its_row_alone(monkeypatch):
    """Which nobody looks for on a GPU."""
    s, t, y = inputs(3, 12)
    values, indices = t.topk(4)
    indices[1, 2] = 12
    monkeypatch.setattr("kdkernels.checks._check_indices", lambda *_: None)
    options = {"reduction": "none", "alpha": 1.0}
    loss, _, _, grad = value_and_grad("triton", s, TopKTeacher(values, indices), y, **options)
    assert torch.isnan(loss).tolist() == [False, True, False]
    assert torch.isnan(grad).any(-1).tolist() == [False, True, False]


def test_a_float16_gradient_has_room_for_what_multiplies_it():
    s, t, y = inputs(3, 20, dtype=torch.float16)
    weights = torch.tensor([1.0, 3e4, 2.0])
    for options in (
        {"sample_weight": weights},
        {"divergence": {"nkd": weights}},
        {"temperature": torch.tensor([1.0, 50.0, 300.0])},
        {"agreement": 3e4},
        {"standardize": True, "temperature": 40.0},
    ):
        options |= {"reduction": "none"}
        exact = value_and_grad("triton", s.double(), t.double(), y, **options)[3]
        incoming = torch.full((3,), 2.0 ** math.floor(math.log2(3e4 / exact.abs().max())))
        grad = value_and_grad("triton", s, t, y, incoming, **options)[3]
        assert (grad.double() / incoming[0] - exact).norm() <= 2.0**-10 * exact.norm()


def test_a_gpu_without_float64_leaves_it_to_the_reference(monkeypatch):
    monkeypatch.setattr(triton_general, "has_double", lambda *_: False)
    s, t, y = inputs(2, 5)
    with pytest.warns(RuntimeWarning, match="the GPU has no float64"):
        got = value_and_grad("triton", s, t, y, z_loss=0.1)
    expected = value_and_grad("reference", s, t, y, z_loss=0.1)
    torch.testing.assert_close(got, expected)
