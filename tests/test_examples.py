"""examples/: each learns, and as it would with the formula written out; the teacher is left alone.

Those of TRL and timm have tests of their own, test_trl.py and test_timm.py.
"""

import copy

import pytest
import torch
import torch.nn.functional as F

from kdkernels import FusedKDLoss

pytestmark = pytest.mark.usefixtures("one_thread")
LOOPS = ["plain_loop", "accelerate_loop", "lightning_module"]
OPTIONS = {"temperature": 3.0, "alpha": 0.7}


def eager(s, t, labels, num_items=None):
    """The loss of FusedKDLoss(**OPTIONS)."""
    active = labels != -100
    s, t, labels = s[active], t[active], labels[active]
    temperature, alpha = OPTIONS.values()
    log_q, log_p = F.log_softmax(s / temperature, -1), F.log_softmax(t / temperature, -1)
    soft = temperature**2 * F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    hard = F.cross_entropy(s, labels, reduction="sum")
    return (alpha * soft + (1 - alpha) * hard) / (active.sum() if num_items is None else num_items)


def eager_shifted(s, t, labels, num_items=None):
    return eager(s[:, :-1], t[:, :-1], labels[:, 1:], num_items)


def check_same_weights(one, other, but_not=None):
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-9, atol=1e-9)
    if but_not is not None:  # or nothing was trained
        with pytest.raises(AssertionError):
            check_same_weights(one, but_not)


# --- loops on scikit-learn's digits ---------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated")  # Lightning's own
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_learns(example, name):
    assert example(name).main() > 0.8


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated")
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_trains_as_the_plain_one_with_the_eager_formula(example, in_double, name):
    digits = example("digits")
    teacher, untrained = digits.trained_teacher(epochs=1), digits.network(width=16)
    taught = copy.deepcopy(teacher)
    ours, theirs = copy.deepcopy(untrained), copy.deepcopy(untrained)
    example(name).train(ours, teacher, FusedKDLoss(**OPTIONS), epochs=1)
    example("plain_loop").train(theirs, taught, eager, epochs=1)
    check_same_weights(ours, theirs, but_not=untrained)
    assert not teacher.training


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated")
def test_a_loop_leaves_the_teacher_alone(example, name):
    digits = example("digits")
    teacher = digits.network(width=32)
    before = copy.deepcopy(teacher)
    example(name).train(digits.network(width=16), teacher, FusedKDLoss(), epochs=1)
    check_same_weights(teacher, before)  # running means and variances among them
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_lightning_checkpoint_holds_the_student_alone(example):
    digits, lightning_module = example("digits"), example("lightning_module")
    models = digits.network(width=16), digits.network(width=32)
    module = lightning_module.Distillation(*models, FusedKDLoss())
    assert {name.split(".")[0] for name in module.state_dict()} == {"student"}


# --- Transformers' Trainer ------------------------------------------------------------------------


@pytest.fixture
def train(example, tmp_path):
    """Trains a student, and returns its trainer."""
    transformers = example("transformers")
    trainer_class = example("transformers_trainer").DistillationTrainer

    def train(student, teacher, loss_fn, data, collate=None, **options):
        options = {"num_train_epochs": 1, "learning_rate": 0.05, "optim": "sgd"} | options
        quiet = {"report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
        args = transformers.TrainingArguments(str(tmp_path), **options, **quiet)
        given = {"teacher": teacher, "loss_fn": loss_fn, "data_collator": collate}
        trainer = trainer_class(student, args, train_dataset=data, **given)
        trainer.train()
        return trainer

    return train


def test_an_image_student_learns(example):
    assert example("transformers_images").main() > 0.3


def test_a_language_student_learns(example):
    before, after = example("transformers_causal_lm").main()
    assert after < before / 4


def test_images_train_as_with_the_eager_formula(example, in_double, train):
    images = example("transformers_images")
    data, teacher, untrained = images.dataset()[:100], images.resnet(), images.mobilenet()
    trained = []
    for loss_fn in (FusedKDLoss(**OPTIONS), eager):
        student = copy.deepcopy(untrained)
        train(student, teacher, loss_fn, data, per_device_train_batch_size=25)
        trained.append(student)
    check_same_weights(*trained, but_not=untrained)


@pytest.fixture
def language(example, in_double):
    """(student, teacher, sequences, collate)"""
    causal_lm = example("transformers_causal_lm")
    torch.manual_seed(0)
    student, teacher = causal_lm.llama(width=16), causal_lm.llama(width=32)
    return student, teacher, causal_lm.sequences(32), causal_lm.collate


def test_shifted_labels_train_as_with_the_eager_formula(language, train):
    untrained, teacher, *data = language
    trained = []
    for loss_fn in (FusedKDLoss(**OPTIONS, shift=1), eager_shifted):
        student = copy.deepcopy(untrained)
        train(student, teacher, loss_fn, *data, per_device_train_batch_size=8)
        trained.append(student)
    check_same_weights(*trained, but_not=untrained)


def test_unequal_micro_batches_train_as_one_large_batch(language, train):
    untrained, teacher, *data = language
    trained = []
    for size in (16, 2):
        student = copy.deepcopy(untrained)
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 16 // size}
        train(student, teacher, FusedKDLoss(**OPTIONS, shift=1), *data, **sizes)
        trained.append(student)
    check_same_weights(*trained, but_not=untrained)


def test_the_loss_makes_up_for_the_mean_over_processes(language, train, monkeypatch):
    student, teacher, sequences, collate = language
    trainer = train(student, teacher, FusedKDLoss(shift=1), sequences, collate)
    inputs = collate(sequences[:4])
    alone = trainer.compute_loss(student, inputs, num_items_in_batch=torch.tensor(40))
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    assert trainer.compute_loss(student, inputs, num_items_in_batch=torch.tensor(40)) == 2 * alone


def test_the_trainer_leaves_the_teacher_alone(example, train):
    images = example("transformers_images")
    teacher, student = images.resnet(), images.mobilenet()
    before = copy.deepcopy(teacher)
    trainer = train(student, teacher, FusedKDLoss(), images.dataset()[:40])
    check_same_weights(teacher, before)
    groups = trainer.optimizer.param_groups
    optimized = {id(parameter) for group in groups for parameter in group["params"]}
    assert optimized == {id(parameter) for parameter in student.parameters()}
    assert not teacher.training
