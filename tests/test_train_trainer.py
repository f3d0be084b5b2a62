"""The training loop: who is trained, on what, by what, and what stops it."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdkernels.train import Callback, Config, Trainer, evaluate
from kdkernels.train import trainer as loop
from kdkernels.train.callbacks import JsonLines, Progress, TensorBoard
from kdkernels.train.checkpoints import Checkpoints, read
from kdkernels.train.data import UNLABELLED
from kdkernels.train.errors import Interrupted, NonFiniteError, SetupError, StorageError

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = 3


def network(width: int = 4, dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(),
        nn.Dropout(dropout), nn.Linear(16 * width, CLASSES),
    )  # fmt: skip


@pytest.fixture
def images() -> tuple[torch.Tensor, torch.Tensor]:
    """Three bright rows or columns that a network tells apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(21) % CLASSES
    pixels = 0.3 * torch.rand(21, 1, 4, 4, generator=generator)
    pixels[torch.arange(21), 0, labels] += 0.6
    return pixels, labels


def config(**sections) -> Config:
    given = {"augment": {"crop": 0}, "training": {"epochs": 3, "batch_size": 6}}
    for name, options in sections.items():
        given[name] = given.get(name, {}) | options if isinstance(options, dict) else options
    return Config(**given)


def trainer(images, teacher=None, net=None, folder=None, callbacks=(), seed=0, **sections):
    torch.manual_seed(5)
    net = network() if net is None else net
    given = config(**sections)
    return Trainer(net, teacher, images, images, given, folder=folder, callbacks=callbacks,
                   seed=seed, say=lambda text: None)  # fmt: skip


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Records(Callback):
    def __init__(self):
        self.steps, self.epochs = [], []

    def step(self, trainer, record, images_per_second):
        self.steps.append(record)

    def epoch(self, trainer, record):
        self.epochs.append(record)


# --- as a library


def test_five_lines_train_a_student(images):
    teacher, student = network(8), network()
    given = config(training={"epochs": 20, "learning_rate": 0.01})
    Trainer(teacher, None, images, images, given).fit()
    before = evaluate(student, images).accuracy
    result = Trainer(student, teacher, images, images, given).fit()
    assert result.accuracy == evaluate(student, images).accuracy > max(before, 0.9)
    assert result.curve[-1][0] == 20 * 4
    assert not student.training


def test_any_dataset_of_images_and_labels_will_do(images):
    class Pairs(torch.utils.data.Dataset):
        def __len__(self):
            return len(images[1])

        def __getitem__(self, i):
            return images[0][i], int(images[1][i])

    found = []
    for data in (images, Pairs()):
        student = network()
        student.load_state_dict(network().state_dict() if not found else found[0][0])
        found.append((state(student), student))
        Trainer(student, None, data, images, config()).fit()
    assert same(found[0][1].state_dict(), found[1][1].state_dict())


def test_bytes_are_pixels_of_255(images):
    whole = (images[0] * 255).to(torch.uint8)
    first, second = (trainer((x, images[1])) for x in (whole, whole.float() / 255))
    first.fit(), second.fit()
    assert same(first.model.state_dict(), second.model.state_dict())


def test_a_callback_sees_every_step_and_epoch(images):
    records = Records()
    trainer(images, network(8), callbacks=[records]).fit()
    assert [record["step"] for record in records.steps] == list(range(1, 13))
    assert {"loss", "soft", "hard", "learning_rate", "epoch"} < records.steps[0].keys()
    assert [record["epoch"] for record in records.epochs] == [1, 2, 3]
    assert all(math.isfinite(record["validation_loss"]) for record in records.epochs)


def test_the_seed_decides_everything(images):
    runs = [trainer(images, seed=seed, augment={"crop": 1}, net=network(dropout=0.5))
            for seed in (1, 1, 2)]  # fmt: skip
    for run in runs:
        run.objective.student.load_state_dict(runs[0].objective.student.state_dict())
    for run in runs:
        run.fit()
    states = [run.model.state_dict() for run in runs]
    assert same(states[0], states[1])
    assert not same(states[0], states[2])


