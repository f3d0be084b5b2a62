"""What holds for every input: agreement with the formula, and the algebra of the loss.

Hypothesis draws the shape, dtypes, options and the kind of logits; torch fills in the numbers.
"""

import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import oracle

from kdkernels import kd_loss

LOSS_BOUND = 2e-6  # times (1 + |loss|)
GRAD_BOUND = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}
INF = math.inf
# What a gradient scaler does: it keeps float16 out of its subnormals, and the largest possible
# entry, T + 2 * weight, within its range.
FLOAT16_SCALE = 2048.0


pytestmark = pytest.mark.usefixtures("one_thread")


class Problem(NamedTuple):
    s: torch.Tensor  # [N, C]
    t: torch.Tensor  # [N, C]
    y: torch.Tensor | None  # [N]
    options: dict

    def change(self, **options):
        return self._replace(options=self.options | options)


dtypes = st.sampled_from(list(GRAD_BOUND))
full_precision = st.sampled_from([torch.float32, torch.float64])
# Up to 70: all tails of a vector, with and without whole vectors. About 2048: the end of a block.
class_counts = st.one_of(*[st.integers(1, 70)] * 5, st.integers(2040, 2060))
temperatures = st.one_of(st.sampled_from([1.0, 2.0, 3.0, 4.0]), st.floats(0.5, 20))
alphas = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.01, 0.99))
scales = st.floats(-2, 2).map(lambda exponent: 10**exponent)
offsets = st.sampled_from([0.0, 0.0, 30.0, -1e3, 1e4, -3e4])
LAYOUTS = {
    "contiguous": lambda v: v,
    "padded rows": lambda v: F.pad(v, (1, 2), value=7.0)[:, 1:-2],
    "transposed": lambda v: v.T.contiguous().T,
    "every other row": lambda v: v.repeat_interleave(2, 0)[::2],
}
layouts = st.sampled_from(list(LAYOUTS))


@st.composite
def problems(
    draw, student_dtypes=dtypes, teacher_dtypes=dtypes, scales=scales, offsets=offsets, plain=False
):
    """``plain``: no label smoothing and no mask, for properties that hold without them."""
    rows, classes = draw(st.integers(0, 6)), draw(class_counts)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def chance(probability, *shape):
        return torch.rand(*shape, generator=generator) < probability

    def logits():
        values = torch.randn(rows, classes, generator=generator, dtype=torch.float64)
        return values * draw(scales) + draw(offsets)

    s, t = logits(), logits()
    y = torch.randint(classes, (rows,), generator=generator)
    alpha = draw(alphas)
    weight = None
    if draw(st.booleans()):
        weight = torch.rand(classes, generator=generator, dtype=torch.float64) + 0.5
    masked = not plain and draw(st.booleans())
    # A label that is masked has no share of 1.0: of 0 · inf PyTorch makes NaN, and so does kd_loss.
    smoothings = [0.0] if plain else [0.0, 0.0, 0.1, 0.9 if masked else 1.0]
    if masked:
        # One class of each row stays. A class that the student alone masks gets a share of the
        # teacher's that float64 can hold: the formula says p · inf of it.
        kept = F.one_hot(y, classes).bool()
        both, teacher, student = (chance(draw(st.floats(0, 0.5)), rows, classes) for _ in range(3))
        student &= chance(0.3, rows, 1)
        t = t.where(~(student & ~kept), t.amax(-1, keepdim=True))
        s = s.masked_fill((both | student) & ~kept, -INF)
        t = t.masked_fill((both | teacher & ~student) & ~kept, -INF)
        y = y.where(chance(0.9, rows), torch.randint(classes, (rows,), generator=generator))
    options = {
        "temperature": draw(temperatures),
        "alpha": alpha,
        "label_smoothing": draw(st.sampled_from(smoothings)),
        "weight": weight,
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "distill_ignored": draw(st.booleans()),
        "ignore_index": draw(st.sampled_from([-100, -1, classes])),
    }
    y = y.where(~chance(draw(st.sampled_from([0, 0, 0.3, 0.6, 1])), rows), options["ignore_index"])
    y = y.to(draw(st.sampled_from([torch.int64, torch.int32])))
    if alpha == 1 and draw(st.booleans()):
        y = None
    s, t = s.to(draw(student_dtypes)), t.to(draw(teacher_dtypes))
    return Problem(LAYOUTS[draw(layouts)](s), LAYOUTS[draw(layouts)](t), y, options)


