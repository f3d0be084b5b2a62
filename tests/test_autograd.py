"""The loss as a citizen of autograd: whoever asks gets the right gradient or an error.

The gradient is made in the forward and handed over in the backward, so whatever comes in between is
tested here: scaling, several losses, kept graphs, checkpoints, hooks, transforms, in-place work.
"""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from oracle import oracle
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kdkernels import FusedKDLoss, kd_loss

GRAD_BOUND = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}
backends = pytest.mark.parametrize("backend", ["cpu", "reference"])
reductions = pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
alphas = pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
dtypes = pytest.mark.parametrize("dtype", list(GRAD_BOUND))
USED = r"used again|modified"  # what the package or autograd says of overwritten logits


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)


def inputs(*shape, dtype=torch.float64, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    s, t = (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale for _ in range(2))
    labels = torch.randint(shape[-1], shape[:-1], generator=generator)
    return s.to(dtype), t.to(dtype), labels


def leaf(s):
    return s.clone().requires_grad_()


def eager(s, t, y=None, temperature=4.0, alpha=0.9):
    """What people write today, (N, C) and mean only."""
    log_q, p = F.log_softmax(s / temperature, -1), F.softmax(t / temperature, -1)
    loss = alpha * temperature**2 * F.kl_div(log_q, p, reduction="batchmean")
    return loss if y is None else loss + (1 - alpha) * F.cross_entropy(s, y)


def assert_close(got, expected, bound=None):
    """Within the promised share of the norm."""
    bound = GRAD_BOUND[got.dtype] if bound is None else bound
    error, norm = (got.double() - expected.double()).norm(), expected.double().norm()
    assert error <= bound * norm + 1e-30, f"off by {error / norm:.3g} of the norm, not {bound:.3g}"


# --- derivatives against finite differences ---------------------------------------------------

IGNORED = [1]  # rows
VARIANTS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.2},
    "weighted": {"weight": torch.tensor([0.5, 2.0, 1.0, 0.0, 1.5]).double()},
    "ignored": {"ignore_index": -7},
    "distilled": {"ignore_index": -7, "distill_ignored": True},
}
VARIANTS["all"] = {k: v for options in VARIANTS.values() for k, v in options.items()}
variants = pytest.mark.parametrize("variant", VARIANTS)


def loss_of(variant, backend, **options):
    """Student logits, and the loss as a function of them alone."""
    s, t, y = inputs(3, 5)
    options = {"temperature": 2.5, "backend": backend, **VARIANTS[variant], **options}
    y[IGNORED] = options.get("ignore_index", int(y[IGNORED]))
    return leaf(s), lambda x: kd_loss(x, t, y, **options)


@backends
@reductions
@alphas
@variants
def test_both_derivatives_agree_with_finite_differences(backend, reduction, alpha, variant):
    x, loss = loss_of(variant, backend, reduction=reduction, alpha=alpha)
    assert torch.autograd.gradcheck(loss, x)
    assert torch.autograd.gradgradcheck(loss, x, fast_mode=True)


@backends
@pytest.mark.parametrize("temperature", [0.7, 1.0, 4.0])
def test_both_derivatives_agree_with_finite_differences_at_every_temperature(backend, temperature):
    x, loss = loss_of("all", backend, temperature=temperature, alpha=0.6)
    assert torch.autograd.gradcheck(loss, x)
    assert torch.autograd.gradgradcheck(loss, x)


@backends
@reductions
def test_both_derivatives_agree_with_finite_differences_without_labels(backend, reduction):
    s, t, _ = inputs(2, 2, 4)

    def loss(x):
        return kd_loss(x, t, temperature=3.0, alpha=1.0, reduction=reduction, backend=backend)

    assert torch.autograd.gradcheck(loss, leaf(s))
    assert torch.autograd.gradgradcheck(loss, leaf(s), fast_mode=True)


@backends
@alphas
def test_the_total_changes_with_each_model_weight_as_its_gradient_says(backend, alpha):
    """T² on the value and not on the gradient, or a term printed but without gradient (axolotl
    #3660), shows here and nowhere else."""
    images, t, y = torch.randn(6, 3).double(), *inputs(6, 4)[1:]
    weight = nn.Parameter(torch.randn(4, 3).double())

    def total():
        return kd_loss(images @ weight.T, t, y, temperature=3.0, alpha=alpha, backend=backend)

    total().backward()
    step = 1e-5
    with torch.no_grad():
        for i in range(weight.numel()):
            value = weight.view(-1)[i].item()
            around = []
            for moved in (value + step, value - step):
                weight.view(-1)[i] = moved
                around.append(total().item())
            weight.view(-1)[i] = value
            difference = (around[0] - around[1]) / (2 * step)
            assert difference == pytest.approx(weight.grad.view(-1)[i].item(), rel=1e-6, abs=1e-8)


@backends
@pytest.mark.parametrize(
    "changed",
    [
        {"temperature": 3.0},
        {"alpha": 0.3},
        {"ignore_index": 1},
        {"label_smoothing": 0.2},
        {"weight": torch.tensor([0.5, 2.0, 1.0, 0.1, 1.5])},
        {"reduction": "sum"},
        {"ignore_index": 1, "distill_ignored": True},
    ],
    ids=lambda changed: list(changed)[-1],
)
def test_no_option_is_accepted_and_unused(backend, changed):
    """Liger-Kernel #974: in the value and in the gradient."""
    s, t, _ = inputs(4, 5)
    y = torch.tensor([1, 0, 1, 4])
    base = {"temperature": 2.0, "alpha": 0.6}
    if "distill_ignored" in changed:
        base["ignore_index"] = changed["ignore_index"]
    losses, grads = [], []
    for options in (base, base | changed):
        x = leaf(s)
        losses.append(kd_loss(x, t, y, backend=backend, **options))
        losses[-1].backward()
        grads.append(x.grad)
    assert losses[0] != losses[1]
    assert not torch.equal(*grads)