# --- the teacher


def test_the_teacher_stays_as_it_is(images):
    teacher = network(8)
    teacher.train()  # as a careless caller would leave it
    before = state(teacher)
    run = trainer(images, teacher)
    run.fit()
    assert same(before, teacher.state_dict())
    assert not any(module.training for module in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_train_on_the_whole_does_not_reach_the_teacher(images):
    teacher = network(8)
    run = trainer(images, teacher)
    run.module.train()
    run.objective._teachers[0].train()
    assert not any(module.training for module in teacher.modules())
    assert run.objective.student.training


def test_the_teacher_is_in_neither_optimizer_nor_checkpoint(images):
    teacher = network(8)
    run = trainer(images, teacher)
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in run.objective.student.parameters()}
    assert len(run.objective.state_dict()) == len(run.objective.student.state_dict())


def test_several_teachers_teach_by_the_mean_of_their_probabilities(images):
    teachers = [network(8), network(6)]
    run, records = trainer(images, teachers, callbacks=[records := Records()]), records
    student = copy.deepcopy(run.objective.student).train()
    order = loop.epoch_order(21, 4, 6, 0, 2)[0]
    with torch.no_grad():
        p = sum(F.softmax(t.eval()(images[0][order]) / 4, 1) for t in teachers) / 2
        log_q = F.log_softmax(student(images[0][order]) / 4, 1)
    run.fit()
    expected = 16 * F.kl_div(log_q, p, reduction="batchmean")
    assert records.steps[0]["soft"] == pytest.approx(expected.item(), rel=1e-4)


# --- what is minimised


def test_the_first_loss_is_that_of_the_formula(images):
    teacher, records = network(8), Records()
    run = trainer(images, teacher, loss={"temperature": 2.0, "alpha": 0.3}, callbacks=[records])
    student = copy.deepcopy(run.objective.student).train()
    order = loop.epoch_order(21, 4, 6, 0, 2)[0]
    with torch.no_grad():
        s, t = student(images[0][order]), teacher.eval()(images[0][order])
    soft = 4 * F.kl_div(F.log_softmax(s / 2, 1), F.softmax(t / 2, 1), reduction="batchmean")
    hard = F.cross_entropy(s, images[1][order])
    run.fit()
    assert records.steps[0]["loss"] == pytest.approx((0.3 * soft + 0.7 * hard).item(), rel=1e-5)


def test_images_without_a_label_teach(images):
    unlabelled = images[0], torch.full_like(images[1], UNLABELLED)
    teacher = network(8)
    trainer(images, None, net=teacher, training={"epochs": 20, "learning_rate": 0.01}).fit()
    student = network()
    given = config(training={"epochs": 20, "learning_rate": 0.01})
    Trainer(student, teacher, unlabelled, images, given, say=str).fit()
    assert evaluate(student, images).accuracy > 0.9


@pytest.mark.parametrize(
    ("sections", "differs"),
    [
        ({"training": {"accumulate": 2}}, False),
        ({"training": {"accumulate": 4}, "loss": {"distill_ignored": False}}, False),
        ({"training": {"accumulate": 3}, "loss": {"weight": [1.0, 2.0, 3.0]}}, False),
        (
            {
                "training": {"accumulate": 2},
                "loss": {"distill_ignored": False},
                "distill": {"hints": {"1": "5"}},
            },
            False,
        ),
        ({"training": {"batch_size": 5}}, True),
    ],
)
def test_parts_of_a_batch_come_to_its_gradient(images, sections, differs):
    """Without batch norm, which sees the parts; labels are missing unevenly."""
    labels = images[1].clone()
    labels[[0, 1, 2, 3, 7, 8]] = UNLABELLED
    teacher, student = network(8), nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES))
    found = []
    for training in (sections.get("training"), {"accumulate": 1}):
        copied = copy.deepcopy(student)
        given = config(**sections | {"training": {"optimizer": "sgd", **training}})
        Trainer(copied, teacher, (images[0], labels), images, given, say=str).fit()
        found.append(copied[1].weight.detach())
    error = (found[0] - found[1]).norm() / found[1].norm()
    assert (error > 1e-3) if differs else (error < 1e-5)


