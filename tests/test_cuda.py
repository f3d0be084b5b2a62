"""The CUDA kernels without a GPU: what they compute, run on the CPU, and what they compile to."""

import functools
import itertools
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from comparing import assert_close, assert_same_bits, value_and_grad
from cuda_on_cpu import CUDAOnCPU, build, load
from oracle import oracle
from targets import TARGETS, if_asked
from test_numerics import GRAD_BOUND, check, inputs

from kdkernels import TopKTeacher, _cpu, backends, kd_loss
from kdkernels.backends.cuda import CUDABackend

TESTS = Path(__file__).parent
NVCC = shutil.which(os.environ.get("NVCC", "nvcc"))
ARCHITECTURES = sorted(target[3:] for target in TARGETS if target.startswith("sm_"))
# What tests/native/cuda_on_cpu.h plays: with clusters and without, and both with so little shared
# memory that a row of a few thousand classes is read again in chunks.
H100, A100, SMALL_WITH_CLUSTERS, SMALL = range(4)
DEVICES = [H100, A100, SMALL_WITH_CLUSTERS, SMALL]
# Eight lanes of a warp (to 60 classes of 4 bytes), a warp (to 508), a block, and on the small ones
# clusters of 2, 8 and 16 blocks or chunks.
REGIMES = [10, 300, 1423, 2600, 9001, 20000]
NAN, INF = math.nan, math.inf
LIFT = torch.tensor(2.0**24)  # float16's gradients out of its subnormals
value_and_grad = functools.partial(value_and_grad, "cuda")


@pytest.fixture(scope="module")
def module_path(tmp_path_factory):
    path = build(tmp_path_factory.mktemp("cuda"))
    if path is None:
        pytest.skip("needs a C++ compiler")
    return path


@pytest.fixture
def on(module_path, monkeypatch):
    """Makes ``backend="cuda"`` play a GPU on the CPU."""
    module = load(module_path)

    def choose(device):
        monkeypatch.setitem(backends.BACKENDS, "cuda", CUDAOnCPU(module, device))
        backends.select.cache_clear()

    yield choose
    backends.select.cache_clear()


# ---- what they compute --------------------------------------------------------------------------


def ask_the_cpus_tests(module_path, questions):
    """Runs test files on the CUDA kernels: (device, what is left out, file names) each."""

    def ask(question):
        device, left_out, files = question
        environment = os.environ | {
            "KD_CUDA_MODULE": str(module_path),
            "KD_CUDA_DEVICE": str(device),
            "KDKERNELS_CHECK_LABELS": "1",  # as the CPU does
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
        }
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        command += ["-p", "cuda_as_cpu", "-k", f"not ({left_out})", *(TESTS / f for f in files)]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    with ThreadPoolExecutor() as pool:
        for done in pool.map(ask, questions):
            assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def test_all_that_is_asked_of_the_cpu_kernel_holds(module_path):
    """Every size to 262,144, temperature, dtype and special value of these two files."""
    of_the_cpu = "too_large_for_the_caches or instruction_set"
    files = ["test_numerics.py", "test_special_values.py"]
    vocabulary = f"{of_the_cpu} or vocabulary_sizes"
    ask_the_cpus_tests(
        module_path, [(H100, of_the_cpu, files), (SMALL_WITH_CLUSTERS, vocabulary, files)]
    )


