"""Several processes train what one would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_distributed import CASES, run

from kdkernels.train import distributed

pytestmark = pytest.mark.usefixtures("one_thread")
HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def torchrun(processes: int, *command: object) -> str:
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*TORCHRUN, str(processes), *map(str, command)], env=environment, text=True, timeout=300,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def test_gradients_and_metrics_are_those_of_one_process(tmp_path):
    torchrun(2, HERE / "train_distributed.py", tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, case in CASES.items():
        weights, records = run(case)
        for found in (first, second):
            torch.testing.assert_close(found[name][0], weights, rtol=1e-4, atol=1e-6, msg=name)
            for ours, theirs in zip(records, found[name][1], strict=True):
                assert ours == pytest.approx(theirs, rel=1e-4), name
        assert all(torch.equal(second[name][0][k], v) for k, v in first[name][0].items())

    ours, theirs = (found["interrupted"] for found in (first, second))
    assert ours[0] == theirs[0]
    assert ours[0].startswith("SIGTERM at step 3: last good checkpoint: ")
    assert ours[0].endswith("step-00000003.pt")
    assert not torch.equal(ours[1], theirs[1])


def test_every_process_has_its_gpu_and_also_the_cpu(monkeypatch):
    said = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", said.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", said.append)
    for name, value in (("WORLD_SIZE", "8"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    distributed.start()
    assert said == [3, "cpu:gloo,cuda:nccl"]


def test_the_command_runs_under_torchrun(tmp_path):
    folder = tmp_path / "run"
    options = ["--data.name", "digits", "--seeds", "1", "--training.epochs", "2", "--out", folder,
               "--training.batch_size", "256", "--baselines", "false"]  # fmt: skip
    said = torchrun(2, "-m", "kdkernels", "train", *options)
    assert said.count("seed 0 distilled") == 2  # one process speaks
    assert (folder / "report.html").exists()
    assert len((folder / "seed0" / "distilled" / "metrics.jsonl").read_text().splitlines()) == 3