def test_label_smoothing_is_that_of_cross_entropy(images):
    records = Records()
    run = trainer(images, training={"label_smoothing": 0.3}, callbacks=[records])
    order = loop.epoch_order(21, 4, 6, 0, 2)[0]
    logits = copy.deepcopy(run.objective.student).train()(images[0][order])
    run.fit()
    expected = F.cross_entropy(logits, images[1][order], label_smoothing=0.3)
    assert records.steps[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_without_a_teacher_it_is_the_cross_entropy_whatever_the_loss_is(images):
    found = []
    for loss in ({}, {"weight": [1.0, 2.0, 30.0]}):
        records = Records()
        trainer(images, loss=loss, training={"accumulate": 2}, callbacks=[records]).fit()
        found.append([record["loss"] for record in records.steps])
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
@pytest.mark.parametrize("with_teacher", [False, True])
def test_mixed_images_have_the_loss_of_both_labels(images, monkeypatch, name, with_teacher):
    seen = {}

    def spy(batch, labels, options):
        seen["images"], seen["mixed"] = mixed = real(batch, labels, options)
        seen["labels"] = labels
        return mixed

    real = loop.mix
    monkeypatch.setattr(loop, "mix", spy)
    teacher, records = network(8) if with_teacher else None, Records()
    given = {"epochs": 1, "batch_size": 21}
    run = trainer(images, teacher, augment={name: 1.0}, training=given, callbacks=[records])
    student = copy.deepcopy(run.objective.student).train()
    run.fit()
    others, share = seen["mixed"]
    assert 0 < share < 1
    logits = student(seen["images"])
    hard = share * F.cross_entropy(logits, seen["labels"])
    hard = hard + (1 - share) * F.cross_entropy(logits, others)
    if with_teacher:  # which sees the same images
        p = F.softmax(teacher(seen["images"]) / 4, 1)
        soft = 16 * F.kl_div(F.log_softmax(logits / 4, 1), p, reduction="batchmean")
        assert records.steps[0]["soft"] == pytest.approx(soft.item(), rel=1e-4)
        hard = 0.9 * soft + 0.1 * hard
    assert records.steps[0]["loss"] == pytest.approx(hard.item(), rel=1e-4)


def test_adversarial_images_raise_the_loss_and_are_near(images):
    run = trainer(images, network(8), augment={"fgsm": 0.1, "fgsm_share": 0.5})
    run.module.train()  # as in a step
    before = state(run.objective)
    index = torch.arange(21)
    adversarial = run._adversarial(images[0], images[1], index, None)
    assert same(before, run.objective.state_dict())  # batch norm has not seen them
    assert torch.equal(adversarial[10:], images[0][10:])
    assert 0 < (adversarial - images[0]).abs().max() <= 0.1 + 1e-6
    assert adversarial.min() >= 0
    run.objective.eval()
    losses = [run.objective(x[:10], images[1][:10], index[:10])["loss"]
              for x in (images[0], adversarial)]  # fmt: skip
    assert losses[1] > losses[0]
    run.fit()


# --- how it is optimised


@pytest.mark.parametrize(
    ("options", "kind", "expected"),
    [
        ({"optimizer": "sgd", "weight_decay": 0.1}, torch.optim.SGD, {"nesterov": True}),
        ({"optimizer": "sgd", "momentum": 0.0}, torch.optim.SGD, {"nesterov": False}),
        ({"optimizer": "adam", "weight_decay": 0.1}, torch.optim.Adam, {"weight_decay": 0.1}),
        ({"optimizer": "adamw"}, torch.optim.AdamW, {"weight_decay": 0.01}),
    ],
)
def test_optimizers(images, options, kind, expected):
    run = trainer(images, training=options)
    assert type(run.optimizer) is kind
    assert {name: run.optimizer.param_groups[0][name] for name in expected} == expected
    run.fit()


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ({"schedule": "constant"}, [1, 1, 1, 1]),
        ({"schedule": "linear"}, [1, 3 / 4, 1 / 2, 1 / 4]),
        ({"schedule": "cosine"}, [1, (1 + 2**-0.5) / 2, 1 / 2, (1 - 2**-0.5) / 2]),
        ({"schedule": "step"}, [1, 1, 0.1, 0.01]),
        ({"schedule": "constant", "warmup": 2}, [1 / 3, 2 / 3, 1, 1]),
    ],
)
def test_learning_rates(images, options, rates):
    given = {"epochs": 4, "batch_size": 21, "learning_rate": 0.5, **options}
    run = trainer(images, training=given, callbacks=[records := Records()])
    run.fit()
    assert [r["learning_rate"] / 0.5 for r in records.steps] == pytest.approx(rates)