def test_whatever_else_is_asked_of_the_cpu_kernel_holds(module_path):
    """Every objective, teacher and option, by the general kernel, in rows that need not be long:
    all threads of a block share a row from 1,025 classes on."""
    long = "2049 or 5000 or 1000 or 3000 or many_blocks"
    of_others = "reference or named or wrong or disk or says or do_not_lift or derivative"
    left_out = f"{long} or {of_others} or value_and_gradient[1.0"
    ask_the_cpus_tests(
        module_path,
        [
            (
                SMALL_WITH_CLUSTERS,
                left_out,
                [
                    "test_objectives.py",
                    "test_learnable_temperature.py",
                    "test_teachers.py",
                    "test_num_items.py",
                ],
            ),
            (
                A100,
                f"{left_out} or change_no_bit",
                ["test_divergences.py", "test_dkd.py"],
            ),
        ],
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("classes", REGIMES)
def test_every_regime_and_dtype(on, device, classes):
    on(device)
    for dtype, temperature in itertools.product(GRAD_BOUND, (2.0, 4.0)):
        check(*inputs(3, classes, dtype=dtype), backend="cuda", temperature=temperature)


@pytest.mark.parametrize("device", [H100, SMALL_WITH_CLUSTERS, SMALL])
@pytest.mark.parametrize("classes", REGIMES)
def test_rows_done_again_in_double(on, device, classes):
    """For the loss at T = 20, for the gradient where the student all but equals its teacher."""
    on(device)
    s, t, y = inputs(2, classes)
    check(s, t, y, backend="cuda", temperature=20.0)
    near = s + 1e-5 * t
    check(near, s, y, backend="cuda", alpha=1.0, temperature=1.0)
    x = near.clone().requires_grad_()
    logits = x * 1
    kd_loss(logits, s, alpha=1.0, temperature=1.0, inplace=True, backend="cuda").backward()
    assert_close(x.grad, oracle(near, s, alpha=1.0, temperature=1.0)[3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", REGIMES[:2])
def test_the_special_function_unit_is_not_trusted_with_small_differences(on, classes, dtype):
    """Logits near 0 are fine enough to differ by less than its error is multiplied by."""
    on(H100)
    t = inputs(3, classes, 0.002, dtype)[0]
    s = (t.float() * (1 + 2.0**-7)).to(dtype)
    for temperature in (1.0, 2.0):
        truth = oracle(s, t, alpha=1.0, temperature=temperature)[3]
        grad = value_and_grad(s, t, None, LIFT, alpha=1.0, temperature=temperature)[3]
        assert_close(grad, LIFT * truth)


@pytest.mark.parametrize("device", [H100, SMALL_WITH_CLUSTERS, SMALL])
@pytest.mark.parametrize("classes", REGIMES)
def test_a_gradient_of_differences_keeps_its_digits(on, device, classes):
    """Confident rows: p, q and r are all near 1 at one class, and q - p and r - 1 cancel."""
    on(device)
    for confidence, dtype in itertools.product((5.0, 25.0), (torch.float32, torch.bfloat16)):
        s, t, y = inputs(3, classes, 1.0)
        rows = torch.arange(3)
        s[rows, y] += confidence + s.max()
        t[rows, y] += confidence + t.max()
        s, t = s.to(dtype), t.to(dtype)
        y[2] = (y[2] + 1) % classes  # sure, and wrong
        for temperature in (1.0, 2.5):
            truth = oracle(s, t, y, temperature=temperature)[3]
            grad = value_and_grad(s, t, y, temperature=temperature)[3]
            # At the sure class the oracle itself cancels; a row's gradient adds up to zero.
            sure = s.argmax(-1)
            truth[rows, sure] = 0.0
            truth[rows, sure] = -truth.sum(-1)
            assert_close(grad, truth)


@pytest.mark.parametrize("device", [H100, SMALL])
@pytest.mark.parametrize("student_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mixed_dtypes(on, device, student_dtype, teacher_dtype):
    on(device)
    for classes in (10, 300, 2601):
        s, t, y = inputs(2, classes)
        check(s.to(student_dtype), t.to(teacher_dtype), y, backend="cuda", temperature=2.0)


@pytest.mark.parametrize("device", [H100, SMALL_WITH_CLUSTERS])
@pytest.mark.parametrize("classes", [10, 301, 2601])
@pytest.mark.parametrize("inplace", [False, True])
def test_rows_at_any_alignment_and_stride(on, device, classes, inplace):
    """Heads and tails of vectors; student, teacher and gradient each misaligned in its own way."""
    on(device)
    for dtype, (a, b) in itertools.product(
        (torch.float32, torch.bfloat16), ((0, 0), (1, 1), (1, 0), (2, 3))
    ):
        s, t = torch.randn(2, 2, 3, classes + 5).to(dtype).unbind()
        s, t = s[:, :-1, a : a + classes], t[:, 1:, b : b + classes]
        y = torch.randint(classes, s.shape[:-1])
        truth = oracle(s, t, y)[3]
        base = s._base.clone()
        x = base.requires_grad_()
        logits = (x * 1)[0, :, :-1, a : a + classes]
        kd_loss(logits, t, y, inplace=inplace, backend="cuda").backward()
        assert_close(x.grad[0, :, :-1, a : a + classes], truth)
        x.grad[0, :, :-1, a : a + classes] = 0
        assert not x.grad.any()


@pytest.mark.parametrize("device", [H100, SMALL_WITH_CLUSTERS, SMALL])
@pytest.mark.parametrize("classes", REGIMES)
def test_ignored_rows_are_zero_and_not_read(on, device, classes):
    on(device)
    s, t, y = inputs(4, classes)
    s[1], t[2], y[1:3] = NAN, -INF, -100
    check(s, t, y, backend="cuda")
    grad = value_and_grad(s, t, y)[3]
    assert not grad[1:3].any()
    y[:] = -100
    loss, _, _, grad = value_and_grad(s, t, y)
    assert loss == 0
    assert not grad.any()


@pytest.mark.parametrize("classes", [10, 2601])
def test_a_label_out_of_range_makes_its_row_nan_and_no_other(on, classes):
    on(SMALL)
    s, t, y = inputs(4, classes)
    y[1], y[2] = classes, -7
    loss, _, _, grad = value_and_grad(s, t, y, reduction="none")
    bad = torch.tensor([False, True, True, False])
    assert torch.equal(loss.isnan(), bad)
    assert torch.equal(grad.isnan(), bad[:, None].expand_as(grad))
    soft_only = value_and_grad(s, t, y, alpha=1.0)
    assert soft_only[0].isfinite()
    assert soft_only[3].isfinite().all()


def test_labels_are_checked_if_asked(on, monkeypatch):
    on(H100)
    monkeypatch.setenv("KDKERNELS_CHECK_LABELS", "1")
    s, t, y = inputs(4, 10)
    y[2] = 10
    with pytest.raises(IndexError, match=r"labels\[2\] is 10"):
        kd_loss(s, t, y, backend="cuda")


def test_more_rows_than_each_block_counts_for_itself(on):
    on(H100)
    s, t, y = inputs(20000, 3)
    y[::4] = -100
    check(s, t, y, backend="cuda")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 1, 50])
def test_any_number_of_rows(on, reduction, rows):
    on(H100)
    check(*inputs(rows, 7), backend="cuda", reduction=reduction) if rows else None
    s, t, y = inputs(rows, 7)
    loss, _, _, grad = value_and_grad(s, t, y, reduction=reduction)
    assert loss.shape == ((rows,) if reduction == "none" else ())
    assert loss.isfinite().all()
    assert grad.shape == s.shape


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_inputs_give_the_same_bits(on, device):
    """And a loss that is only looked at those of one that is trained with."""
    on(device)
    for classes in REGIMES[:4]:
        s, t, y = inputs(5, classes)
        first = value_and_grad(s, t, y)
        assert_same_bits(value_and_grad(s, t, y), first)
        assert torch.equal(kd_loss(s, t, y, backend="cuda"), first[0])


@pytest.mark.parametrize("dtype", GRAD_BOUND)
def test_what_flows_in_multiplies_the_gradient(on, dtype):
    on(H100)
    s, t, y = inputs(5, 43, dtype=dtype)
    y[3] = -100
    truth = oracle(s, t, y)[3]
    for factor in (1.0, 1024.0, -0.375, 0.0):
        grad = value_and_grad(s, t, y, torch.tensor(factor))[3].double()
        subnormal = 2.0**-25 * math.sqrt(grad.numel()) if dtype == torch.float16 else 0
        bound = 2 * GRAD_BOUND[dtype] * (truth * factor).norm() + subnormal
        assert (grad - truth * factor).norm() <= bound
    # One for all, and one for each row: these have heads and tails that are no whole vectors.
    for reduction, shape in (("mean", ()), ("none", (5,))):
        grad = value_and_grad(s, t, y, torch.full(shape, INF), reduction=reduction)[3]
        assert torch.equal(grad == 0, (torch.arange(5) == 3)[:, None].expand_as(grad))


@pytest.mark.parametrize("classes", [10, 2601])
def test_each_row_gets_its_own_factor(on, classes):
    on(H100)
    s, t, y = inputs(6, classes)
    rows = oracle(s, t, y, reduction="none")[3]
    factors = torch.arange(12.0).view(6, 2)[:, 1]  # not contiguous
    for incoming in (factors, factors.to(torch.bfloat16), torch.tensor(3.0).expand(6)):
        grad = value_and_grad(s, t, y, incoming, reduction="none")[3]
        assert_close(grad, rows * incoming.double()[:, None])


def test_a_factor_of_one_leaves_memory_alone(on):
    """Not even NaN is rewritten: what is there keeps its bits."""
    on(H100)
    bits = torch.full((1, 19), 0x7FA1, dtype=torch.int16)  # a product would be another NaN
    grad = bits.view(torch.bfloat16)
    backends.BACKENDS["cuda"].scale(grad, torch.tensor(1.0), 1.0)
    backends.BACKENDS["cuda"].scale(grad, torch.tensor([8.0]), torch.tensor(8.0).double())
    assert (bits == 0x7FA1).all()


def test_a_graph_kept_hands_out_its_gradient_twice(on):
    on(H100)
    s, t, y = inputs(4, 100)
    x = s.requires_grad_()
    loss = kd_loss(x, t, y, backend="cuda")
    (first,) = torch.autograd.grad(loss, x, torch.tensor(2.0), retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, 2 * second)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_incoming_gradient_with_a_lazy_minus_sign(on, reduction):
    """As complex arithmetic above the loss makes it: what a pointer shows has the other sign."""
    on(H100)
    x, t, y = inputs(3, 10)
    incoming = torch.ones(3 if reduction == "none" else (), dtype=torch.complex64)
    incoming = torch.view_as_complex(torch.stack([incoming.real, incoming.real], -1)).conj().imag
    assert incoming.is_neg()
    grads = []
    for gradient in (incoming, incoming.resolve_neg()):
        logits = x.clone().requires_grad_()
        kd_loss(logits, t, y, reduction=reduction, backend="cuda").backward(gradient)
        grads.append(logits.grad)
    assert torch.equal(*grads)


# ---- the general kernel -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["jsd", "dkd", "nkd", "wsld"])
def test_a_bad_label_makes_its_row_nan_whatever_is_asked_for(on, name):
    on(H100)
    s, t, y = inputs(4, 40)
    y[1], y[2] = 40, -7
    bad = torch.tensor([False, True, True, False])
    options = {"divergence": name, "reduction": "none"}
    loss, _, _, grad = value_and_grad(s, t, y, **options)
    assert torch.equal(loss.isnan(), bad)
    assert torch.equal(grad.isnan(), bad[:, None].expand_as(grad))
    soft_only = value_and_grad(s, t, y, alpha=1.0, **options)
    needed = bad & (name != "jsd")
    assert torch.equal(soft_only[0].isnan(), needed)
    assert torch.equal(soft_only[3].isnan(), needed[:, None].expand_as(grad))


@pytest.mark.parametrize("tail", ["renormalize", "bucket", "zero"])
def test_a_known_class_that_is_none_makes_its_row_nan(on, tail, monkeypatch):
    """On a GPU nobody has looked at the indices."""
    on(H100)
    s, t, y = inputs(5, 40)
    teacher = TopKTeacher.from_logits(t, 5, tail, 4.0)
    teacher.indices[0, 2], teacher.indices[1, 0] = 40, -1
    teacher.values[2, 1], teacher.values[3, 1] = NAN, INF
    monkeypatch.setattr("kdkernels.checks._check_entries", lambda *_: None)
    loss, _, _, grad = value_and_grad(s, teacher, y, reduction="none")
    bad = torch.tensor([True, True, True, True, False])
    assert torch.equal(loss.isnan(), bad)
    assert torch.equal(grad.isnan(), bad[:, None].expand_as(grad))


@pytest.mark.parametrize("margin", [20.0, 40.0])
@pytest.mark.parametrize("name", ["jsd", "reverse_kl", "hard", "nkd", "dkd", "wsld"])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_entry_of_a_class_that_is_all_there_is(on, margin, name, alpha):
    """q - 1 is 0 there, or has few digits; but the entries of a row's gradient add up to 0."""
    on(A100)
    s, t, y = inputs(4, 30)
    s[torch.arange(4), torch.where(torch.arange(4) < 2, y, (y + 1) % 30)] += margin
    t[[0, 3], torch.stack((y[0], (y[3] + 1) % 30))] += margin + 1
    options = {"divergence": name, "alpha": alpha, "temperature": 1.0, "reduction": "none"}
    grad = value_and_grad(s, t, y, **options)[3].double()
    assert (grad.sum(-1).abs() <= 2e-7 * grad.norm(dim=-1)).all()


def test_the_entries_of_a_bucket_that_is_all_there_is(on):
    """Of what is known there is next to nothing, and the others' df/dq is nearly the mean."""
    on(A100)
    s, t, y = inputs(4, 30)
    s[:, :3], t[:, :3] = s[:, :3] - 35, t[:, :3] - 35
    indices = torch.arange(3).expand(4, 3)
    teacher = TopKTeacher(F.log_softmax(t.double(), -1)[:, :3], indices, "bucket")
    for name in ("forward_kl", "reverse_kl", "jsd"):
        options = {"divergence": name, "alpha": 1.0, "temperature": 1.0, "reduction": "none"}
        grad = value_and_grad(s, teacher, y, **options)[3].double()
        assert (grad.sum(-1).abs() <= 2e-7 * grad.norm(dim=-1)).all()


def test_a_tail_that_is_left_out_of_an_alpha_divergence(on):
    """Neither distribution adds up to 1 then."""
    on(H100)
    s, t, y = inputs(3, 20)
    teacher = TopKTeacher.from_logits(t.double(), 4, "zero", 4.0)
    options = {"divergence": "alpha", "alpha": 1.0, "reduction": "none"}
    loss, _, _, grad = value_and_grad(s, teacher, y, **options)
    x = s.double().requires_grad_()
    expected = kd_loss(x, teacher, y, backend="reference", **options)
    expected.sum().backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    assert_close(grad, x.grad)


@pytest.mark.parametrize("name", ["hard", "nkd", "wsld"])
def test_a_term_of_weight_zero_is_no_part_of_a_row(on, name):
    on(H100)
    s, t, y = inputs(3, 7)
    t[0, 3] = NAN
    mixture = {"forward_kl": 0.0, name: torch.tensor([0.0, 1.0, 2.0])}
    loss, soft, _, grad = value_and_grad(s, t, y, divergence=mixture, reduction="none")
    assert soft[0] == 0
    assert torch.isfinite(loss).all()
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("classes", [10, 1500])
def test_a_row_has_the_same_bits_wherever_it_is(on, classes):
    """Whichever block has it, and whether its gradient is asked for."""
    s, t, y = inputs(5, classes)
    options = {"divergence": "jsd", "standardize": True, "reduction": "none"}
    on(A100)
    loss, _, _, grad = value_and_grad(s, t, y, **options)
    on(SMALL_WITH_CLUSTERS)
    assert torch.equal(kd_loss(s, t, y, backend="cuda", **options), loss)
    for i in (1, 4):
        one = value_and_grad(s[i : i + 1], t[i : i + 1], y[i : i + 1], **options)
        assert_same_bits((one[0][0], one[3][0]), (loss[i], grad[i]))


@pytest.mark.parametrize("weights", ["sample_weight", "jsd", "temperature", "weight"])
def test_float16_holds_gradients_of_rows_that_count_much(on, weights):
    """The power of two that its gradient is kept with knows of the largest of them."""
    on(H100)
    s, t, y = inputs(4, 30, 9e3 if weights == "temperature" else 3.0, torch.float16)
    options = {"divergence": "jsd", "reduction": "sum"}
    large = torch.tensor([1.0, 3e4, 2.0, 0.5])
    if weights == "jsd":
        options["divergence"] = {"jsd": large}
    else:
        options[weights] = torch.linspace(1, 3e4, 30) if weights == "weight" else large
    grad = value_and_grad(s, t, y, **options)[3]
    x = s.double().requires_grad_()
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    kd_loss(x, t.double(), y, backend="reference", **wide).backward()
    assert torch.isfinite(grad).all()
    assert (grad - x.grad).norm() <= 2 * GRAD_BOUND[torch.float16] * x.grad.norm()


@pytest.mark.parametrize("student_dtype", GRAD_BOUND)
@pytest.mark.parametrize("teacher_dtype", GRAD_BOUND)
def test_any_two_dtypes(on, student_dtype, teacher_dtype):
    on(H100)
    s, t, y = inputs(3, 20)
    s, t = s.to(student_dtype), t.to(teacher_dtype)
    check(s, t, y, backend="cuda", temperature=2.0)
    lift = torch.tensor(2.0**12)
    grad = value_and_grad(s, t, y, lift, divergence="reverse_kl")[3]
    x = s.double().requires_grad_()
    kd_loss(x, t.double(), y, backend="reference", divergence="reverse_kl").backward()
    assert_close(grad, lift * x.grad)


# ---- the choice ---------------------------------------------------------------------------------


def test_cuda_then_triton_then_the_reference_with_one_warning(monkeypatch):
    class Other:
        device_types = ("cuda",)
        features = None

        def __init__(self, name, reason):
            self.name, self.reason = name, reason

        def why_not(self, device, student_dtype, teacher_dtype):
            return self.reason

    def choose(cuda, triton, *features):
        for name, reason in (("cuda", cuda), ("triton", triton)):
            other = Other(name, reason)
            other.specialised = {"cuda": frozenset(), "triton": frozenset({"some"})}[name]
            monkeypatch.setitem(backends.BACKENDS, name, other)
        backends.select.cache_clear()
        kinds = torch.device("cuda", 0), torch.float32, torch.float32
        return backends.select(None, *kinds, frozenset(features)).name

    assert choose(None, None) == "cuda"
    assert choose(None, None, "some") == "triton"  # which has a kernel made for it
    assert choose(None, "no driver", "some") == "cuda"
    assert choose(None, None, "some", "others") == "cuda"
    assert choose("not built", None) == "triton"  # and no warning, which would be an error here
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert choose("not built", "no driver") == "reference"
        backends.select(None, torch.device("cuda", 0), *[torch.float32] * 2, frozenset())
    assert len(caught) == 1
    assert re.search("not built.*no driver", str(caught[0].message))
    backends.select.cache_clear()


def test_the_gpu_of_the_logits_is_asked_and_no_other(monkeypatch):
    """Asking makes a context, which takes hundreds of megabytes of a GPU that is another's."""
    asked = []

    class Module:
        architectures = "sm_90"

        @staticmethod
        def why_not(index):
            asked.append(index)
            return "" if index == 1 else "no kernel image"

    backend = CUDABackend()
    monkeypatch.setattr(backend, "module", Module)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, index))
    kinds = torch.float32, torch.float32
    assert backend.why_not(torch.device("cuda", 1), *kinds) is None
    assert asked == [1]
    reason = backend.why_not(torch.device("cuda", 2), *kinds)
    assert reason == "built for sm_90, and this GPU is sm_82: no kernel image"
    assert asked == [1, 2]


