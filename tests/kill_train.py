"""Kill ``kdkernels train`` with SIGKILL at random moments, and resume it until it is through.

    python tests/kill_train.py [KILLS] [SEED]

Every model, metric and summary must then be, byte for byte, that of a run that was left alone.
"""

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OPTIONS = """
    --data.name digits --seeds 2 --training.epochs 6 --training.checkpoint_every 5
    --augment.crop 1 --augment.rotation 10 --augment.mixup 0.2 --training.ema 0.9
    --training.accumulate 2 --training.threads 1 --training.log_every 1
""".split()  # noqa: SIM905
FILES = ("**/model.safetensors", "**/metrics.jsonl", "**/outcome.json", "summary.json", "*.toml")


def start(*arguments: object) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-m", "kdkernels", "train", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def main(kills: int, seed: int) -> int:
    work, draw = Path(tempfile.mkdtemp()), random.Random(seed)
    began = time.perf_counter()
    assert start(*OPTIONS, "--out", work / "whole").wait() == 0
    seconds = time.perf_counter() - began
    done = rounds = 0
    while done < kills:
        rounds += 1
        folder = work / f"killed{rounds}"
        arguments = [*OPTIONS, "--out", folder]
        while True:
            process = start(*arguments)
            limit = draw.uniform(0.1, 1.0) * seconds if done < kills else None
            try:
                code = process.wait(limit)
                assert code == 0, code
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                done += 1
                print(f"kill {done} after {limit:.1f} s", flush=True)
            if (folder / "config.toml").exists():
                arguments = ["--resume", folder]
            else:
                shutil.rmtree(folder, ignore_errors=True)
        for path in (p for pattern in FILES for p in (work / "whole").glob(pattern)):
            other = folder / path.relative_to(work / "whole")
            assert path.read_bytes() == other.read_bytes(), other
    shutil.rmtree(work)
    print(f"{done} kills in {rounds} runs lost nothing")
    return 0


if __name__ == "__main__":
    given = [int(argument) for argument in sys.argv[1:]]
    sys.exit(main(*(given + [20, 0][len(given) :])))