def test_gradients_are_clipped(images):
    before = network()
    norms = []
    for clip in (0.0, 1e-3):
        run = trainer(images, net=copy.deepcopy(before), training={
            "optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "learning_rate": 1.0,
            "epochs": 1, "batch_size": 21, "clip": clip})  # fmt: skip
        run.fit()
        parameters = zip(run.model.parameters(), before.parameters(), strict=True)
        norms.append(torch.cat([(a - b).flatten() for a, b in parameters]).norm().item())
    assert norms[0] > 2e-3
    assert norms[1] == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_mixed_precision_trains(images, kind):
    run = trainer(images, network(8), training={"amp": kind, "epochs": 10, "learning_rate": 0.01})
    run.fit()
    assert run.result.accuracy > 0.6
    assert all(p.dtype == torch.float32 for p in run.model.parameters())


def test_the_average_of_the_weights_is_evaluated_and_kept(images):
    seen = []

    class Watch(Callback):
        def step(self, trainer, record, images_per_second):
            seen.append(state(trainer.objective.student))

    run = trainer(images, training={"ema": 0.5, "epochs": 1}, callbacks=[Watch()])
    run.fit()
    average = seen[0]["5.weight"]
    for later in seen[1:]:
        average = 0.5 * average + 0.5 * later["5.weight"]
    torch.testing.assert_close(run.objective.student[5].weight.detach(), average)
    assert torch.equal(run.objective.student[1].running_mean, seen[-1]["1.running_mean"])


def test_a_student_may_be_copied_while_its_inside_is_looked_at(images):
    class Copy(Callback):
        def step(self, trainer, record, images_per_second):
            copy.deepcopy(trainer.objective.student)

    inside = {"hints": {"1": "1"}, "attention": {"0": "0"}}
    trainer(images, network(8), distill=inside, callbacks=[Copy()]).fit()


def test_frozen_parts_stay_statistics_included(images):
    run = trainer(
        images, network(8), student={"freeze": ["0", "1"]}, training={"weight_decay": 0.5}
    )
    before = state(run.model)
    run.fit()
    changed = {n.split(".")[0] for n, v in run.model.state_dict().items() if not v.equal(before[n])}
    assert changed == {"5"}


def test_freezing_everything_is_refused(images):
    with pytest.raises(SetupError, match="leaves nothing to train"):
        trainer(images, student={"freeze": ["*"]})


# --- epochs and batches