# --- second derivatives -----------------------------------------------------------------------


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_second_derivative_is_that_of_the_formula(backend, dtype):
    s, t, y = inputs(5, 6, dtype=dtype)
    direction = torch.randn(5, 6, dtype=torch.float64)
    x, truth = leaf(s), leaf(s.double())
    first, second = [], []
    for logits, loss in (
        (x, kd_loss(x, t, y, temperature=3.0, backend=backend)),
        (truth, eager(truth, t.double(), y, temperature=3.0)),
    ):
        (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
        first.append(grad.detach())
        second += torch.autograd.grad((grad * direction.to(grad.dtype)).sum(), logits)
    assert_close(*first)
    assert_close(*second)


@backends
def test_the_second_derivative_knows_of_masked_classes(backend):
    """nan_to_num in the forward does not mend the backward (trl #5594), nor that one's backward."""
    s, t, _ = inputs(3, 8)
    y, keep = torch.tensor([0, 3, 7]), [0, 3, 4, 7]
    direction = torch.randn(3, 8).double()
    masked = torch.full((3, 8), -torch.inf).double()
    masked[:, keep] = s[:, keep]
    x, truth = leaf(masked), leaf(s[:, keep])
    loss = kd_loss(x, masked.where(masked == -torch.inf, t), y, backend=backend)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    (second,) = torch.autograd.grad((grad * direction).sum(), x)
    few = eager(truth, t[:, keep], torch.tensor([0, 1, 3]))
    (expected,) = torch.autograd.grad(few, truth, create_graph=True)
    (expected_second,) = torch.autograd.grad((expected * direction[:, keep]).sum(), truth)
    assert_close(grad[:, keep].detach(), expected.detach())
    assert_close(second[:, keep], expected_second)
    rest = [1, 2, 5, 6]
    assert (grad[:, rest] == 0).all()
    assert (second[:, rest] == 0).all()


@backends
@reductions
def test_a_differentiable_gradient_is_scaled_and_knows_its_factor(backend, reduction):
    """gradgradcheck alone would pass a backward that ignores the factor."""
    s, t, y = inputs(4, 5)
    y[2] = -100
    expected = oracle(s, t, y, reduction=reduction)[3]
    x, direction = leaf(s), torch.randn(4, 5).double()
    loss = kd_loss(x, t, y, reduction=reduction, backend=backend)
    factors = leaf(torch.randn(loss.shape).double())
    (grad,) = torch.autograd.grad(loss, x, factors, create_graph=True)
    per_row = factors.detach()[..., None] if reduction == "none" else factors.detach()
    assert_close(grad.detach(), per_row * expected)
    (slope,) = torch.autograd.grad((grad * direction).sum(), factors)
    products = (expected * direction).sum(-1)
    assert_close(slope, products if reduction == "none" else products.sum())


@backends
def test_a_teacher_from_inference_mode_takes_part_in_both_derivatives(backend):
    s, t, y = inputs(4, 5)
    with torch.inference_mode():
        teacher = t * 1
    x, truth = leaf(s), leaf(s)
    loss = kd_loss(x, teacher, y, backend=backend)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    (expected,) = torch.autograd.grad(eager(truth, t, y), truth, create_graph=True)
    grad.square().sum().backward(retain_graph=True)
    expected.square().sum().backward()
    assert_close(grad.detach(), expected.detach())
    assert_close(x.grad, truth.grad)
    assert_close(torch.autograd.grad(loss, x)[0], expected.detach())


@backends
def test_a_gradient_penalty_trains_the_model_as_the_formula_does(backend):
    images = torch.randn(6, 3).double()
    _, t, y = inputs(6, 4)
    model = nn.Linear(3, 4).double()
    grads = []
    for loss_fn in (lambda *a: kd_loss(*a, backend=backend), eager):
        x = leaf(images)
        loss = loss_fn(model(x), t, y)
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        grads.append(torch.autograd.grad(loss + 3 * slope.square().sum(), model.parameters()))
    for got, expected in zip(*grads, strict=True):
        assert_close(got, expected)


@backends
def test_a_differentiable_backward_leaves_a_plain_one_to_be_had(backend):
    s, t, y = inputs(4, 5)
    x = leaf(s)
    loss = kd_loss(x, t, y, backend=backend)
    (differentiable,) = torch.autograd.grad(loss, x, create_graph=True)
    (plain,) = torch.autograd.grad(loss, x)
    assert differentiable.requires_grad
    assert not plain.requires_grad
    assert_close(differentiable.detach(), plain)


@backends
def test_the_hessian_is_that_of_the_formula(backend):
    s, t, y = inputs(2, 4)
    got = torch.autograd.functional.hessian(lambda x: kd_loss(x, t, y, backend=backend), s)
    assert_close(got, torch.autograd.functional.hessian(lambda x: eager(x, t, y), s))


@backends
@pytest.mark.parametrize("create_graph", [False, True])
def test_hooks_on_the_logits_run_once(backend, create_graph):
    """A second derivative by a backward inside the backward would run them in both."""
    s, t, y = inputs(4, 5)
    expected = oracle(s, t, y)[3]
    calls = []
    x = leaf(s)
    logits = x * 1
    x.register_hook(lambda grad: grad * 3)
    logits.register_hook(lambda grad: calls.append(grad) or grad * 2)
    loss = kd_loss(logits, t, y, backend=backend)
    (grad,) = torch.autograd.grad(loss, x, create_graph=create_graph)
    assert len(calls) == 1
    assert_close(calls[0].detach(), expected)
    assert_close(grad.detach(), 6 * expected)


@backends
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_hook_on_a_leaf_runs_once(backend, create_graph):
    s, t, y = inputs(4, 5)
    x = leaf(s)
    x.register_hook(lambda grad: grad * 2)
    loss = kd_loss(x, t, y, backend=backend)
    (grad,) = torch.autograd.grad(loss, x, create_graph=create_graph)
    assert_close(grad.detach(), 2 * oracle(s, t, y)[3])


@pytest.mark.filterwarnings("ignore:Using backward")  # a cycle, which the test breaks
@backends
@pytest.mark.parametrize("create_graph", [False, True])
def test_retain_grad_on_the_logits_keeps_their_gradient_once(backend, create_graph):
    s, t, y = inputs(4, 5)
    x = leaf(s)
    logits = x * 1
    logits.retain_grad()
    kd_loss(logits, t, y, backend=backend).backward(create_graph=create_graph)
    kept, grad = logits.grad.detach(), x.grad.detach()
    logits.grad = x.grad = None
    assert_close(kept, oracle(s, t, y)[3])
    assert torch.equal(kept, grad)


@backends
@pytest.mark.parametrize("which", ["student", "teacher"])
def test_logits_modified_after_the_loss_spoil_a_second_derivative_in_no_silence(backend, which):
    s, t, y = inputs(4, 5)
    x, teacher = leaf(s), t.clone()
    logits = x * 1
    loss = kd_loss(logits, teacher, y, backend=backend)
    with torch.no_grad():
        (logits if which == "student" else teacher).mul_(2)
    if backend == "reference":  # it saves copies of what it needs
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        assert_close(grad.detach(), oracle(s, t, y)[3])
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, x, create_graph=True)


