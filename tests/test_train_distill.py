"""What a step minimises beside the fused loss: hints, attention, schedules, cached teachers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdkernels import TopKTeacher, kd_loss
from kdkernels.train import Config
from kdkernels.train.config import LOSS_OPTIONS
from kdkernels.train.distill import Distillation, Teachers
from kdkernels.train.errors import SetupError

pytestmark = pytest.mark.usefixtures("one_thread")
N, CLASSES = 6, 5


def network(width: int, pool: int = 1) -> nn.Module:
    torch.manual_seed(width)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.MaxPool2d(pool), nn.Flatten(),
        nn.Linear(width * (8 // pool) ** 2, CLASSES),
    )  # fmt: skip


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(N, 1, 8, 8, generator=generator)
    return images, torch.arange(N) % CLASSES, torch.arange(N)


def distillation(batch, student=None, teachers=None, cached=None, **sections) -> Distillation:
    student = network(3) if student is None else student
    teachers = [network(4)] if teachers is None else teachers
    return Distillation(student, Teachers(teachers), Config(**sections), batch[0], cached)


@pytest.mark.parametrize("pool", [1, 2])
def test_a_hint_is_the_distance_after_a_projection(batch, pool):
    """Where the student is larger it is pooled to the teacher's size."""
    student, teacher = network(3), network(4, pool)
    run = distillation(batch, student, [teacher], distill={"hints": {"0": "1"}, "hint_weight": 3.0})
    terms = run(*batch)
    (projection,) = run.projections
    with torch.no_grad():
        ours = F.adaptive_avg_pool2d(projection(student[0](batch[0])), 8 // pool)
        expected = F.mse_loss(ours, teacher[1](teacher[0](batch[0])))
        plain = kd_loss(student(batch[0]), teacher(batch[0]), batch[1])
    torch.testing.assert_close(terms["hint"].detach(), expected)
    torch.testing.assert_close(terms["loss"].detach(), plain + 3 * expected)
    terms["loss"].backward()
    assert all(p.grad.norm() > 0 for p in [*projection.parameters(), *student.parameters()])


def test_hints_of_vectors_have_a_linear_projection(batch):
    run = distillation(batch, distill={"hints": {"3": "2"}})
    assert isinstance(run.projections[0], nn.Linear)
    assert run(*batch)["hint"] > 0


def test_attention_is_the_distance_of_normalised_energies(batch):
    student, teacher = network(3), network(4, 2)
    options = {"attention": {"0": "1"}, "attention_weight": 10.0}
    run = distillation(batch, student, [teacher], distill=options)
    terms = run(*batch)
    with torch.no_grad():
        ours = F.adaptive_avg_pool2d(student[0](batch[0]).square().mean(1), 4).flatten(1)
        theirs = teacher[1](teacher[0](batch[0])).square().mean(1).flatten(1)
        ours, theirs = (x / x.norm(dim=1, keepdim=True) for x in (ours, theirs))
        expected = (ours - theirs).square().mean() / 2
    torch.testing.assert_close(terms["attention"].detach(), expected)
    assert not run.projections


def test_parts_of_a_batch_have_their_part_of_hints(batch):
    inside = {"hints": {"0": "0"}, "attention": {"0": "0"}, "learn_temperature": True}
    run = distillation(batch, distill=inside, loss={"distill_ignored": False})
    batch[1][[0, 4]] = -100
    whole = run(*batch)
    items = (N - 2.0, N - 2.0, float(N))
    parts = [run(*(tensor[i] for tensor in batch), None, items) for i in ([0, 1, 2, 3], [4, 5])]
    for name in ("loss", "hint", "attention", "temperature"):
        torch.testing.assert_close(parts[0][name] + parts[1][name], whole[name])


def test_schedules_are_lines_between_points(batch):
    points = {"temperature": [[0, 8.0], [4, 2.0]], "alpha": [[1, 1.0], [2, 0.5]],
              "hint_weight": [[0, 1.0], [10, 0.0]]}  # fmt: skip
    run = distillation(batch, distill={"hints": {"0": "0"}}, schedules=points)
    found = []
    for epoch in (0, 1, 1.5, 3, 9):
        run.schedule(epoch)
        found.append((run.loss_fn.temperature, run.loss_fn.alpha, run.weights["hint"]))
    expected = [(8, 1, 1), (6.5, 1, 0.9), (5.75, 0.75, 0.85), (3.5, 0.5, 0.7), (2, 0.5, 0.1)]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected, dtype=torch.float32))
    terms = run(*batch)
    student, teacher = run.student(batch[0]), run._teachers[0](batch[0])[0]
    fused = kd_loss(student, teacher, batch[1], temperature=2.0, alpha=0.5)
    torch.testing.assert_close(terms["loss"], fused + 0.1 * terms["hint"])


