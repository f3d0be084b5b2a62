"""The same inputs give the same bits in every run, thread, layout and process; nothing is kept.

The compiled kernel shares torch's OpenMP threads. Rows are handed out to whoever is free, so the
bits must not depend on it; a forked child inherits the library but none of its threads.
"""

import concurrent.futures
import gc
import itertools
import math
import os
import subprocess
import sys
import weakref

import pytest
import torch

from kdkernels import kd_loss

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs fork and /proc")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
REDUCTIONS = ["mean", "sum", "none"]
THREADS = [1, 2, 3, 4]
# Rows * classes on both sides of 32768, from where on threads share the rows; row counts that no
# number of threads divides; rows longer than a block of 2048, and fewer rows than threads.
SHAPES = [(1, 10), (7, 100), (13, 2520), (13, 2521), (2, 40000), (257, 300), (1009, 67), (3, 33000)]


@pytest.fixture(autouse=True)
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def inputs(rows, classes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    s, t = (torch.randn(rows, classes, generator=generator) * 3 for _ in range(2))
    y = torch.randint(classes, (rows,), generator=generator)
    y[2::5] = -100
    return s.to(dtype), t.to(dtype), y


def result(s, t, y, **options):
    """Loss, both terms and the gradient."""
    x = s.detach().requires_grad_()
    terms = kd_loss(x, t, y, return_terms=True, backend="cpu", **options)
    (grad,) = torch.autograd.grad(terms.loss.sum(), x)
    return [*(term.detach() for term in terms), grad]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distill_ignored", [False, True])
@pytest.mark.parametrize("classes", [1, 2, 10, 32, 33, 100, 600])
def test_a_row_has_the_bits_that_it_has_alone(classes, distill_ignored, dtype):
    """Short rows are computed together, whatever their neighbours hold."""
    s, t, y = inputs(37, classes, dtype)
    s[1] += 60 * torch.nn.functional.one_hot(y[1].clamp_min(0), classes)  # sure
    s[3] = t[3] + 1e-4 * s[3]  # done again in double
    s[5, 0], t[6, -1] = -math.inf, -math.inf
    s[8] = math.nan
    options = {"distill_ignored": distill_ignored, "reduction": "none", "temperature": 4.0}
    together = result(s, t, y, **options)
    for i in range(len(s)):
        alone = result(s[i : i + 1], t[i : i + 1], y[i : i + 1], **options)
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a.nan_to_num(7.0), b[i : i + 1].nan_to_num(7.0))


# --- runs and thread counts --------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_number_of_threads_changes_no_bit(shape, dtype, reduction):
    s, t, y = inputs(*shape, dtype)
    expected = None
    for threads in THREADS:
        torch.set_num_threads(threads)
        got = result(s, t, y, reduction=reduction, temperature=2.0)
        expected = expected or got
        assert same(got, expected)


@pytest.mark.parametrize("temperature", [1.0, 2.5, 9.0])
def test_no_option_lets_the_threads_show(temperature):
    s, t, y = inputs(211, 331)
    weight = torch.rand(331, generator=torch.Generator().manual_seed(1)) + 0.5
    for alpha, smoothing, distill_ignored in itertools.product(
        (0.0, 0.4, 1.0), (0.0, 0.1), (False, True)
    ):
        results = []
        for threads in THREADS:
            torch.set_num_threads(threads)
            results.append(
                result(
                    s,
                    t,
                    y,
                    alpha=alpha,
                    temperature=temperature,
                    label_smoothing=smoothing,
                    weight=weight,
                    distill_ignored=distill_ignored,
                )
            )
        assert all(same(results[0], other) for other in results[1:])