# --- several losses, several backwards ---------------------------------------------------------


@backends
@dtypes
def test_two_losses_on_one_logits_tensor_add_up(backend, dtype):
    """Liger-Kernel #272: the first loss's gradient overwrote the second's input."""
    s, t, y = inputs(6, 9, dtype=dtype)
    other = inputs(6, 9, dtype=dtype, seed=1)[1]
    x = leaf(s)
    scale = 256.0  # float16 keeps clear of its subnormals
    first = kd_loss(x, t, y, temperature=2.0, backend=backend)
    second = kd_loss(x, other, y, temperature=3.0, alpha=0.4, backend=backend)
    ((first + second) * scale).backward()
    assert torch.equal(x.detach(), s)
    expected = oracle(s, t, y, temperature=2.0)[3]
    expected += oracle(s, other, y, temperature=3.0, alpha=0.4)[3]
    # Each gradient and their sum are rounded: half a unit each, in most elements much less.
    assert_close(x.grad, scale * expected)


@backends
def test_one_loss_used_twice_counts_twice(backend):
    s, t, y = inputs(4, 5)
    x = leaf(s)
    loss = kd_loss(x, t, y, backend=backend)
    (0.25 * loss + 3 * loss).backward()
    assert_close(x.grad, 3.25 * oracle(s, t, y)[3])


@backends
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("incoming", [1.0, 0.3])
def test_backward_through_a_kept_graph_gives_the_gradient_again(backend, inplace, incoming):
    """Whoever receives a gradient may modify it: the next must not be made of the same memory."""
    s, t, y = inputs(4, 5)
    expected = incoming * oracle(s, t, y)[3]
    x = leaf(s)
    logits = x * 1
    loss = kd_loss(logits, t, y, inplace=inplace, backend=backend) * incoming
    for kept in (True, True, False):
        (grad,) = torch.autograd.grad(loss, x, retain_graph=kept)
        assert_close(grad, expected)
        grad.fill_(float("nan"))


@backends
@pytest.mark.parametrize("inplace", [False, True])
def test_two_backwards_add_up_in_grad(backend, inplace):
    s, t, y = inputs(4, 5)
    x = leaf(s)
    loss = kd_loss(x * 1, t, y, inplace=inplace, backend=backend)
    loss.backward(retain_graph=True)
    x.grad.mul_(2)  # an optimiser's clipping, say, works on the very memory that was handed over
    loss.backward()
    assert_close(x.grad, 3 * oracle(s, t, y)[3])


@backends
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("create_graph", [False, True])
def test_backward_through_a_freed_graph_says_so(backend, inplace, create_graph):
    s, t, y = inputs(4, 5)
    x = leaf(s)
    # A copy's own backward keeps nothing and so would not complain.
    loss = kd_loss(x.clone(), t, y, inplace=inplace, backend=backend)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    torch.autograd.grad(loss, x)
    with pytest.raises(RuntimeError, match=r"second time|create_graph"):
        torch.autograd.grad(loss, x, create_graph=create_graph)
    assert_close(first, oracle(s, t, y)[3])


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@backends
def test_checkpointing_changes_nothing(backend, inplace, use_reentrant):
    s, t, y = inputs(6, 7)
    layer = nn.Linear(7, 7).double()

    def part(hidden):
        return kd_loss(layer(hidden.tanh()), t, y, inplace=inplace, backend=backend) * 0.3

    def grads(run):
        x = leaf(s)
        loss = run(x)
        return loss.detach(), *torch.autograd.grad(loss, [x, *layer.parameters()])

    plain = grads(part)
    if use_reentrant:  # torch.autograd.grad is not for it
        x = leaf(s)
        loss = torch.utils.checkpoint.checkpoint(part, x, use_reentrant=True)
        loss.backward()
        checkpointed = loss.detach(), x.grad, layer.weight.grad, layer.bias.grad
    else:
        checkpointed = grads(
            lambda x: torch.utils.checkpoint.checkpoint(part, x, use_reentrant=False)
        )
    for got, expected in zip(checkpointed, plain, strict=True):
        assert torch.equal(got, expected)


