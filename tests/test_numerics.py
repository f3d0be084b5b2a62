"""Loss and gradient against the formula in float64, within the error that the package promises."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from oracle import oracle

from kdkernels import kd_loss

LOSS_BOUND = 2e-6  # times (1 + |loss|)
GRAD_BOUND = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.bfloat16: 2.0**-8,  # half a unit of the last place: the rounding of the output alone
    torch.float16: 2.0**-11,
}


def inputs(n, c, scale=3.0, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + 1000 * n + c)
    s, t = (torch.randn(n, c, generator=generator) * scale for _ in range(2))
    return s.to(dtype), t.to(dtype), torch.randint(c, (n,), generator=generator)


def check(s, t, y, backend="cpu", **options):
    expected_loss, soft, hard, expected_grad = oracle(s, t, y, **options)
    x = s.clone().requires_grad_()
    terms = kd_loss(x, t, y, return_terms=True, backend=backend, **options)
    for name, got, expected in zip(
        ("loss", "soft", "hard"), terms, (expected_loss, soft, hard), strict=True
    ):
        error = (got.detach().double() - expected).abs().max()
        bound = (LOSS_BOUND * (1 + expected.abs())).max()
        assert error <= bound, f"{name}: off by {error:.3g}, allowed {bound:.3g}"
    # The incoming gradient lifts float16's out of its subnormals, as a gradient scaler does.
    scale = 65536.0 if s.dtype == torch.float16 else 1.0
    (terms.loss.sum() * scale).backward()
    error = (x.grad.double() / scale - expected_grad).norm()
    bound = GRAD_BOUND[s.dtype] * expected_grad.norm() + 1e-30
    assert error <= bound, f"gradient: off by {error:.3g}, allowed {bound:.3g}"


# 1 and 2: no softmax to speak of. 31, 100, 257: below, off and above a vector. 1423, 50257, 129920,
# 151643: vocabularies that are no multiple of a block (verl #2899). 2047 to 2049 and 4097: around a
# block. 32000 and 262144: the smallest and the largest vocabulary in use.
SIZES = [1, 2, 3, 10, 31, 100, 257, 1000, 1423, 2047, 2048, 2049, 4097, 32000]
LARGE = [50257, 129920, 151643, 262144]
# 1 to 4 share one exponential between both terms, the others don't.
TEMPERATURES = [0.5, 1.0, 1.7, 2.0, 3.0, 4.0, 6.0, 8.0, 20.0]


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("classes", SIZES)
def test_float32_at_every_size_and_temperature(classes, temperature):
    for n, scale in itertools.product((1, 7), (1.0, 8.0)):
        check(*inputs(n, classes, scale), temperature=temperature)


@pytest.mark.parametrize("temperature", [0.5, 4.0, 5.5, 20.0])
@pytest.mark.parametrize("classes", LARGE)
def test_float32_at_vocabulary_sizes(classes, temperature):
    check(*inputs(2, classes, 4.0), temperature=temperature)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [1, 2, 10, 100, 1423, 2049, 32000, 151643])
def test_every_dtype(classes, dtype):
    for temperature in (0.5, 2.0, 7.0):
        check(*inputs(3, classes, dtype=dtype), temperature=temperature)


@pytest.mark.parametrize("dtype", GRAD_BOUND)
@pytest.mark.parametrize("classes", [32000, 32003])
def test_gradients_too_large_for_the_caches(classes, dtype):
    """From 4 MiB on they are written past them, where a row starts on a vector: all, or few."""
    rows = 1 + (4 << 20) // (classes * dtype.itemsize)
    s, t, y = inputs(rows, classes, dtype=dtype)
    check(s, t, y, temperature=2.0)
    y[3] = -100
    weight = torch.rand(classes) + 0.5
    check(s, t, y, temperature=3.5, label_smoothing=0.1, weight=weight)
    if dtype == torch.float32:
        near = t + 1e-4 * s  # done again in double
        check(near, t, y, temperature=1.0, alpha=1.0)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("classes", [10, 1000, 5000])
def test_every_share_of_the_terms(classes, alpha):
    check(*inputs(5, classes), alpha=alpha, temperature=3.0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("distill_ignored", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
def test_every_option_of_the_cross_entropy(
    backend, reduction, distill_ignored, weighted, label_smoothing
):
    for dtype, (n, c) in itertools.product((torch.float32, torch.float64), [(9, 10), (6, 3001)]):
        if backend == "reference" and dtype == torch.float32:
            continue  # the reference is the truth in float64; float32 there is PyTorch's own
        s, t, y = inputs(n, c, dtype=dtype)
        y[1::3] = -100
        weight = torch.rand(c, dtype=dtype) + 0.5 if weighted else None
        check(
            s,
            t,
            y,
            backend,
            reduction=reduction,
            distill_ignored=distill_ignored,
            weight=weight,
            label_smoothing=label_smoothing,
        )


@pytest.mark.parametrize("classes", [3, 10, 100, 2049])
def test_a_gradient_of_differences_keeps_its_digits(classes):
    """Confident rows: p, q and r are all near 1 at one class, and q - p and r - 1 cancel."""
    for confidence in (5.0, 12.0, 25.0):
        s, t, y = inputs(4, classes, 1.0)
        s[torch.arange(4), y] += confidence + s.max()
        t[torch.arange(4), y] += confidence + t.max()
        for temperature in (1.0, 2.0, 2.5):
            _, _, _, truth = oracle(s, t, y, temperature=temperature)
            x = s.clone().requires_grad_()
            kd_loss(x, t, y, temperature=temperature).backward()
            # At the sure class the oracle itself cancels; a row's gradient adds up to zero.
            truth[torch.arange(4), y] = 0.0
            truth[torch.arange(4), y] = -truth.sum(-1)
            assert (x.grad.double() - truth).norm() <= 2e-6 * truth.norm()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("alpha", [0.9, 1.0])
@pytest.mark.parametrize("classes", [2, 10, 100, 2049, 32000])
def test_a_student_close_to_its_teacher_still_gets_a_gradient(classes, alpha, inplace):
    """q - p is a small difference of exponentials: float32 alone would leave 1e-7 / |q - p|."""
    for distance, temperature in itertools.product((1e-1, 1e-2, 1e-4), (1.0, 2.0, 4.0, 20.0)):
        _, t, y = inputs(3, classes)
        s = t + distance * inputs(3, classes, 1.0, seed=1)[0]
        s[1] = t[1] + 1.0  # the same distribution: exactly no divergence
        loss, _, _, truth = oracle(s, t, y, temperature=temperature, alpha=alpha)
        x = s.clone().requires_grad_()
        got = kd_loss(x * 1, t, y, temperature=temperature, alpha=alpha, inplace=inplace)
        got.backward()
        assert abs(got.double() - loss) <= LOSS_BOUND * (1 + loss)
        for row in (0, 2):
            error = (x.grad[row].double() - truth[row]).norm()
            assert error <= GRAD_BOUND[torch.float32] * truth[row].norm() + 1e-12


@pytest.mark.parametrize("classes", [3, 5, 8, 9, 17, 40, 130])
@pytest.mark.parametrize("label_smoothing", [0.1, 1.0])
def test_a_student_that_has_learnt_its_smoothed_labels_still_gets_a_gradient(
    classes, label_smoothing
):
    """r is all but the smoothed label. Sizes: of the last vector some lanes are beyond the row."""
    _, noise, y = inputs(1, classes)
    target = torch.full((1, classes), label_smoothing / classes)
    target[0, y] += 1 - label_smoothing
    s = target.log() + 0.01 * noise
    options = {"alpha": 0.0, "label_smoothing": label_smoothing}
    truth = oracle(s, s, y, **options)[3]
    x = s.clone().requires_grad_()
    kd_loss(x, s, y, **options).backward()
    assert (x.grad.double() - truth).norm() <= GRAD_BOUND[torch.float32] * truth.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_are_rounded_as_torch_rounds(dtype):
    """To the nearest, ties to even: the float32 gradient of the same values, converted."""
    s, t, y = inputs(64, 33, dtype=dtype)
    options = {"temperature": 1.0, "reduction": "sum"}
    half, single = s.clone().requires_grad_(), s.float().requires_grad_()
    kd_loss(half, t, y, **options).backward()
    kd_loss(single, t, y, **options).backward()
    same = half.grad == single.grad.to(dtype)
    assert same.float().mean() > 0.99  # float16 is scaled first: its subnormals may differ


def test_a_large_class_weight_does_not_push_a_float16_gradient_out_of_range():
    """It is scaled by what its largest entry may be, and the largest weight is part of that."""
    s, t, y = inputs(4, 10, dtype=torch.float16)
    weight = torch.ones(10)
    weight[y[0]] = 2e5
    truth = oracle(s, t, y, reduction="sum", weight=weight)[3]
    x = s.clone().requires_grad_()
    kd_loss(x, t, y, reduction="sum", weight=weight).backward()
    assert (x.grad.double() - truth).norm() <= GRAD_BOUND[torch.float16] * truth.norm()


@pytest.mark.parametrize("classes", [10, 300, 3000])
def test_asking_for_a_gradient_leaves_the_loss_alone(classes):
    """Not one bit of it, where the gradient alone has to be done again in double."""
    s, t, _ = inputs(4, classes)
    near = s + 1e-3 * t
    options = {"alpha": 1.0, "temperature": 1.0, "reduction": "none"}
    with torch.no_grad():
        alone = kd_loss(near, s, **options)
    assert torch.equal(kd_loss(near.requires_grad_(), s, **options).detach(), alone)


def test_the_loss_is_accumulated_in_float32_for_half_precision():
    """A sum of 8,192 rows in fp16 or bf16 overflows or stalls (Liger-Kernel #300)."""
    for dtype in (torch.float16, torch.bfloat16):
        s, t, y = inputs(8192, 50, scale=8.0, dtype=dtype)
        loss = kd_loss(s, t, y, reduction="sum")
        assert loss.dtype == torch.float32
        expected = oracle(s, t, y, reduction="sum")[0]
        assert expected > 65504  # beyond float16
        assert abs(loss.double() - expected) <= LOSS_BOUND * (1 + expected)


def test_rows_beyond_2_to_the_31_elements_apart():
    """64-bit offsets: row * stride overflows 32 bits (TRL #7266). Nothing that large is touched."""
    rows, classes = 3, 10
    stride = 2**30 + 7
    s = torch.empty(2 * stride + classes, dtype=torch.bfloat16)  # virtual until it is written
    s = s.as_strided((rows, classes), (stride, 1))
    values, t, y = inputs(rows, classes, dtype=torch.bfloat16)
    s.copy_(values)
    assert torch.equal(kd_loss(s, t, y), kd_loss(values, t, y))


SET_SCRIPT = """
import sys, torch
from kdkernels import kd_loss, _cpu
torch.manual_seed(0)
results = []
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for c in (1, 3, 10, 17, 100, 2049, 5000):
        for temperature in (0.7, 1.0, 2.0, 3.0, 4.0, 20.0):
            s, t = torch.randn(2, 5, c, dtype=torch.float64).mul(3).to(dtype)
            s.requires_grad_()
            y = torch.randint(c, (5,))
            loss = kd_loss(s, t, y, temperature=temperature, label_smoothing=0.1)
            loss.backward()
            results.append((loss.detach(), s.grad))
torch.save((_cpu.instruction_set(), results), sys.argv[1])
"""


@pytest.fixture(scope="module")
def results_of_set(tmp_path_factory):
    def run(name):
        path = tmp_path_factory.mktemp("sets") / name
        environment = os.environ | {"KDKERNELS_CPU": name}
        subprocess.run([sys.executable, "-c", SET_SCRIPT, path], env=environment, check=True)
        used, results = torch.load(path)
        if used != name:
            pytest.skip(f"this machine cannot execute {name}")
        return results

    return run


@pytest.mark.parametrize("name", ["avx2", "avx512"])
def test_every_instruction_set_agrees_with_the_portable_one(results_of_set, name):
    for (loss, grad), (expected_loss, expected_grad) in zip(
        results_of_set(name), results_of_set("portable"), strict=True
    ):
        torch.testing.assert_close(loss, expected_loss, rtol=4e-6, atol=4e-6)
        bound = 2 * GRAD_BOUND[grad.dtype] * expected_grad.double().norm() + 1e-7
        assert (grad.double() - expected_grad.double()).norm() <= bound
