"""``shift=n``: labels as a causal language model gets them, and the logits as they are."""

import pytest
import torch
from test_numerics import inputs

from kdkernels import FusedKDLoss, kd_loss


def sequences(batch=2, length=5, classes=11, dtype=torch.float64):
    s, t, y = inputs(batch * length, classes, dtype=dtype)
    y[3], y[7] = -100, -100
    shape = (batch, length)
    return s.reshape(*shape, classes), t.reshape(*shape, classes), y.reshape(shape)


def value_and_grad(s, t, y, sliced=0, **options):
    x = s.detach().requires_grad_()
    logits, labels = x, y
    if sliced:
        logits, t, labels = x[:, :-sliced], t[:, :-sliced], y[:, sliced:]
    loss = kd_loss(logits, t, labels, **options)
    loss.sum().backward()
    return loss.detach(), x.grad


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("shift", [1, 2, 4])
@pytest.mark.parametrize(
    "options", [{}, {"distill_ignored": True}, {"label_smoothing": 0.1, "ignore_index": 3}], ids=str
)
def test_equals_the_slices(backend, shift, options):
    s, t, y = sequences()
    if "ignore_index" in options:
        y[y == -100] = 3
    expected = value_and_grad(s, t, y, sliced=shift, backend=backend, **options)
    got = value_and_grad(s, t, y, shift=shift, backend=backend, **options)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("options", [{}, {"distill_ignored": True}], ids=str)
def test_row_weights_stand_where_the_logits_are(options):
    s, t, y = sequences()
    w = torch.arange(10.0).reshape(2, 5)
    expected = value_and_grad(s, t, y, sliced=1, sample_weight=w[:, :-1], **options)
    got = value_and_grad(s, t, y, shift=1, sample_weight=w, **options)
    torch.testing.assert_close(got, expected)
    assert torch.equal(w, torch.arange(10.0).reshape(2, 5))


def test_a_row_each_with_nothing_where_nothing_is_predicted():
    s, t, y = sequences()
    got, grad = value_and_grad(s, t, y, shift=1, reduction="none")
    expected, _ = value_and_grad(s, t, y, sliced=1, reduction="none")
    torch.testing.assert_close(got[:, :-1], expected)
    assert not got[:, -1].any()
    assert not grad[:, -1].any()


@pytest.mark.parametrize("shift", [5, 9])
def test_shifted_beyond_the_end(shift):
    loss, grad = value_and_grad(*sequences(), shift=shift)
    assert loss == 0
    assert not grad.any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.uint8])
def test_labels_of_every_type_can_be_ignored(dtype):
    s, t, y = sequences()
    y = y.clamp(min=0)
    expected = value_and_grad(s, t, y, shift=1)
    torch.testing.assert_close(value_and_grad(s, t, y.to(dtype), shift=1), expected)


def test_inputs_are_left_alone_and_the_module_does_the_same():
    s, t, y = sequences()
    kept = y.clone()
    loss_fn = FusedKDLoss(shift=1)
    assert torch.equal(loss_fn(s, t, y), kd_loss(s, t, y, shift=1))
    assert torch.equal(y, kept)
    loss_fn.shift = 0
    assert torch.equal(loss_fn(s, t, y), kd_loss(s, t, y))


def test_logits_are_not_copied(monkeypatch):
    """The gradient is the one tensor of their size."""
    from torch.utils._python_dispatch import TorchDispatchMode

    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.numel() >= s.numel():
                made.append(str(function))
            return out

    s, t, y = sequences(2, 64, 1000, torch.float32)
    s.requires_grad_()
    with Watch():
        kd_loss(s, t, y, shift=1).backward()
    copies = [name for name in made if "empty" not in name and "detach" not in name]
    assert not copies, copies


def test_compiled():
    s, t, y = sequences()
    loss_fn = torch.compile(FusedKDLoss(shift=1, distill_ignored=True), fullgraph=True)
    torch.testing.assert_close(loss_fn(s, t, y), kd_loss(s, t, y, shift=1, distill_ignored=True))


@pytest.mark.parametrize(
    ("labels", "options", "error", "text"),
    [
        ("all", {"shift": -1}, ValueError, "shift must be at least 0, got -1"),
        ("all", {"shift": 1.0}, TypeError, "shift must be an int, got float"),
        ("all", {"shift": None}, TypeError, "shift must be an int, got NoneType"),
        ("none", {"shift": 1, "alpha": 1.0}, ValueError, "shift needs labels"),
        ("floating", {"shift": 1}, TypeError, "labels must be integers"),
        ("fewer", {"shift": 1}, ValueError, "labels must have the shape"),
    ],
)
def test_what_cannot_be_shifted_raises(labels, options, error, text):
    s, t, y = sequences()
    y = {"all": y, "none": None, "floating": y.double(), "fewer": y[:, 1:]}[labels]
    with pytest.raises(error, match=text):
        kd_loss(s, t, y, **options)
    if error is TypeError and labels == "all":
        with pytest.raises(error, match=text):
            FusedKDLoss(**options)


def test_a_single_label_cannot_be_shifted():
    with pytest.raises(ValueError, match="got a single label"):
        kd_loss(torch.randn(5), torch.randn(5), torch.tensor(1), shift=1)