@backends
def test_saved_tensors_may_live_elsewhere(backend):
    s, t, y = inputs(4, 5)
    x = leaf(s)
    with torch.autograd.graph.save_on_cpu():
        loss = kd_loss(x, t, y, backend=backend)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    assert_close(grad.detach(), oracle(s, t, y)[3])
    loss.backward()
    assert_close(x.grad, oracle(s, t, y)[3])


@backends
@dtypes
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "transposed"])
def test_inputs_come_out_as_they_went_in(backend, dtype, layout):
    """`.float()` of a float32 tensor is the same tensor: work in place would edit the logits."""
    s, t, y = inputs(6, 8, dtype=dtype)
    weight = torch.rand(5, dtype=torch.float64)
    y %= 5

    def laid_out(v):
        return v[:, :5].T.contiguous().T if layout == "transposed" else v[:, :5]

    if layout == "contiguous":
        s, t = s[:, :5].contiguous(), t[:, :5].contiguous()
    s, t = laid_out(s), laid_out(t)
    x, factors = s.detach().requires_grad_(), torch.rand(6)
    before = [v.clone() for v in (s, t, y, weight, factors)]
    loss = kd_loss(x, t, y, weight=weight, reduction="none", backend=backend)
    loss.backward(factors.to(loss.dtype), retain_graph=True)
    loss.backward(factors.to(loss.dtype))
    for now, then in zip((s, t, y, weight, factors), before, strict=True):
        assert torch.equal(now, then)


# --- incoming gradients -----------------------------------------------------------------------


def incoming_of(kind, shape, dtype):
    generator = torch.Generator().manual_seed(3)
    factors = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    return {
        "random": lambda: factors,
        "non-contiguous": lambda: factors.flip(0).T.contiguous().T,
        "expanded row": lambda: factors[:1].expand(shape),
        "expanded scalar": lambda: factors.flatten()[0].expand(shape),
        "large": lambda: factors * 65536,
        "zeros": lambda: factors * (factors > 0),
        "ones": lambda: torch.ones(shape, dtype=dtype),
    }[kind]()


KINDS = [
    "random",
    "non-contiguous",
    "expanded row",
    "expanded scalar",
    "large",
    "zeros",
    "ones",
]


@backends
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor_dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_row_is_scaled_by_its_own_incoming_gradient(backend, kind, factor_dtype):
    """Liger-Kernel #1298; Automodel #3853 used row 0's for all; quack #126 the layouts."""
    s, t, y = inputs(3, 4, 5)
    y[0, 1] = -100
    expected = oracle(s, t, y, reduction="none")[3]
    factors = incoming_of(kind, (3, 4), factor_dtype)
    x = leaf(s)
    kd_loss(x, t, y, reduction="none", backend=backend).backward(factors)
    assert_close(x.grad, factors.double()[..., None] * expected)


@backends
@dtypes
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_is_scaled_by_its_own_in_every_dtype(backend, dtype, kind):
    s, t, y = inputs(3, 8, 11, dtype=dtype)
    factors = incoming_of(kind, (3, 8), torch.float32)
    if dtype == torch.float16:  # 65536 is beyond float16 itself; small gradients are subnormal
        factors = factors * (2.0**-9 if kind == "large" else 256)
    x = leaf(s)
    loss = kd_loss(x, t, y, temperature=2.0, reduction="none", backend=backend)
    (loss * factors).sum().backward()
    expected = factors.double()[..., None] * oracle(s, t, y, temperature=2.0, reduction="none")[3]
    assert_close(x.grad, expected)