def active(p):
    """Rows of the soft and of the hard term."""
    every = torch.ones(len(p.s), dtype=torch.bool)
    hard = ~every if p.y is None else p.y != p.options["ignore_index"]
    return every if p.y is None or p.options["distill_ignored"] else hard, hard


def probabilities(p):
    """q, p and r of every row, and where the student is sure of a class."""
    temperature = p.options["temperature"]
    s, t = p.s.double(), p.t.double()
    q, teacher, r = ((s / temperature).softmax(-1), (t / temperature).softmax(-1), s.softmax(-1))
    return q, teacher, r, (q > 2 / 3) | (r > 2 / 3) & active(p)[1][:, None]


def truth(p):
    """Loss, terms and gradient by the formula, in digits that float64 need not lose.

    The rows are shifted to a maximum of 0 first, and the gradient at a class of which the student
    is sure, where q - p and r - 1 cancel, is had from the other classes: a row adds up to 0.
    """
    s, t = (v.double() - v.double().amax(-1, keepdim=True) for v in (p.s, p.t))
    *terms, grad = oracle(s, t, p.y, **p.options)
    sure = probabilities(p)[3]
    others = grad.masked_fill(sure, 0.0).sum(-1, keepdim=True)
    return terms, torch.where(sure, -others, grad)


def measured(p, backend="cpu"):
    x = p.s.detach().requires_grad_()
    terms = kd_loss(x, p.t, p.y, return_terms=True, backend=backend, **p.options)
    scale = FLOAT16_SCALE if p.s.dtype == torch.float16 else 1.0
    (terms.loss.sum() * scale).backward()
    return [term.detach().double() for term in terms], x.grad.double() / scale


def assume_no_coincidence(p, grad):
    """The gradient is no small difference of exponentials: it has a share of their norm.

    Where teacher and student all but coincide the error is that of the exponentials, 1e-7 of ‖p‖.
    A class of which the student is sure is no such case: what is left to the others counts there.
    """
    options, (soft, hard) = p.options, active(p)
    q, teacher, r, sure = probabilities(p)
    mean = options["reduction"] == "mean"
    soft_share = options["alpha"] * options["temperature"] / (max(soft.sum(), 1) if mean else 1)
    hard_share = (1 - options["alpha"]) / (max(hard.sum(), 1) if mean else 1)
    parts = soft_share * torch.maximum(q, teacher) * soft[:, None] + hard_share * r * hard[:, None]
    assume(grad.norm() >= 0.1 * parts.masked_fill(sure, 0.0).norm())


def loss_error(got, expected):
    """As a multiple of what is allowed; infinities have to agree."""
    error = (got - expected).abs() / (LOSS_BOUND * (1 + expected.abs()))
    error = error.nan_to_num(nan=INF).masked_fill(got == expected, 0.0)
    return error.max() if error.numel() else 0.0


def floor(p):
    """What is allowed beside a share of the norm."""
    if p.s.shape[-1] == 1:
        return 1e-15  # the gradient is 0, as a difference of weights and their like
    # float16: the rounding of its smallest numbers, at the scale of the gradient.
    return p.s.numel() ** 0.5 * 2.0**-25 / 256 if p.s.dtype == torch.float16 else 1e-30


def check(p, backend="cpu"):
    terms, grad = truth(p)
    got_terms, got_grad = measured(p, backend)
    for name, got, expected in zip(("loss", "soft", "hard"), got_terms, terms, strict=True):
        assert got.shape == expected.shape
        assert loss_error(got, expected) <= 1, f"{name} is {got}, not {expected}"
    assume_no_coincidence(p, grad)
    error, bound = (got_grad - grad).norm(), GRAD_BOUND[p.s.dtype] * grad.norm()
    assert error <= bound + floor(p), f"off by {error:.3g}, allowed {bound:.3g}"


