"""The commands ``train``, ``evaluate``, ``predict``, ``export``, ``search`` and ``models``."""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from hashlib import sha256
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch

from kdkernels.train import distributed
from kdkernels.train.checkpoints import load_model, write
from kdkernels.train.config import Config, Data, dumps, load, options, parse
from kdkernels.train.data import load as load_data
from kdkernels.train.data import read_folder, read_image, to_float
from kdkernels.train.errors import Interrupted, SetupError, StorageError, TrainError, nearest
from kdkernels.train.evaluation import evaluate
from kdkernels.train.experiment import Experiment
from kdkernels.train.export import export
from kdkernels.train.models import MODELS, build
from kdkernels.train.report import table, write_report
from kdkernels.train.search import search

SEAL = "\n# --resume needs all above as it was, by its sha256: "


def add_options(command: str, parser: argparse.ArgumentParser) -> None:
    """Add the options of a command to its parser."""
    add = partial(parser.add_argument, type=Path, metavar="DIR")
    usage = {"predict": " RUN IMAGE ...", "evaluate": " RUN", "export": " RUN"}.get(command, "")
    parser.usage = f"%(prog)s{usage} [options]"  # argparse prints it above errors: one line
    if usage:
        add("model", metavar="RUN", help="folder of a run, or model.safetensors")
    if command in ("train", "search"):
        add("--config", metavar="FILE", help="TOML file with any of these")
        for name, (annotation, text) in options().items():
            flag: dict[str, Any] = {"nargs": "?", "const": "true"} if annotation is bool else {}
            help = text.replace("%", "%%")
            parser.add_argument(f"--{name}", metavar="VALUE", help=help, **flag)
    if command in ("train", "search", "export"):
        add("--out", help="new folder (runs/...); of an export: any (beside the model)")
    if command == "train":
        add("--resume", help="go on with the run in this folder")
    if command == "search":
        parser.add_argument("--trials", type=int, default=20, help="in all, earlier ones included")
    if command == "evaluate":
        add("--folder", help="images, a folder per class (the test images of the run)")
    if command == "predict":
        add("images", nargs="+", metavar="IMAGE")