@backends
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("factor", [65536.0, 1.0, 0.3, 0.0, -1.5, 2.0**-20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_scaled_by_what_comes_in(backend, reduction, factor, dtype):
    s, t, y = inputs(5, 7, dtype=dtype)
    expected = factor * oracle(s, t, y, reduction=reduction)[3]
    ways = {
        "times": lambda loss: (loss * factor).backward(),
        "handed in": lambda loss: loss.backward(torch.tensor(factor, dtype=loss.dtype)),
        "handed in in bfloat16": lambda loss: loss.backward(
            torch.tensor(factor, dtype=torch.bfloat16)
        ),
        "expanded": lambda loss: (loss.expand(4, 2) * (factor / 8)).sum().backward(),
        "unsqueezed": lambda loss: (loss[None] * factor).backward(),
    }
    for way, run in ways.items():
        if way == "handed in in bfloat16" and factor == 0.3:
            continue  # no number of bfloat16
        x = leaf(s)
        run(kd_loss(x, t, y, reduction=reduction, backend=backend))
        assert_close(x.grad, expected)


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_loss_cast_to_another_dtype_passes_its_gradient_on(backend, dtype):
    s, t, y = inputs(4, 5, dtype=torch.float32)
    x = leaf(s)
    kd_loss(x, t, y, backend=backend).to(dtype).backward()
    assert x.grad.dtype == torch.float32
    assert_close(x.grad, oracle(s, t, y)[3])


@backends
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_float16_gradients_survive_until_the_scaler_lifts_them(backend, inplace, reduction):
    """Of a mean over many rows much lies below half of float16's smallest number, 6e-8."""
    s, t, y = inputs(1024, 8, dtype=torch.float16, scale=8.0)
    options = {"temperature": 1.0, "backend": backend, "inplace": inplace}
    x, scale = leaf(s), 2.0**20
    (kd_loss(x * 1, t, y, reduction=reduction, **options).mean() * scale).backward()
    expected = oracle(s, t, y, temperature=1.0)[3]
    small = expected.abs() < 2.0**-25
    assert small.float().mean() > 0.2
    got = x.grad.double() / scale
    assert_close(got, expected, GRAD_BOUND[torch.float16])
    assert_close(got[small], expected[small], GRAD_BOUND[torch.float16])


@backends
def test_a_gradient_scaler_gives_back_the_unscaled_gradient(backend):
    s, t, y = inputs(512, 8, dtype=torch.float32)
    logits = leaf(s)
    optimizer = torch.optim.SGD([logits], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    half = logits.half()
    scaler.scale(kd_loss(half, t, y, temperature=2.0, backend=backend)).backward()
    scaler.unscale_(optimizer)
    assert_close(logits.grad, oracle(half, t, y, temperature=2.0)[3], GRAD_BOUND[torch.float16])
    scaler.step(optimizer)
    assert torch.equal(logits.detach(), s - logits.grad)  # taken, and not skipped for an infinity


# --- ignored rows, single terms ----------------------------------------------------------------


@backends
@reductions
@pytest.mark.parametrize("factor", [1.0, 65536.0])
def test_a_batch_of_ignored_rows_is_a_connected_zero(backend, reduction, factor):
    """A fresh zero breaks backward and DDP, 0/0 the weights (LMOps #38, aiter #5165)."""
    model = nn.Linear(3, 5)
    logits, teacher, labels = model(torch.randn(4, 3)), torch.randn(4, 5), torch.full((4,), -100)
    loss = kd_loss(logits, teacher, labels, reduction=reduction, backend=backend)
    assert loss.requires_grad
    (loss.sum() * factor).backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert (parameter.grad == 0).all()


@backends
@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
def test_ignored_rows_have_no_gradient_whatever_comes_in(backend, factor):
    """Losses divided by a row's token count bring 1/0 to the rows that have none: 0 · inf."""
    s, t, y = inputs(4, 5)
    y[1] = -100
    incoming = torch.tensor([0.5, factor, 1.0, -2.0]).double()
    x = leaf(s)
    kd_loss(x, t, y, reduction="none", backend=backend).backward(incoming)
    assert (x.grad[1] == 0).all()
    expected = oracle(s, t, y, reduction="none")[3]
    kept = [0, 2, 3]
    assert_close(x.grad[kept], incoming[kept, None] * expected[kept])


@backends
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_single_term_has_its_own_gradient_alone(backend, alpha):
    s, t, y = inputs(6, 7)
    x, truth = leaf(s), leaf(s)
    kd_loss(x, t, y, temperature=3.0, alpha=alpha, backend=backend).backward()
    if alpha == 0:
        F.cross_entropy(truth, y).backward()
    else:
        eager(truth, t, temperature=3.0, alpha=1.0).backward()
    assert_close(x.grad, truth.grad)


@backends
@reductions
def test_the_terms_for_logging_have_no_graph(backend, reduction):
    s, t, y = inputs(6, 7)
    x = leaf(s)
    loss, soft, hard = kd_loss(x, t, y, reduction=reduction, return_terms=True, backend=backend)
    assert loss.requires_grad
    assert not soft.requires_grad
    assert not hard.requires_grad
    (loss.sum() + soft.sum() + hard.sum()).backward()
    assert_close(x.grad, oracle(s, t, y, reduction=reduction)[3])


@backends
def test_the_teacher_gets_no_gradient(backend):
    s, t, y = inputs(4, 5)
    x, teacher = leaf(s), leaf(t)
    loss = kd_loss(x, teacher, y, backend=backend)
    grads = torch.autograd.grad(loss, [x, teacher], allow_unused=True, create_graph=True)
    assert grads[1] is None
    assert torch.autograd.grad(grads[0].sum(), teacher, allow_unused=True) == (None,)
    loss.backward()
    assert teacher.grad is None


@backends
def test_a_teacher_with_a_graph_beside_a_student_without_gives_no_graph(backend):
    s, t, y = inputs(4, 5)
    assert not kd_loss(s, leaf(t), y, backend=backend).requires_grad


@backends
def test_a_student_that_is_its_own_teacher_learns_from_the_labels_alone(backend):
    s, _, y = inputs(4, 5)
    x = leaf(s)
    kd_loss(x, x, y, alpha=0.3, backend=backend).backward()
    assert_close(x.grad, 0.7 * oracle(s, s, y, alpha=0.0)[3])


@backends
@reductions
@pytest.mark.parametrize("mode", ["plain student", "no_grad", "inference_mode"])
def test_without_a_gradient_to_make_the_loss_is_plain_and_the_same(backend, reduction, mode):
    s, t, y = inputs(4, 5)
    options = {"reduction": reduction, "backend": backend}
    expected = kd_loss(leaf(s), t, y, **options).detach()
    with {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(
        mode, torch.enable_grad
    )():
        x = s.clone() if mode == "plain student" else leaf(s)
        loss = kd_loss(x, t, y, **options)
        # Nothing to overwrite the logits with.
        kd_loss(x, t, y, inplace=True, **options)
        assert torch.equal(x, s)
    assert not loss.requires_grad
    assert loss.grad_fn is None
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-13)


# --- inside a training loop --------------------------------------------------------------------


@backends
@alphas
def test_model_parameters_get_the_gradient_of_the_formula(backend, alpha):
    images, (_, t, y) = torch.randn(10, 6).double(), inputs(10, 7)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 7)).double()
    loss_fn = FusedKDLoss(temperature=3.0, alpha=alpha, backend=backend)
    got = torch.autograd.grad(loss_fn(model(images), t, y), model.parameters())
    expected = torch.autograd.grad(
        eager(model(images), t, y, temperature=3.0, alpha=alpha), model.parameters()
    )
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b)


