"""examples/timm_task.py against timm's own task; the GPU report runs it where timm loads."""

import copy

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def timm_task(example):
    """The example. Where it can't be loaded, that may be any error, of operators that differ."""
    try:
        example("timm.task")
    except Exception as error:
        pytest.skip(
            f"torchvision and so timm do not import beside this build of torch: {error!r:.200}"
        )
    return example("timm_task")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    "weights", [{}, {"task_loss_weight": 0.3}, {"distill_loss_weight": 2.0}], ids=str
)
def test_a_step_is_that_of_timms_task(timm_task, weights, smoothing):
    torch.manual_seed(0)
    images = torch.randn(16, 3, 8, 8, device=DEVICE)
    labels = torch.randint(timm_task.CLASSES, (16,), device=DEVICE)
    student, teacher = timm_task.network(), timm_task.network("test_efficientnet")
    options = {"temperature": 4.0, "device": torch.device(DEVICE), "verbose": False} | weights
    found = []
    for task_class in (timm_task.FusedDistillationTask, timm_task.LogitDistillationTask):
        models = copy.deepcopy((student, teacher))
        criterion = nn.CrossEntropyLoss(label_smoothing=smoothing)
        task = task_class(*models, criterion, **options).to(DEVICE)
        made = task(images, labels)
        made["loss"].backward()
        gradient = torch.cat([p.grad.flatten() for p in task.trainable_module.parameters()])
        found.append((gradient, *made.values()))
        assert list(made) == ["loss", "output", "task_loss", "kd_loss"]
    (gradient, *made), (their_gradient, *theirs) = found
    assert (gradient - their_gradient).norm() <= 1e-5 * their_gradient.norm()
    for got, expected in zip(made, theirs, strict=True):  # their float32 KL is of small numbers
        assert (got - expected).norm() <= 1e-5 * (1 + expected.norm())


def test_the_example_learns(timm_task):
    before, after = timm_task.main(DEVICE)
    assert after < 0.9 * before