def test_a_learned_temperature_has_the_gradient_of_the_loss(batch):
    run = distillation(batch, distill={"learn_temperature": True}, loss={"temperature": 3.0})
    terms = run(*batch)
    assert terms["temperature"] == pytest.approx(3.0)
    terms["loss"].backward()
    temperature = torch.tensor(3.0, requires_grad=True)
    student, (teacher,) = run.student(batch[0]), run._teachers[0](batch[0])
    kd_loss(student, teacher, batch[1], temperature=temperature).backward()
    torch.testing.assert_close(run.log_temperature.grad, 3 * temperature.grad)


@pytest.mark.parametrize("divergence", ["dkd", "nkd", "wsld"])
def test_objectives_of_the_label_need_no_other_option(batch, divergence):
    run = distillation(batch, loss={"divergence": divergence})
    student, (teacher,) = run.student(batch[0]), run._teachers[0](batch[0])
    expected = kd_loss(student, teacher, batch[1], divergence=divergence)
    torch.testing.assert_close(run(*batch)["loss"], expected)


def test_a_cached_teacher_goes_by_the_numbers_of_the_images(batch):
    teacher = network(4)
    logits = teacher(batch[0]).detach()
    shuffled = torch.tensor([3, 5, 0])
    some = tuple(tensor[shuffled] for tensor in batch)
    expected = distillation(batch, teachers=[teacher])(*some)["loss"]
    cached = distillation(batch, teachers=[teacher], cached=logits)
    del cached._teachers[0].models[0]  # nobody asks it
    torch.testing.assert_close(cached(*some)["loss"], expected)
    top = TopKTeacher.from_logits(logits, CLASSES)
    torch.testing.assert_close(distillation(batch, cached=top)(*some)["loss"], expected)


def test_every_option_of_the_loss_can_be_configured(batch):
    """What the docstring of kd_loss has, by the name it has there."""
    options = {
        "temperature": 2.0, "alpha": 0.4, "label_smoothing": 0.1, "distill_ignored": False,
        "weight": [1.0, 2.0, 3.0, 4.0, 5.0], "divergence": {"forward_kl": 0.5, "jsd": 0.5},
        "backend": "reference", "beta": 0.3, "teacher_temperature": 3.0, "scale_by_t2": False,
        "agreement": 0.1, "entropy_gap": 0.1, "logit_softcap": 30.0, "logit_scale": 0.5,
    }  # fmt: skip
    assert options.keys() < LOSS_OPTIONS.keys()
    run = distillation(batch, loss=options)
    expected = kd_loss(
        run.student(batch[0]), run._teachers[0](batch[0])[0], batch[1],
        **options | {"weight": torch.tensor(options["weight"])},
    )  # fmt: skip
    torch.testing.assert_close(run(*batch)["loss"], expected)


@pytest.mark.parametrize(("ensemble", "weights"), [("logits", [0.2, 0.8]), ("losses", None)])
def test_ensembles(batch, ensemble, weights):
    options = {"ensemble": ensemble} | ({"teacher_weights": weights} if weights else {})
    run = distillation(batch, teachers=[network(4), network(2)], loss=options)
    options |= {"teacher_weights": torch.tensor(weights)} if weights else {}
    expected = kd_loss(run.student(batch[0]), run._teachers[0](batch[0]), batch[1], **options)
    torch.testing.assert_close(run(*batch)["loss"], expected)


def test_a_module_that_is_not_asked_is_refused(batch):
    student = network(3)
    student[0].idle = nn.Linear(1, 1)
    with pytest.raises(SetupError, match=r"the module 0\.idle has no part in"):
        distillation(batch, student, distill={"hints": {"0.idle": "0"}})


def test_a_module_without_one_output_is_refused(batch):
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.rest = Pair(), network(3)

        def forward(self, x):
            return self.rest(self.pair(x)[0])

    with pytest.raises(SetupError, match="the output of pair is neither"):
        distillation(batch, Odd(), distill={"hints": {"pair": "0"}})