@backends
@pytest.mark.parametrize("alpha", [0.3, 0.9])
def test_micro_batches_with_unequal_counts_accumulate_to_the_whole(backend, alpha):
    """Sums over one common count, as means of means are not the mean (trl #6006, verl #7200)."""
    s, t, y = inputs(12, 5)
    y[[0, 1, 2, 5, 9]] = -100
    whole, parts = leaf(s), leaf(s)
    options = {"alpha": alpha, "backend": backend}
    expected = kd_loss(whole, t, y, **options)
    expected.backward()
    total = 0
    for rows in torch.arange(12).split(5):  # 1, 3 and 3 rows that count
        part = kd_loss(parts[rows], t[rows], y[rows], reduction="sum", **options) / 7
        part.backward()
        total += part.detach()
    torch.testing.assert_close(total, expected.detach(), rtol=1e-13, atol=1e-13)
    assert_close(parts.grad, whole.grad)


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_half_logits_are_taken_as_they_are(backend, dtype):
    images, (_, t, y) = torch.randn(16, 6), inputs(16, 7, dtype=torch.float32)
    model = nn.Linear(6, 7)
    arrived = []
    with torch.autocast("cpu", dtype):
        logits = model(images)
        logits.register_hook(arrived.append)
        loss = kd_loss(logits, t, y, backend=backend)
    assert logits.dtype == dtype
    assert loss.dtype == torch.float32
    if backend == "cpu":  # no conversion, of the size of the logits, stands in between
        assert loss.grad_fn.next_functions[0][0] is logits.grad_fn
    scale = 256.0
    (loss * scale).backward()
    expected_loss, _, _, expected = oracle(logits, t, y)
    assert abs(loss.double() - expected_loss) <= 2e-6 * (1 + expected_loss)
    assert arrived[0].dtype == dtype
    assert_close(arrived[0], scale * expected)
    assert model.weight.grad.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@backends
@pytest.mark.parametrize("inplace", [False, True])
def test_backward_works_under_anomaly_detection(backend, inplace):
    s, t, y = inputs(4, 5)
    x = leaf(s)
    with torch.autograd.detect_anomaly(check_nan=True):
        (kd_loss(x * 1, t, y, inplace=inplace, backend=backend) * 0.5).backward()
    assert_close(x.grad, 0.5 * oracle(s, t, y)[3])


@backends
def test_hooks_on_the_loss_scale_what_comes_in(backend):
    s, t, y = inputs(4, 5)
    x = leaf(s)
    seen = []
    x.register_post_accumulate_grad_hook(lambda leaf: seen.append(leaf.grad.clone()))
    loss = kd_loss(x, t, y, backend=backend)
    loss.register_hook(lambda grad: grad * 3)
    loss.backward()
    assert len(seen) == 1
    assert_close(seen[0], 3 * oracle(s, t, y)[3])


@backends
def test_backward_for_chosen_inputs_leaves_the_others_alone(backend):
    s, t, y = inputs(4, 5)
    x, bias = leaf(s), leaf(torch.zeros(5).double())
    loss = kd_loss(x + bias, t, y, backend=backend)
    loss.backward(inputs=[bias])
    assert x.grad is None
    assert_close(bias.grad, oracle(s, t, y)[3].sum(0))


DDP_SCRIPT = """
import os, sys, torch
from torch import nn
from kdkernels import kd_loss
torch.manual_seed(0)
images, t, y = torch.randn(6, 8), torch.randn(6, 5), torch.randint(5, (6,))
model = nn.Linear(8, 5)
def loss(m):
    logits = m(images)
    return sum(kd_loss(logits[rows], t[rows], y[rows], backend=sys.argv[1])
               for rows in (slice(3), slice(3, 6)))
expected = torch.autograd.grad(loss(model), model.parameters())
torch.distributed.init_process_group(
    "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
parallel = nn.parallel.DistributedDataParallel(model)
loss(parallel).backward()
for parameter, want in zip(model.parameters(), expected, strict=True):
    torch.testing.assert_close(parameter.grad, want)
model.zero_grad()
kd_loss(parallel(images), t, torch.full((6,), -100), backend=sys.argv[1]).backward()
assert all((parameter.grad == 0).all() for parameter in model.parameters())
os._exit(0)  # gloo's threads and the interpreter can wait for each other at the end
"""


@backends
def test_under_ddp_two_losses_and_an_ignored_batch_work(backend):
    """DDP waits for a gradient of every parameter: all-ignored batches must bring one, of zeros."""
    subprocess.run([sys.executable, "-c", DDP_SCRIPT, backend], check=True, timeout=120)