@pytest.mark.parametrize(("n", "size", "lengths"), [(21, 6, [6, 6, 6, 3]), (19, 6, [6, 6, 7])])
def test_an_epoch_is_every_image_once(n, size, lengths):
    order = loop.epoch_order(n, -(-n // size), size, 3, 2)
    assert [len(batch) for batch in order] == lengths
    assert sorted(chain.from_iterable(order)) == list(range(n))
    assert order == loop.epoch_order(n, -(-n // size), size, 3, 2)
    assert order != loop.epoch_order(n, -(-n // size), size, 4, 2)


def test_few_images_come_again_in_full_batches():
    order = loop.epoch_order(5, 4, 8, 0, 2)
    assert [len(batch) for batch in order] == [8] * 4
    counts = torch.tensor(list(chain.from_iterable(order))).bincount()
    assert counts.max() - counts.min() <= 1


def test_early_stopping_restores_the_best_weights(images, monkeypatch):
    accuracies = iter([0.2, 0.7, 0.5, 0.7, 0.9])
    seen = []

    def pretend(model, data, *rest):
        seen.append(state(model))
        found = evaluate(model, data, *rest)
        found.accuracy = next(accuracies)
        return found

    monkeypatch.setattr(loop, "evaluate", pretend)
    run = trainer(images, training={"epochs": 9, "patience": 2})
    result = run.fit()
    assert (result.stopped_early, result.epoch, len(result.curve)) == (True, 2, 4)
    assert same(run.model.state_dict(), seen[1])
    assert not same(seen[1], seen[3])


# --- losses that are not finite


def poisoned(images, at: int):
    """A student whose output is NaN at one step."""

    class Poisoned(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls = network(), 0

        def forward(self, x):
            self.calls += self.training
            return self.inner(x * math.nan if self.training and self.calls == at else x)

    return Poisoned()


def test_nan_stops_and_says_where(images, tmp_path):
    run = trainer(images, network(8), net=poisoned(images, 6), folder=tmp_path)
    with pytest.raises(NonFiniteError) as stopped:
        run.fit()
    message = str(stopped.value)
    assert message.startswith("step 6 has loss nan, soft nan, hard nan; last good checkpoint: ")
    assert message.endswith("step-00000004.pt")
    good = read(tmp_path / "step-00000004.pt")["parts"]["objective"]
    assert all(value.isfinite().all() for value in good.values())


class Steep(nn.Module):
    """A finite loss whose gradient is not."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return x.mean((1, 2, 3))[:, None] * self.weight.sqrt()


@pytest.mark.parametrize("amp", ["off", "float16"])
def test_nan_is_skipped_without_a_trace(images, amp):
    said, states = [], []

    class Watch(Callback):  # at each step: the best weights, which are restored, tell less
        def step(self, trainer, record, images_per_second):
            states.extend([state(trainer.objective), state(trainer.ema)])

    run = trainer(images, network(8), net=poisoned(images, 6), callbacks=[Watch()],
                  training={"nonfinite": "skip", "ema": 0.9, "amp": amp})  # fmt: skip
    run.say = said.append
    run.fit()
    assert run.skipped == 1
    assert said == ["step 6 left out: it has loss nan, soft nan, hard nan"]
    assert same(states[8], states[10])  # before and after it
    assert same(states[9], states[11])
    assert all(value.isfinite().all() for one in states for value in one.values())


@pytest.mark.parametrize(("amp", "steps"), [("off", 1), ("bfloat16", 1), ("float16", 18)])
def test_an_infinite_gradient_of_a_finite_loss_is_noticed(images, amp, steps):
    """Under float16 when the scaler has halved its scale of 2 ** 16 to less than 1."""
    run = trainer(images, net=Steep(), training={"amp": amp, "epochs": 9})
    with pytest.raises(NonFiniteError, match=rf"step {steps} has gradient (nan|inf)"):
        run.fit()


# --- interruptions


class Killed(BaseException):
    """Like kill -9 it is caught by nobody."""


class Kill(Callback):
    def __init__(self, at):
        self.at = at

    def step(self, trainer, record, images_per_second):
        if record["step"] == self.at:
            raise Killed


EVERYTHING = {
    "augment": {"crop": 1, "flip": 0.5, "mixup": 0.4, "cutmix": 0.4, "fgsm": 0.01},
    "distill": {"hints": {"2": "2"}, "learn_temperature": True},
    "schedules": {"alpha": [[0, 0.9], [3, 0.5]]},
    "training": {"ema": 0.9, "accumulate": 2, "checkpoint_every": 3, "clip": 1.0, "warmup": 0.5,
                 "log_every": 1, "amp": "float16"},
}  # fmt: skip


def run_everything(images, folder, kill=None, **changes):
    callbacks = [JsonLines(folder / "metrics.jsonl"), *([Kill(kill)] if kill else [])]
    torch.manual_seed(1)
    teacher, student = network(8), network(dropout=0.3)
    sections = {**EVERYTHING, **changes}
    run = trainer(images, teacher, student, folder / "checkpoints", callbacks, **sections)
    try:
        run.fit()
    except Killed:
        return None
    return run


@pytest.mark.parametrize("amp", ["off", "float16"])
def test_a_killed_run_goes_on_to_the_same_bits(images, tmp_path, amp):
    changes = {"training": EVERYTHING["training"] | {"amp": amp}}
    whole = run_everything(images, tmp_path / "whole", **changes)
    for kill in range(1, 13):
        folder = tmp_path / f"killed{kill}"
        assert run_everything(images, folder, kill, **changes) is None
        assert run_everything(images, folder, **changes) is not None or kill == 12
        resumed = run_everything(images, folder, **changes)  # again: it is finished
        assert same(whole.objective.state_dict(), resumed.objective.state_dict()), kill
        assert same(whole.model.state_dict(), resumed.model.state_dict())
        assert whole.result == resumed.result
        lines = [(f / "metrics.jsonl").read_text() for f in (tmp_path / "whole", folder)]
        assert lines[0] == lines[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_of_the_last_step(images, tmp_path, number):
    class Signal(Callback):
        def step(self, trainer, record, images_per_second):
            if record["step"] == 6:
                os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    folder = tmp_path / "signalled"
    with pytest.raises(Interrupted, match=f"{number.name} at step 6: last good") as stopped:
        trainer(images, folder=folder, callbacks=[Signal()]).fit()
    assert stopped.value.exit_code == 128 + number
    assert signal.getsignal(number) is before
    assert (folder / "step-00000006.pt").exists()
    whole, resumed = trainer(images), trainer(images, folder=folder)
    whole.fit(), resumed.fit()
    assert same(whole.model.state_dict(), resumed.model.state_dict())


def test_a_truncated_checkpoint_is_named_and_the_one_before_is_taken(images, tmp_path):
    said = []
    training = {"schedule": "constant"}
    trainer(images, folder=tmp_path, training=training | {"epochs": 2}).fit()
    last = tmp_path / "step-00000008.pt"
    last.write_bytes(last.read_bytes()[:-100])
    run = trainer(images, folder=tmp_path, training=training)
    run.say = said.append
    run.fit()
    assert len(said) == 1
    assert "step-00000008.pt cannot be read" in said[0]
    whole = trainer(images, training=training)
    whole.fit()
    assert same(whole.model.state_dict(), run.model.state_dict())


def test_a_truncated_checkpoint_does_not_take_the_place_of_a_good_one(images, tmp_path):
    trainer(images, folder=tmp_path, training={"epochs": 2}).fit()
    last = tmp_path / "step-00000008.pt"
    last.write_bytes(last.read_bytes()[:-100])
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(5, {"good": 1})
    assert checkpoints.latest(lambda text: None) == {"good": 1}


def test_the_best_weights_are_those_that_the_checkpoint_knows_of(images, tmp_path):
    """Killed between the two files, a run has better weights than its last checkpoint."""
    run = trainer(images, folder=tmp_path)
    run.fit()
    Checkpoints(tmp_path, 2).save_best({n: v + 1 for n, v in run.model.state_dict().items()})
    resumed = trainer(images, folder=tmp_path)
    assert resumed.fit() == run.result
    assert same(resumed.model.state_dict(), run.model.state_dict())


def test_checkpoints_of_another_student_are_refused(images, tmp_path):
    trainer(images, folder=tmp_path, training={"epochs": 1}).fit()
    with pytest.raises(SetupError, match=r"step-00000004.pt is of another student"):
        trainer(images, net=network(5), folder=tmp_path).fit()


def test_no_readable_checkpoint_is_an_error(images, tmp_path):
    trainer(images, folder=tmp_path, training={"epochs": 1}).fit()
    for path in tmp_path.glob("step-*"):
        path.write_bytes(b"no checkpoint")
    with pytest.raises(StorageError, match=r"no checkpoint in .* can be read"):
        trainer(images, folder=tmp_path).fit()


def test_the_last_checkpoints_and_the_best_weights_are_kept(images, tmp_path):
    run = trainer(images, folder=tmp_path, training={"epochs": 5, "keep": 3})
    run.fit()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["best.pt", *(f"step-{step:08d}.pt" for step in (12, 16, 20))]
    assert same(run.model.state_dict(), read(tmp_path / "best.pt"))


def test_a_full_disk_leaves_the_checkpoint_before(images, tmp_path, monkeypatch):
    trainer(images, folder=tmp_path, training={"epochs": 1}).fit()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"cannot be written: No space left .* is intact"):
        Checkpoints(tmp_path, 2).save(4, {"more": torch.zeros(3)})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# --- what it tells


def test_metrics_are_lines_of_json(images, tmp_path):
    path = tmp_path / "metrics.jsonl"
    trainer(images, callbacks=[JsonLines(path)], training={"log_every": 2}).fit()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8, 10, 12]
    assert [line["step"] for line in lines if "validation_accuracy" in line] == [4, 8, 12]


def test_lines_that_a_power_cut_took_are_no_hole_in_the_file(images, tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.load_state_dict({"size": 1000})
    lines.epoch(None, {"step": 1})
    lines.epoch(None, {"step": 2})
    assert lines.path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert lines.state_dict() == {"size": 24}


def test_what_is_not_finite_is_null_in_json(images, tmp_path):
    path = tmp_path / "metrics.jsonl"
    run = trainer(images, net=poisoned(images, 2), callbacks=[JsonLines(path)],
                  training={"nonfinite": "skip", "log_every": 1})  # fmt: skip
    run.fit()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.open()]
    assert [line["loss"] is None for line in lines[:3]] == [False, True, False]


def test_tensorboard_has_the_terms_and_the_accuracy(images, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer(images, network(8), callbacks=[TensorBoard(tmp_path)], training={"log_every": 4}).fit()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {"loss", "soft", "hard", "validation_accuracy", "images_per_second"} < set(
        events.Tags()["scalars"]
    )
    assert [event.step for event in events.Scalars("soft")] == [4, 8, 12]


def test_without_a_terminal_there_is_a_line_per_epoch(images):
    said = []
    trainer(images, network(8), callbacks=[Progress("here", said.append)]).fit()
    assert len(said) == 3
    assert all("soft" in line and "images/s" in line and "validation" in line for line in said)
    assert said[0].startswith("here ")


def test_on_a_terminal_there_is_a_bar(images, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    trainer(images, network(8), callbacks=[Progress("here")]).fit()
    shown = capsys.readouterr().out
    assert "12/12" in shown
    assert "soft" in shown


# --- what is refused


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"batch_size": 1}}, "two images per process"),
        ({"training": {"device": "nowhere"}}, "training.device nowhere"),
        ({"student": {"freeze": ["5.weigth"]}}, "no module '5.weigth'"),
        ({"distill": {"hints": {"9": "2"}}}, "no module '9'"),
        ({"distill": {"attention": {"5": "5"}}}, "both outputs must be"),
        ({"distill": {"hints": {"2": "5"}}}, "both outputs must be"),
    ],
)
def test_what_does_not_fit_is_said(images, sections, message):
    with pytest.raises(SetupError, match=message):
        trainer(images, network(8), **sections)


def test_options_of_the_loss_that_do_not_go_together_are_said(images):
    run = trainer(images, network(8), loss={"divergence": "dist"}, training={"accumulate": 2})
    with pytest.raises(SetupError, match="dist_gamma and num_items do not go together"):
        run.fit()


def test_a_teacher_of_other_classes_is_said(images):
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))
    with pytest.raises(SetupError, match="teacher_logits"):
        trainer(images, teacher).fit()


def test_validation_needs_labels(images):
    nothing = images[0], torch.full_like(images[1], UNLABELLED)
    with pytest.raises(SetupError, match=r"labels to evaluate with must be in \[0, 3\)"):
        Trainer(network(), None, images, nothing, config()).fit()