@pytest.mark.parametrize("scale", [1.0, 20.0])
@pytest.mark.parametrize("classes", [10, 100, 300, 1000, 3000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_asking_for_the_gradient_or_the_terms_changes_no_bit_of_the_loss(dtype, classes, scale):
    """Validation computes what training does."""
    s, t, y = inputs(60, classes)
    s, t = (s * scale).to(dtype), (s * scale + t).to(dtype)
    for temperature in (1.0, 2.0, 3.5, 4.0, 6.0, 10.0, 17.0):
        options = {"temperature": temperature, "reduction": "none"}
        expected = result(s, t, y, **options)
        x = s.clone().requires_grad_()
        assert same(kd_loss(s, t, y, return_terms=True, **options), expected[:3])
        assert torch.equal(kd_loss(s, t, y, **options), expected[0])
        assert torch.equal(kd_loss(x, t, y, **options).detach(), expected[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scaled_gradient_depends_on_no_thread_either(dtype):
    s, t, y = inputs(257, 300, dtype)
    factors = torch.randn(257, generator=torch.Generator().manual_seed(1))
    results = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        x = s.clone().requires_grad_()
        loss = kd_loss(x, t, y, reduction="none", backend="cpu")
        results.append(torch.autograd.grad(loss, x, factors.to(loss.dtype)))
    assert all(same(results[0], other) for other in results[1:])


@pytest.mark.parametrize("shape", [(7, 100), (257, 300)], ids=str)
def test_twenty_runs_give_one_result(shape):
    """Scratch memory is kept from call to call: what other calls left there must not show."""
    torch.set_num_threads(4)
    s, t, y = inputs(*shape)
    expected = result(s, t, y)
    for run in range(20):
        result(*inputs(3 + run, 500 * (1 + run % 5), DTYPES[run % 4], seed=run))
        assert same(result(s, t, y), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [5, 63, 300, 2101])
def test_where_the_rows_lie_changes_no_bit(dtype, classes):
    """Alignment, strides and a neighbour's values are no part of the input."""
    s, t, y = inputs(9, classes, dtype)
    expected = result(s, t, y)
    for offset in (1, 3):
        moved = []
        for v in (s, t):
            wide = torch.full((9, classes + 7), float("nan"), dtype=dtype)
            wide[:, offset : offset + classes] = v
            moved.append(wide[:, offset : offset + classes])
        assert same(result(*moved, y), expected)
    assert same(result(s.T.contiguous().T, t, y), expected)


# --- calls from several Python threads -----------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 50), (40, 1500)], ids=["gil held", "gil released"])
def test_calls_from_several_python_threads_do_not_disturb_each_other(shape):
    rows, classes = shape
    work = [
        (*inputs(rows + i % 3, classes + 7 * i, DTYPES[i % 4], seed=i), {"temperature": 1 + i % 5})
        for i in range(24)
    ]

    def call(s, t, y, options):
        return result(s, t, y, **options)

    expected = [call(*arguments) for arguments in work]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for got, want in zip(pool.map(lambda a: call(*a), work), expected, strict=True):
                assert same(got, want)


def test_backward_may_run_in_another_thread_than_the_forward():
    s, t, y = inputs(40, 1500)
    expected = result(s, t, y)[-1]
    x = s.clone().requires_grad_()
    loss = kd_loss(x, t, y, backend="cpu")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        kept = pool.submit(lambda: torch.autograd.grad(loss, x, retain_graph=True)[0]).result()
        taken = pool.submit(lambda: torch.autograd.grad(loss, x)[0]).result()
    assert torch.equal(kept, expected)
    assert torch.equal(taken, expected)
    assert kept.data_ptr() != taken.data_ptr()


@pytest.mark.parametrize("shape", [(8, 50), (40, 1500)], ids=["gil held", "gil released"])
def test_an_error_in_one_thread_spoils_no_other_call(shape):
    s, t, y = inputs(*shape)
    expected = result(s, t, y)
    bad = y.clone()
    bad[-1] = shape[1]

    def call(i):
        if i % 2:
            return result(s, t, y)
        with pytest.raises(IndexError, match=f"labels.{shape[0] - 1}. is {shape[1]}"):
            result(s, t, bad)
        return None

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        got = list(pool.map(call, range(32)))
    assert all(same(g, expected) for g in got[1::2])
    assert same(result(s, t, y), expected)


# --- forked processes ----------------------------------------------------------------------------

# The child kills itself if it hangs: it would outlive a parent that is killed for waiting.
FORK_SCRIPT = """
import os, signal, sys, torch
from kdkernels import kd_loss
path, before = sys.argv[1:]
torch.set_num_threads(2)

def run():
    results = []
    for n, c in ((3, 10), (64, 3000)):
        generator = torch.Generator().manual_seed(c)
        s, t = (torch.randn(n, c, generator=generator) for _ in range(2))
        s.requires_grad_()
        loss = kd_loss(s, t, torch.arange(n) % c, temperature=2.0, backend="cpu")
        loss.backward()
        results += [loss.detach(), s.grad]
    return results

if before == "the kernel":
    run()
elif before == "torch":
    torch.randn(500, 500).mm(torch.randn(500, 500)).exp().sum()
pid = os.fork()
if pid == 0:
    signal.alarm(8)
    torch.save(run(), path)
    if before == "nothing":  # threads of its own, which its own child lacks
        grandchild = os.fork()
        if grandchild == 0:
            signal.alarm(8)
            run()
            os._exit(0)
        os._exit(os.waitpid(grandchild, 0)[1] != 0)
    os._exit(0)
_, status = os.waitpid(pid, 0)
assert status == 0, f"the child ended with status {status}"
expected = run()  # the parent keeps its threads
assert all(torch.equal(a, b) for a, b in zip(torch.load(path), expected, strict=True))
"""

LOADER_SCRIPT = """
import torch
from torch.utils.data import DataLoader, Dataset
from kdkernels import kd_loss

class Losses(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        s, t = (torch.randn(64, 3000, generator=generator) for _ in range(2))
        s.requires_grad_()
        loss = kd_loss(s, t, torch.arange(64), backend="cpu")
        (grad,) = torch.autograd.grad(loss, s)
        return torch.cat([loss.detach()[None], grad.flatten()])

torch.set_num_threads(2)
expected = [Losses()[i] for i in range(6)]
loader = DataLoader(
    Losses(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=30
)
for _ in range(2):
    assert all(torch.equal(a, b) for a, b in zip(loader, expected, strict=True))
"""


def run_script(script, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@linux
@pytest.mark.parametrize("before", ["the kernel", "torch", "nothing"])
def test_a_forked_child_gets_the_same_bits(tmp_path, before):
    """``before`` the fork, that ran in parallel: a thread pool that the child does not have."""
    run_script(FORK_SCRIPT, str(tmp_path / "child"), before)


@linux
def test_forked_data_loader_workers_get_the_same_bits():
    run_script(LOADER_SCRIPT)


# --- nothing is kept -----------------------------------------------------------------------------


def forward_and_backward(x, t, y):
    kd_loss(x * 1, t, y, backend="cpu").backward()


def backward_twice(x, t, y):
    loss = kd_loss(x * 1, t, y, backend="cpu")
    loss.backward(retain_graph=True)
    loss.backward()


def in_place(x, t, y):
    kd_loss(x * 1, t, y, inplace=True, backend="cpu").backward()


def in_place_on_a_view(x, t, y):
    kd_loss((x * 1).view(x.shape), t, y, inplace=True, backend="cpu").backward()


def forward_alone(x, t, y):
    kd_loss(x * 1, t, y, backend="cpu")


def in_place_forward_alone(x, t, y):
    kd_loss(x * 1, t, y, inplace=True, backend="cpu")


def every_row(x, t, y):
    losses = kd_loss(x * 1, t, y, reduction="none", return_terms=True, backend="cpu").loss
    losses.backward(torch.ones_like(losses))


def second_derivative(x, t, y):
    (grad,) = torch.autograd.grad(kd_loss(x * 1, t, y, backend="cpu"), x, create_graph=True)
    grad.square().sum().backward()


def bad_label(x, t, y):
    with pytest.raises(IndexError):
        kd_loss(x * 1, t, y + x.shape[-1], backend="cpu")


STEPS = [
    forward_and_backward,
    backward_twice,
    in_place,
    in_place_on_a_view,
    forward_alone,
    in_place_forward_alone,
    every_row,
    second_derivative,
    bad_label,
]
steps = pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@steps
def test_logits_die_without_the_garbage_collector(step):
    """A reference cycle would keep gigabytes of logits until Python thinks of looking."""
    t = torch.randn(4, 6)
    x = torch.randn(4, 6, requires_grad=True)
    dead = []
    x.register_hook(lambda grad: dead.append(weakref.ref(grad)))
    logits = x * 1
    dead += [weakref.ref(t), weakref.ref(x), weakref.ref(logits)]
    step(logits, t, torch.arange(4))
    del logits, x, t
    assert [ref() for ref in dead] == [None] * len(dead)


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("teacher_mode", [torch.no_grad, torch.inference_mode])
def test_backward_lets_go_of_the_logits_while_the_loss_lives_on(inplace, teacher_mode):
    """Losses are kept for logging: an epoch of them must not be an epoch of logits."""
    x = torch.randn(4, 6, requires_grad=True)
    with teacher_mode():
        t = torch.randn(4, 6) * 2
    logits = x * 1
    refs = [weakref.ref(logits), weakref.ref(t)]
    loss = kd_loss(logits, t, torch.arange(4), inplace=inplace, backend="cpu")
    del logits, t
    loss.backward()
    assert [ref() for ref in refs] == [None, None]
    assert loss.requires_grad


def resident_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@linux
@steps
def test_memory_does_not_grow(step):
    torch.set_num_threads(1)  # on a busy machine a step of two threads takes fifty times as long
    s, t, y = inputs(64, 2000)  # 0.5 MiB
    y = y.clamp(min=0)
    for count in (20, 200):
        before = resident_mib()
        for _ in range(count):
            step(s.clone().requires_grad_(), t, y)
    assert resident_mib() - before < 20  # one array leaked per call would be 100