def assert_same(p, first, second):
    """Two results that both lie within the bounds of one truth: at most twice as far apart."""
    for got, expected in zip(first[0], second[0], strict=True):
        assert loss_error(got, expected) <= 2
    assume_no_coincidence(p, second[1])
    bound = 2 * (GRAD_BOUND[p.s.dtype] * second[1].norm() + floor(p))
    assert (first[1] - second[1]).norm() <= 1.01 * bound  # a bound of the truth's norm


def examples(count):
    return settings(max_examples=count, deadline=None, derandomize=True)


# --- the formula -------------------------------------------------------------------------------


@given(problems())
@examples(250)
def test_loss_and_gradient_are_those_of_the_formula(p):
    check(p)


@given(
    problems(
        st.just(torch.float64),
        st.just(torch.float64),
        scales=st.floats(-1, 1).map(lambda exponent: 10**exponent),
        offsets=st.just(0.0),  # it divides by T before it subtracts the maximum
    )
)
@examples(150)
def test_the_reference_is_the_formula(p):
    check(p, "reference")


# --- the divergence at every temperature -------------------------------------------------------
# The loss multiplies the rounding of the exponentials by T². Where it shows: rows of so little
# divergence that nothing else is multiplied, and so few exponentials that count, or so few
# different ones, that the errors do not average out.

TEMPERATURES = [0.5, 1.0, 2.0, 3.0, 3.5, 4.0, 5.0, 5.5, 6.0, 7.0, 8.0, 10.0, 11.5, 14.0, 17.0, 20.0]


def check_divergence(s, t, masked=0):
    for temperature in TEMPERATURES:
        log_p, log_q = ((v.double() / temperature).log_softmax(-1) for v in (t, s))
        expected = temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)
        student, teacher = (F.pad(v, (0, masked), value=-INF) for v in (s, t))
        for needs_grad in (False, True):
            x = student.requires_grad_(needs_grad)
            got = kd_loss(x, teacher, temperature=temperature, alpha=1.0, reduction="none")
            error = loss_error(got.detach().double(), expected)
            assert error <= 1, f"T = {temperature}: {error:.3g} times what is allowed"


@pytest.mark.parametrize("masked", [0, 2048, 32000])
@pytest.mark.parametrize("classes", [2, 10, 42, 70, 300, 1000, 2048])
def test_flat_rows_keep_the_bound_at_every_temperature(classes, masked):
    """All classes, and the few that are left of a vocabulary when the others are masked."""
    rows = 300_000 // (classes + masked)
    generator = torch.Generator().manual_seed(classes)
    s, t = torch.randn(2, rows, classes, generator=generator) * 0.3
    check_divergence(s, t, masked)


