"""What each process of tests/test_train_distributed.py does, and what one alone does.

Started by torchrun with a folder as argument; in it the first process leaves its weights.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

from kdkernels.train import Callback, Config, Trainer, distributed
from kdkernels.train.data import UNLABELLED
from kdkernels.train.errors import Interrupted

CASES = {
    "labels alone": {},
    "distilled": {"teacher": True},
    "several parts of a batch": {"teacher": True, "training": {"batch_size": 8, "accumulate": 2}},
    "of 5 and 4 images": {"teacher": True, "training": {"batch_size": 9, "accumulate": 4}},
    "hints": {"teacher": True, "distill": {"hints": {"2": "2"}, "learn_temperature": True}},
    "labelled images alone": {"teacher": True, "loss": {"distill_ignored": False},
                              "distill": {"hints": {"2": "2"}}},
    "class weights": {"teacher": True, "loss": {"weight": [1.0, 2.0, 3.0]}},
}  # fmt: skip


class Records(Callback):
    def __init__(self):
        self.found = []

    def step(self, trainer, record, images_per_second):
        self.found.append({name: record[name] for name in ("step", "loss")})

    def epoch(self, trainer, record):
        self.found.append(record)


def network(width):
    """Without batch norm: its statistics are each process's own."""
    return nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 3))


def run(case):
    """Weights and what was recorded; 23 images leave an uneven last batch, some have no label."""
    torch.manual_seed(0)
    student, teacher = network(6), network(8)
    images, labels = torch.rand(23, 1, 4, 4), torch.arange(23) % 3
    few = labels.clone()
    few[[1, 2, 5, 8, 9, 10, 11, 13]] = UNLABELLED
    sections = {name: value for name, value in case.items() if name != "teacher"}
    training = {"epochs": 2, "batch_size": 6, "optimizer": "sgd", "learning_rate": 0.1}
    sections["training"] = training | sections.get("training", {})
    config = Config(augment={"crop": 0}, **sections)
    data, validation = (images, few), (images[:7], labels[:7])
    records = Records()
    teachers = teacher if case.get("teacher") else None
    Trainer(student, teachers, data, validation, config, callbacks=[records], say=str).fit()
    return student.state_dict(), records.found


def interrupted(folder):
    """A signal reaches the second process alone; then both go on. What each drew, and said."""

    class Signal(Callback):
        def step(self, trainer, record, images_per_second):
            if record["step"] == 3 and distributed.rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    config = Config(training={"epochs": 2, "batch_size": 6})
    data = torch.rand(23, 1, 4, 4), torch.arange(23) % 3
    try:
        Trainer(network(6), None, data, data, config, folder=folder, callbacks=[Signal()]).fit()
    except Interrupted as error:
        said = str(error)
    Trainer(network(6), None, data, data, config, folder=folder, say=str).fit()
    return said, torch.rand(3)


if __name__ == "__main__":
    distributed.start()
    found = {name: run(case) for name, case in CASES.items()}
    found["interrupted"] = interrupted(Path(sys.argv[1]) / "interrupted")
    torch.save(found, Path(sys.argv[1]) / f"{distributed.rank()}.pt")