@pytest.mark.parametrize(
    ("visible", "environment", "expected"),
    [
        (["7.5", "12.0", "9.0", "9.0"], {}, (["90", "120"], False)),
        (["7.5"], {"KDKERNELS_CUDA": "1"}, (["80", "90"], True)),
        (["9.0"], {"KDKERNELS_CUDA_ARCHS": "sm_80, 100"}, (["80", "100"], False)),
        (["7.5"], {}, "sm_80 or later was visible"),
        (["9.0"], {"KDKERNELS_CUDA_ARCHS": "80;hopper"}, "'hopper': expected such as 80;90"),
        (["9.0"], {"KDKERNELS_CUDA": "0"}, "KDKERNELS_CUDA=0"),
    ],
)
def test_what_the_kernels_are_built_for(monkeypatch, tmp_path, visible, environment, expected):
    listing = tmp_path / "nvidia-smi"  # in the place of one that might find a GPU
    listing.write_text("#!/bin/sh\n" + "".join(f"echo {each}\n" for each in visible))
    listing.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name in ("KDKERNELS_CUDA", "KDKERNELS_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    architectures = runpy.run_path(str(TESTS.parent / "setup.py"))["cuda_architectures"]
    if isinstance(expected, str):
        with pytest.raises(RuntimeError, match=expected):
            architectures()
    else:
        assert architectures() == expected


def test_info_says_why_there_is_no_cuda(capsys):
    from kdkernels.__main__ import main

    if backends.BACKENDS["cuda"].unavailable() is None:
        pytest.skip("there is CUDA, on a GPU")
    main(["info"])
    assert re.search(r"cuda +no +\S+", capsys.readouterr().out)


# ---- what they compile to -----------------------------------------------------------------------


@pytest.fixture
def built(beside):
    """The module as setup.py builds it for ARCHITECTURES, and what the compiler said."""
    if not NVCC:
        pytest.skip("needs nvcc")
    return beside["built"].result()


def build_with_nvcc(folder):
    if not NVCC:
        return None
    path = folder / Path(_cpu.__file__).name.replace("_cpu", "_cuda")
    # In a process of its own, as it sets what others look at.
    environment = os.environ | {
        "KDKERNELS_CUDA": "1",
        "KDKERNELS_CUDA_ARCHS": ";".join(ARCHITECTURES),
    }
    script = (
        "import runpy, setuptools, sys\n"
        "setuptools.setup = lambda **_: None\n"
        "setup = runpy.run_path(sys.argv[1])\n"
        "from pathlib import Path\n"
        "print(setup['find_ninja']())\n"
        "print(setup['cuda_ninja_file'](Path(sys.argv[2]), setup['find_compiler']()), end='')\n"
    )
    asked = [sys.executable, "-c", script, TESTS.parent / "setup.py", path]
    said = subprocess.run(asked, env=environment, check=True, capture_output=True, text=True)
    ninja, description = said.stdout.split("\n", 1)
    assert description.count(f"{NVCC} -std") == 1
    description = description.replace(f"{NVCC} -std", f"{NVCC} -Xptxas=-v -std")
    (folder / "build.ninja").write_text(description, encoding="utf-8")
    done = subprocess.run([ninja, "-C", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    return path, done.stdout


@if_asked
def test_no_kernel_spills_a_register_or_has_a_stack(built, record_property):
    about = r"function '(\w+)' for '(sm_\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores"
    kernels = re.findall(about + r".*?Used (\d+) registers", built[1], re.DOTALL)
    assert len(kernels) == built[1].count("bytes stack frame") > 30 * len(ARCHITECTURES)
    for name, architecture, stack, spilled, registers in kernels:
        assert (stack, spilled) == ("0", "0"), (name, architecture)
        record_property(f"{name} {architecture} registers", int(registers))


@if_asked
def test_rows_are_moved_16_bytes_at_a_time(built):
    """Into shared memory, out of it, and the gradient to global memory, in every kernel."""
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    sass = subprocess.run([tool, "-sass", built[0]], check=True, capture_output=True, text=True)
    kernels = [k for k in sass.stdout.split("Function :")[1:] if "rows_kernel" in k.split()[0]]
    assert len(kernels) > 30 * len(ARCHITECTURES)
    for kernel in kernels:
        name = kernel.split()[0]
        for access in (r"LDGSTS\S*\.128", r"LDS\S*\.128", r"STG\S*\.128"):
            if "rows_kernelId" in name and access.startswith("LDS"):
                continue  # in double a class at a time: registers are worth more
            assert re.search(access, kernel), (name, access)
        assert not re.search(r"\b(LDL|STL)\b", kernel), name


@if_asked
def test_the_cuda_build_names_no_library_of_torch(built):
    """And it loads where there is no GPU, and says so."""
    binary = built[0].read_bytes()
    for library in (b"libtorch", b"libc10", b"libcudart.so"):
        assert library not in binary
    # By a process of its own: pybind11 has one module of a name, and here that is the stand-in.
    script = f"import _cuda; print(_cuda.architectures, _cuda.__file__ == {str(built[0])!r})"
    environment = os.environ | {"PYTHONPATH": str(built[0].parent)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    named = ", ".join(f"sm_{a}" for a in ARCHITECTURES)
    assert done.stdout.split("\n")[0] == f"{named} True"