@pytest.mark.parametrize("noise", [1e-2, 1.0, 3.0])
@pytest.mark.parametrize("scale", [5.0, 20.0, 100.0])
@pytest.mark.parametrize("classes", [3, 31, 100, 1000])
def test_sure_rows_near_the_teacher_keep_the_bound_at_every_temperature(classes, scale, noise):
    generator = torch.Generator().manual_seed(classes)
    s, difference = torch.randn(2, 60_000 // classes, classes, generator=generator)
    check_divergence(s * scale, s * scale + difference * noise)


@pytest.mark.parametrize("classes", [10, 100, 1000, 5000, 32000])
@pytest.mark.parametrize("step", [0.25, 1.0, 4.0])
def test_logits_of_few_values_keep_the_bound_at_every_temperature(classes, step):
    """Equal logits have equal exponentials, with equal errors."""
    rows = 40 if classes < 5000 else 4
    generator = torch.Generator().manual_seed(classes)
    steps = torch.linspace(1, 2, rows)[:, None] * step
    s = torch.randint(0, 2, (rows, classes), generator=generator) * steps
    check_divergence(s, s + torch.randn(rows, classes, generator=generator) * 1e-3)


# --- the algebra -------------------------------------------------------------------------------


@given(problems(full_precision, full_precision), st.data())
@examples(120)
def test_the_offset_of_a_row_is_nothing_at_all(p, data):
    """On a grid on which the shift loses no digit, not a bit changes."""
    s, t = ((v.double() * 64).round().clamp(min=-1e4).where(v > -INF, v) / 64 for v in (p.s, p.t))
    s, t = (v - v.amax(-1, keepdim=True).clamp(min=-1e4) for v in (s, t))
    shift = st.lists(st.integers(-60_000, 60_000), min_size=len(s), max_size=len(s))
    plain = p._replace(s=s.to(p.s.dtype), t=t.to(p.t.dtype))
    shifted = [
        (v + torch.tensor(data.draw(shift), dtype=torch.float64)[:, None]).to(dtype)
        for v, dtype in ((s, p.s.dtype), (t, p.t.dtype))
    ]
    terms, grad = measured(plain)
    got_terms, got_grad = measured(p._replace(s=shifted[0], t=shifted[1]))
    assert torch.equal(got_grad, grad)
    for got, expected in zip(got_terms, terms, strict=True):
        if p.options["label_smoothing"] == 0:
            assert torch.equal(got, expected)
        else:  # the mean over all classes of s itself comes in
            assert loss_error(got, expected) <= 1


@given(problems(), st.randoms(use_true_random=False))
@examples(120)
def test_the_order_of_the_classes_means_nothing(p, random):
    order = list(range(p.s.shape[-1]))
    random.shuffle(order)
    order = torch.tensor(order)
    place, y, weight = order.argsort(), p.y, p.options["weight"]
    if y is not None:
        y = torch.where(active(p)[1], place[y.clamp(0, len(order) - 1).long()], y)
    permuted = Problem(p.s[:, order], p.t[:, order], y, p.options)
    if weight is not None:
        permuted = permuted.change(weight=weight[order])
    terms, grad = measured(permuted)
    assert_same(p, (terms, grad[:, place]), measured(p))


@given(problems(), st.randoms(use_true_random=False))
@examples(120)
def test_the_order_of_the_rows_means_nothing(p, random):
    order = list(range(len(p.s)))
    random.shuffle(order)
    order = torch.tensor(order, dtype=torch.long)
    y = None if p.y is None else p.y[order]
    terms, grad = measured(Problem(p.s[order], p.t[order], y, p.options))
    place = order.argsort()
    if p.options["reduction"] == "none":
        terms = [term[place] for term in terms]
    assert_same(p, (terms, grad[place]), measured(p))


@given(problems(plain=True), st.integers(-8, 0), st.integers(0, 2**32))
@examples(120)
def test_the_divergence_is_never_negative_and_next_to_nothing_between_equals(p, exponent, seed):
    """Rounding must not show below zero, least of all where teacher and student all but agree."""
    noise = torch.randn(p.s.shape, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    near = p._replace(t=(p.s.double() + noise).to(p.t.dtype)).change(reduction="none")
    assert (measured(near)[0][1] >= 0).all()
    assert loss_error(measured(near)[0][1], truth(near)[0][1]) <= 1
    equal = near._replace(t=p.s.clone())
    assert (measured(equal)[0][1] >= 0).all()
    assert (measured(equal)[0][1] <= LOSS_BOUND).all()


@given(problems())
@examples(120)
def test_every_row_of_the_gradient_adds_up_to_zero(p):
    _, grad = measured(p)
    assume_no_coincidence(p, grad)
    # An error of that norm adds up to no more than sqrt(C) of it.
    bound = GRAD_BOUND[p.s.dtype] * grad.norm() + floor(p)
    assert (grad.sum(-1).abs() <= 1.01 * p.s.shape[-1] ** 0.5 * bound).all()


@given(problems())
@examples(120)
def test_none_sum_and_mean_are_one_loss(p):
    soft_rows, hard_rows = active(p)
    weight, y = p.options["weight"], p.y
    counts = [soft_rows.sum().double(), hard_rows.sum().double()]
    if weight is not None and y is not None:
        counts[1] = weight[y[hard_rows].long()].sum()
    (_, *rows), each = measured(p.change(reduction="none"))
    (_, *sums), total = measured(p.change(reduction="sum"))
    (mean, *means), _ = measured(p.change(reduction="mean"))
    assert torch.equal(each, total)
    for row, whole, average, count in zip(rows, sums, means, counts, strict=True):
        assert loss_error(whole, row.sum()) <= 1 + len(row)
        assert loss_error(average, whole / (count if count > 0 else 1)) <= 2
    alpha = p.options["alpha"]
    parts = [w * term for w, term in ((alpha, means[0]), (1 - alpha, means[1])) if w]
    assert loss_error(mean, sum(parts)) <= 2


@given(problems())
@examples(120)
def test_alpha_blends_the_two_terms(p):
    assume(p.y is not None)
    alpha = p.options["alpha"]
    (soft, *_), soft_grad = measured(p.change(alpha=1.0))
    (hard, *_), hard_grad = measured(p.change(alpha=0.0))
    (loss, *_), grad = measured(p)
    parts = [(w, *of) for w, *of in ((alpha, soft, soft_grad), (1 - alpha, hard, hard_grad)) if w]
    assert loss_error(loss, sum(w * value for w, value, _ in parts)) <= 2
    for share, of in ((1.0, soft_grad), (0.0, hard_grad), (alpha, grad)):
        assume_no_coincidence(p.change(alpha=share), of)
    norms = grad.norm() + sum(w * part.norm() for w, _, part in parts)
    bound = 1.01 * GRAD_BOUND[p.s.dtype] * norms + 2 * floor(p)
    assert (grad - sum(w * part for w, _, part in parts)).norm() <= bound


@given(problems(), st.sampled_from([1, 2, 15, 16, 33, 2048]), st.floats(0, 1))
@examples(120)
def test_masked_classes_may_be_added_anywhere(p, count, where):
    """A vocabulary padded with -inf in both is the vocabulary (Liger-Kernel #634)."""
    p = p.change(label_smoothing=0.0)  # that one spreads over the padding too
    at = round(where * p.s.shape[-1])

    def padded(v, value):
        return torch.cat([v[..., :at], v.new_full((*v.shape[:-1], count), value), v[..., at:]], -1)

    y, weight = p.y, p.options["weight"]
    if y is not None:
        kept, ignored = active(p)[1], -100  # no class of the wider vocabulary
        y = torch.where(y >= at, y + count, y).where(kept, ignored)
        p = p._replace(y=p.y.where(kept, ignored)).change(ignore_index=ignored)
    wide = Problem(padded(p.s, -INF), padded(p.t, -INF), y, p.options)
    if weight is not None:
        wide = wide.change(weight=padded(weight, 1.0))
    terms, grad = measured(wide)
    assert (grad[:, at : at + count] == 0).all()
    grad = torch.cat([grad[:, :at], grad[:, at + count :]], -1)
    assert_same(p, (terms, grad), measured(p))


@given(problems(), st.integers(1, 3), st.sampled_from([math.nan, INF, -INF, 0.0]))
@examples(120)
def test_ignored_rows_may_be_added_whatever_they_hold(p, count, junk):
    assume(p.y is not None)
    p = p.change(distill_ignored=False)
    s, t = (torch.cat([v, v.new_full((count, v.shape[-1]), junk)]) for v in (p.s, p.t))
    y = torch.cat([p.y, p.y.new_full((count,), p.options["ignore_index"])])
    terms, grad = measured(Problem(s, t, y, p.options))
    expected_terms, expected_grad = measured(p)
    assert (grad[len(p.s) :] == 0).all()
    assert torch.equal(grad[: len(p.s)], expected_grad)
    for got, expected in zip(terms, expected_terms, strict=True):
        assert torch.equal(got[: len(p.s)] if p.options["reduction"] == "none" else got, expected)
