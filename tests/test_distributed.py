"""Several processes of one machine, by gloo: what they do is in ``distributed_cases.py``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_cases import OPTIONS

from kdkernels import VocabParallel, kd_loss
from kdkernels.vocab_parallel import SHARDED

CASES = Path(__file__).with_name("distributed_cases.py")


@pytest.mark.parametrize("world", [2, 4])
def test_all_cases(world, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_VERBOSE": "0"}
    outputs = [tmp_path / f"{rank}.txt" for rank in range(world)]
    processes = []
    for rank, output in enumerate(outputs):
        command = [sys.executable, CASES, tmp_path / "store", str(rank), str(world)]
        with output.open("w") as file:
            processes.append(
                subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
            )
    try:
        codes = [process.wait(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    said = "\n".join(f"-- process {k}\n{o.read_text()[-3000:]}" for k, o in enumerate(outputs))
    assert codes == [0] * world, said


def test_every_divergence_that_has_a_sharded_form_is_asked():
    asked = [options.get("divergence", "forward_kl") for options in OPTIONS]
    assert {name for name in asked if isinstance(name, str)} == SHARDED


def test_a_group_of_one_is_the_loss_itself(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'one'}", rank=0, world_size=1)
    try:
        s, t, y = torch.randn(4, 9), torch.randn(4, 9), torch.tensor([1, 8, -100, 0])
        alone = kd_loss(s, t, y)
        sharded = kd_loss(s, t, y, vocab_parallel=VocabParallel(None, 0, 9))
        torch.testing.assert_close(sharded, alone, rtol=2e-6, atol=2e-6)
        assert torch.equal(kd_loss(s, t, y, group=dist.group.WORLD), alone)
        with pytest.raises(ValueError, match="num_items and group do not go together"):
            kd_loss(s, t, y, group=dist.group.WORLD, num_items=3)
    finally:
        dist.destroy_process_group()