class Operations(TorchDispatchMode):
    """Names of the operators that touch a tensor of ``numel`` elements."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.names = numel, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [v for v in (*args, result) if isinstance(v, torch.Tensor)]
        if any(v.numel() == self.numel for v in tensors):
            self.names.append(func.overloadpacket.__name__)
        return result


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.parametrize("inplace", [False, True])
def test_backward_hands_the_gradient_over_and_does_no_work_if_one_comes_in(
    reduction, dtype, factor, inplace
):
    s, t, y = inputs(6, 7, dtype=dtype)
    x = leaf(s)
    logits = x.clone()
    loss = kd_loss(logits, t, y, reduction=reduction, inplace=inplace)
    incoming = torch.tensor(factor, dtype=loss.dtype)
    with Operations(s.numel()) as work:
        loss.backward(incoming)
    # AccumulateGrad detaches what it takes over: no operation on the elements.
    assert [name for name in work.names if name != "detach"] == ["mul_"] * (factor != 1)
    assert_close(x.grad, factor * oracle(s, t, y, reduction=reduction)[3])


# --- transforms: right or refused --------------------------------------------------------------


def right_or_refused(run, expected):
    """Not silently wrong: no tangent, no gradient, another value."""
    try:
        got = run()
    except (RuntimeError, NotImplementedError):
        return
    assert got is not None, "silently without a derivative"
    assert_close(got.detach().double(), expected)


@backends
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode_is_right_or_refused(backend, requires_grad):
    s, t, y = inputs(4, 5)
    tangent = torch.randn(4, 5).double()
    x = s.clone().requires_grad_(requires_grad)

    def run():
        with torch.autograd.forward_ad.dual_level():
            loss = kd_loss(torch.autograd.forward_ad.make_dual(x, tangent), t, y, backend=backend)
            return torch.autograd.forward_ad.unpack_dual(loss).tangent

    right_or_refused(run, (oracle(s, t, y)[3] * tangent).sum())


@backends
@pytest.mark.parametrize("transform", ["grad", "jvp", "vjp", "jacrev", "jacfwd", "vmap of grad"])
def test_function_transforms_are_right_or_refused(backend, transform):
    s, t, y = inputs(4, 5)
    expected = oracle(s, t, y)[3]
    tangent = torch.randn(4, 5).double()

    def loss(x):
        return kd_loss(x, t, y, backend=backend)

    def row_loss(x, teacher, label):
        return kd_loss(x, teacher, label, backend=backend)

    func = torch.func
    if transform == "jvp":
        expected = (expected * tangent).sum()
    runs = {
        "grad": lambda: func.grad(loss)(s),
        "jvp": lambda: func.jvp(loss, (s,), (tangent,))[1],
        "vjp": lambda: func.vjp(loss, s)[1](torch.ones(()).double())[0],
        "jacrev": lambda: func.jacrev(loss)(s),
        "jacfwd": lambda: func.jacfwd(loss)(s),
        "vmap of grad": lambda: func.vmap(func.grad(row_loss))(s, t, y) / 4,
    }
    if backend == "reference":
        assert_close(runs[transform](), expected)
    else:
        with pytest.raises(RuntimeError, match="transforms the reference alone"):
            runs[transform]()


def test_function_transforms_get_the_reference():
    s, t, y = inputs(4, 5)
    y[1] = -100
    module = FusedKDLoss(divergence={"jsd": 1.0}, return_terms=True)
    for loss_fn in (kd_loss, lambda *logits: module(*logits).loss):
        exact = torch.func.hessian(lambda x, f=loss_fn: f(x, t, y))(s)
        x = leaf(s)
        once = torch.autograd.grad(loss_fn(x, t, y), x, create_graph=True)[0]
        twice = torch.stack(
            [torch.autograd.grad(g, x, retain_graph=True)[0] for g in once.reshape(-1)]
        )
        torch.testing.assert_close(exact, twice.reshape(exact.shape))
        with pytest.raises(ValueError, match="teacher_logits must have the shape"):
            torch.func.grad(lambda x, f=loss_fn: f(x, t[:, :3], y))(s)


@backends
@reductions
def test_a_batch_of_incoming_gradients_is_right_or_refused(backend, reduction):
    s, t, y = inputs(4, 5)
    x = leaf(s)
    loss = kd_loss(x, t, y, reduction=reduction, backend=backend)
    factors = torch.randn(3, *loss.shape).double()
    expected = oracle(s, t, y, reduction=reduction)[3]
    right_or_refused(
        lambda: torch.autograd.grad(loss, x, factors, is_grads_batched=True)[0],
        (factors[..., None] if reduction == "none" else factors[:, None, None]) * expected,
    )


@backends
@pytest.mark.parametrize("vectorize", [False, True])
def test_jacobians_are_right_or_refused(backend, vectorize):
    s, t, y = inputs(3, 4)
    expected = torch.zeros(3, 3, 4).double()
    expected[range(3), range(3)] = oracle(s, t, y, reduction="none")[3]

    def run():
        return torch.autograd.functional.jacobian(
            lambda x: kd_loss(x, t, y, reduction="none", backend=backend), s, vectorize=vectorize
        )

    if vectorize:
        right_or_refused(run, expected)
    else:
        assert_close(run(), expected)


# --- inplace=True ------------------------------------------------------------------------------


def computed(x, layout):
    """Logits that a model computed from the leaf x, (B, L, C), as losses get them."""
    return {
        "as they are": lambda: x * 1,
        "flattened": lambda: (x * 1).view(-1, x.shape[-1]),
        "shifted": lambda: (x * 1)[:, :-1],  # the causal shift of a language model
        "half the classes": lambda: torch.cat([x, x], -1)[..., x.shape[-1] :],
        "classes first": lambda: (x * 1).transpose(0, 2).contiguous().transpose(0, 2),
    }[layout]()


LAYOUTS = ["as they are", "flattened", "shifted", "half the classes", "classes first"]
layouts = pytest.mark.parametrize("layout", LAYOUTS)


@layouts
@dtypes
@reductions
def test_inplace_gives_the_same_bits_as_out_of_place(layout, dtype, reduction):
    s, _, _ = inputs(3, 5, 7, dtype=dtype)
    results = []
    for inplace in (False, True):
        x = leaf(s)
        logits = computed(x, layout)
        _, t, y = inputs(*logits.shape, dtype=dtype, seed=1)
        y[0] = -100
        loss = kd_loss(logits, t, y, temperature=3.0, reduction=reduction, inplace=inplace)
        (loss * torch.linspace(-3, 65536, loss.numel()).view_as(loss)).sum().backward()
        results.append((loss.detach(), x.grad))
    for out_of_place, in_place in zip(*results, strict=True):
        assert torch.equal(out_of_place, in_place)


@backends
@layouts
def test_inplace_gradients_are_right_in_every_layout(backend, layout):
    s, _, _ = inputs(3, 5, 7)
    x, plain = leaf(s), leaf(s)
    logits, expected = computed(x, layout), computed(plain, layout)
    _, t, y = inputs(*logits.shape, seed=1)
    truth = oracle(expected, t, y)[3]
    loss = kd_loss(logits, t, y, inplace=True, backend=backend)
    (loss * 0.3).backward()
    expected.backward(0.3 * truth)
    assert_close(x.grad, plain.grad)


@backends
@layouts
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_inplace_memory_is_the_students(backend, layout, factor):
    s, _, _ = inputs(3, 5, 7)
    x = leaf(s)
    logits = computed(x, layout)
    address, arrived = logits.data_ptr(), []
    logits.register_hook(lambda grad: arrived.append((grad.data_ptr(), grad.clone())))
    alias = logits.detach()
    _, t, y = inputs(*logits.shape, seed=1)
    (kd_loss(logits, t, y, inplace=True, backend=backend) * factor).backward()
    ((pointer, grad),) = arrived
    assert pointer == address
    assert torch.equal(alias, grad)


@backends
def test_inplace_on_a_slice_leaves_the_rest_of_the_logits_alone(backend):
    s, t, y = inputs(3, 5, 7)
    logits = leaf(s) * 1
    kd_loss(logits[:, :-1], t[:, :-1], y[:, :-1], inplace=True, backend=backend)
    assert torch.equal(logits[:, -1], s[:, -1])
    assert not torch.equal(logits[:, :-1], s[:, :-1])


USES = {
    "a second loss": lambda logits, t, y, backend: kd_loss(logits, t, y, backend=backend),
    "a second loss in place": lambda logits, t, y, backend: kd_loss(
        logits, t, y, inplace=True, backend=backend
    ),
    "an operation that saves them": lambda logits, *_: logits.square().sum(),
    "an operation that saves nothing": lambda logits, *_: logits.sum(),
}


@backends
@layouts
@pytest.mark.parametrize("use", USES)
def test_logits_used_after_inplace_raise(backend, layout, use):
    """They hold a gradient by then: whatever is computed of them is wrong (unsloth #5002)."""
    s, _, _ = inputs(3, 5, 7)
    x = leaf(s)
    logits = computed(x, layout)
    _, t, y = inputs(*logits.shape, seed=1)
    loss = kd_loss(logits, t, y, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match=USED):
        (loss + USES[use](logits, t, y, backend)).backward()


@backends
@layouts
def test_logits_saved_before_inplace_raise(backend, layout):
    s, _, _ = inputs(3, 5, 7)
    logits = computed(leaf(s), layout)
    _, t, y = inputs(*logits.shape, seed=1)
    square = logits.square().sum()
    loss = kd_loss(logits, t, y, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        (square + loss).backward()


@backends
@pytest.mark.parametrize("flatten", [False, True])
def test_logits_that_their_own_operation_saved_raise(backend, flatten):
    """A soft cap, c · tanh(s / c), needs its output for its backward."""
    s, t, y = inputs(3, 5, 7)
    logits = leaf(s).tanh()
    if flatten:
        logits, t, y = logits.view(-1, 7), t.view(-1, 7), y.view(-1)
    loss = kd_loss(logits, t, y, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        loss.backward()


@backends
@layouts
def test_another_loss_before_inplace_is_right(backend, layout):
    """What the error message advises. The compiled one's gradient is made before the logits go."""
    s, _, _ = inputs(3, 5, 7)
    x, plain = leaf(s), leaf(s)
    logits, expected = computed(x, layout), computed(plain, layout)
    _, t, y = inputs(*logits.shape, seed=1)
    truth = oracle(expected, t, y)[3] + oracle(expected, t, y, alpha=0.2, temperature=2.0)[3]
    first = kd_loss(logits, t, y, alpha=0.2, temperature=2.0, backend="cpu")
    second = kd_loss(logits, t, y, inplace=True, backend=backend)
    (first + second).backward()
    expected.backward(truth)
    assert_close(x.grad, plain.grad)


@backends
@layouts
def test_logits_modified_between_inplace_and_backward_raise(backend, layout):
    s, _, _ = inputs(3, 5, 7)
    x = leaf(s)
    logits = computed(x, layout)
    _, t, y = inputs(*logits.shape, seed=1)
    loss = kd_loss(logits, t, y, inplace=True, backend=backend)
    loss.backward(retain_graph=True)
    logits.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified"):
        loss.backward()


@backends
@pytest.mark.parametrize("view", ["flattened", "slice", "row"])
def test_inplace_refuses_a_view_of_a_leaf_as_it_refuses_the_leaf(backend, view):
    """It would overwrite a parameter; PyTorch's own in-place operations raise as well."""
    s, t, y = inputs(2, 3, 5)
    x = leaf(s)
    taken = {
        "flattened": lambda v: v.flatten(0, 1),
        "slice": lambda v: v[:, 1:],
        "row": lambda v: v[0],
    }[view]
    with pytest.raises((ValueError, RuntimeError), match="leaf"):
        kd_loss(taken(x), taken(t), taken(y), inplace=True, backend=backend)
    assert torch.equal(x.detach(), s)


@backends
@pytest.mark.parametrize("split", [torch.chunk, torch.split, torch.unbind])
def test_inplace_refuses_one_of_several_views_before_it_writes(backend, split):
    """Autograd cannot follow a write to one of them, so nothing could announce it."""
    s, t, y = inputs(2, 3, 5)
    logits = leaf(s) * 1
    how = {"chunk": (2,), "split": (1,), "unbind": ()}[split.__name__]
    student = split(logits, *how)[1]
    teacher, labels = split(t, *how)[1], split(y, *how)[1]
    with pytest.raises((ValueError, RuntimeError), match="views"):
        kd_loss(student, teacher, labels, inplace=True, backend=backend)
    assert torch.equal(logits, s)


@backends
@layouts
def test_inplace_has_no_second_derivative_and_says_so(backend, layout):
    s, _, _ = inputs(3, 5, 7)
    x = leaf(s)
    logits = computed(x, layout)
    _, t, y = inputs(*logits.shape, seed=1)
    loss = kd_loss(logits, t, y, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match=r"inplace=True.*create_graph"):
        torch.autograd.grad(loss, x, create_graph=True)