def run(command: str, given: argparse.Namespace, unknown: list[str]) -> int:
    """Run a command; returns the exit code. A :class:`TrainError` becomes one line."""
    try:
        if unknown:
            wrong = unknown[0].split("=")[0]
            raise SetupError(
                f"unknown option {wrong}{nearest(wrong, (f'--{name}' for name in vars(given)))}"
            )
        {"train": _train, "evaluate": _evaluate, "predict": _predict, "export": _export,
         "search": _search, "models": _models}[command](given)  # fmt: skip
    except TrainError as error:
        print(f"kdkernels {command}: error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # where no folder can be made, TensorBoard finds the disk full, ...
        print(f"kdkernels {command}: error: {error}", file=sys.stderr)
        return StorageError.exit_code
    except KeyboardInterrupt:
        print(f"kdkernels {command}: stopped", file=sys.stderr)
        return 130  # what a shell reports for SIGINT
    return 0


def _configuration(given: argparse.Namespace) -> Config:
    changes: dict[str, Any] = {}
    for name, (annotation, _) in options().items():
        if (text := getattr(given, name)) is not None:
            changes[name] = parse(text, annotation)
    return load(given.config, changes)


def _say(text: str) -> None:
    if distributed.rank() == 0:
        print(text, flush=True)


def _train(given: argparse.Namespace) -> None:
    began = time.perf_counter()
    distributed.start()
    if given.resume is not None:
        if sum(value is not None for value in vars(given).values()) > 2:  # command and resume
            raise SetupError("--resume goes on with the run's own configuration: no other option")
        folder, config = given.resume, load(given.resume / "config.toml")
        _refuse_edited(folder / "config.toml")
    else:
        config = _configuration(given)
        folder = Path(distributed.agree(str(_new_folder(given.out, config.data.name))))
    experiment = Experiment(config, folder, _say)
    if given.resume is None and distributed.rank() == 0:
        body = dumps(config)
        write(folder / "config.toml", body + SEAL + sha256(body.encode()).hexdigest() + "\n")
    splits = experiment.splits
    _say(f"{config.teacher.name} → {config.student.name} on {config.data.name}: "
         f"{len(splits.train)} training, {len(splits.validation)} validation and "
         f"{len(splits.test)} test images; the teacher knows all labels, the student "
         f"{config.data.labelled or 'all'}")  # fmt: skip
    try:
        outcomes = experiment.run()
    except Interrupted as error:
        error.args = (f"{error}; kdkernels train --resume {folder} goes on",)
        raise
    if distributed.rank() == 0:
        write_report(folder, config, outcomes)
    _say(f"\n{table(outcomes)}\n\nreport  {folder / 'report.html'}\n"
         f"{time.perf_counter() - began:.0f} s")  # fmt: skip


def _refuse_edited(path: Path) -> None:
    """What was trained before would not be what the report says of it."""
    body, is_sealed, seal = path.read_text(encoding="utf-8").rpartition(SEAL)
    if is_sealed and seal.strip() != sha256(body.encode()).hexdigest():
        raise SetupError(
            f"{path} was edited after the run began: put it back, or begin anew with --config "
            f"{path} (without its last line --resume takes it as it is)"
        )


def _new_folder(out: Path | None, name: str) -> Path:
    """Make the run folder. Nothing is ever overwritten, and two runs never share a folder."""
    if distributed.rank() > 0:
        return Path()
    try:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            if any(out.iterdir()):
                raise SetupError(f"--out {out} is not empty: name a new folder, or --resume {out}")
            return out
        for candidate in chain([name], (f"{name}-{n}" for n in count(2))):
            folder = Path("runs", candidate)
            if not folder.exists():
                folder.mkdir(parents=True)
                break
    except OSError as error:
        raise SetupError(f"the run folder cannot be made: {error}") from error
    return folder


def _evaluate(given: argparse.Namespace) -> None:
    model, about = load_model(given.model)
    if given.folder is None:
        images = load_data(Data(**about["data"])).test
    else:
        channels, height, width = about["shape"]
        images = read_folder(given.folder, about["classes"], channels, (width, height))
    found = evaluate(model, images)
    print(f"accuracy {found.accuracy:.2%}  cross entropy {found.loss:.4f}  {len(images)} images")


@torch.no_grad()
def _predict(given: argparse.Namespace) -> None:
    model, about = load_model(given.model)
    channels, height, width = about["shape"]
    for path in given.images:
        try:
            image = to_float(read_image(path, channels, (width, height)))
        except ValueError as error:
            raise SetupError(str(error)) from error
        found = model(image.unsqueeze(0)).softmax(1)[0].topk(min(3, len(about["classes"])))
        pairs = zip(found.indices.tolist(), found.values.tolist(), strict=True)
        print(f"{path}  " + "  ".join(f"{about['classes'][i]} {p:.1%}" for i, p in pairs))


def _export(given: argparse.Namespace) -> None:
    model, about = load_model(given.model)
    out = given.out or (given.model if given.model.is_dir() else given.model.parent)
    for name, difference in export(model, about["shape"], out).items():
        print(f"{out / name}  largest difference to PyTorch {difference:.1e} of the logits")


def _search(given: argparse.Namespace) -> None:
    config = _configuration(given)
    folder = given.out or Path("runs", f"search-{config.data.name}")
    best = search(config, given.trials, folder)
    print(f"best: temperature {best.loss['temperature']:.4g}, alpha {best.loss['alpha']:.4g}, "
          f"learning rate {best.training.learning_rate:.4g}\n"
          f"kdkernels train --config {folder / 'best.toml'}")  # fmt: skip


def _models(given: argparse.Namespace) -> None:
    for name in MODELS:
        model = build(name, 10, 1, {})
        print(
            f"{name:<14} {sum(p.numel() for p in model.parameters()):>10,} parameters, 10 classes"
        )
