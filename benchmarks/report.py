"""``python -m benchmarks.report``: every provider on every shape in one run.

Writes ``benchmarks/results/<device>.md``, ``.json`` and the plots, again after each measurement, so
that a run cut short keeps what it has. On a machine that does nothing else it takes ten minutes;
``--quick`` tries it out in one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu_report import ROOT
from benchmarks.gpu_results import FORWARD, TRAIN, Results, read_part, write_part
from benchmarks.markdown import duration, markdown
from benchmarks.readme import rewrite_readme
from benchmarks.results import TEMPERATURE, empty, stem
from benchmarks.targets import LARGE, LARGE_TEMPERATURES, judge

# CIFAR-10, CIFAR-100 and ImageNet batches; a language model's; one with a large vocabulary.
SHAPES = [(128, 10), (128, 100), (128, 1000), *LARGE]
QUICK_SHAPES = [(128, 10), (64, 10000)]
DTYPES = ["float32", "bfloat16"]
HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}  # torch reads it once, as it starts
HUGE_PAGE = 2 << 20  # bytes; smaller arrays are none of its business


class Kind(NamedTuple):
    """Which measurements are made of one shape and dtype."""

    direction: str
    temperature: float


class Report:
    """Results as they come in, and where they are written."""

    def __init__(self, folder: Path, results: Results) -> None:
        self.folder, self.results = folder, results
        self.plots: list[str] = []

    @property
    def stem(self) -> str:
        return stem(self.results["environment"])

    def add(self, key: str, found: Results) -> None:
        self.results[key].append(found)
        self.write()

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.results["targets"] = judge(self.results)
        write_part(self.folder, self.stem, self.results)
        text = markdown(self.results, self.plots)
        (self.folder / f"{self.stem}.md").write_text(text, encoding="utf-8")

    def draw(self) -> None:
        from benchmarks.plots import draw

        self.folder.mkdir(parents=True, exist_ok=True)
        self.plots = draw(self.results, self.folder)
        self.write()


# --- what is measured -----------------------------------------------------------------------------


def kinds(shape: tuple[int, int]) -> list[Kind]:
    """The default temperature in both directions, and the others for the large shapes."""
    others = [t for t in LARGE_TEMPERATURES if t != TEMPERATURE] if shape in LARGE else []
    return [
        Kind(TRAIN, TEMPERATURE),
        *(Kind(TRAIN, t) for t in others),
        Kind(FORWARD, TEMPERATURE),
    ]


def measurements(
    shapes: Iterable[tuple[int, int]], seconds: float, *, huge_pages: bool
) -> Iterator[Results]:
    """Of all shapes; with huge pages, of those that fill some, with a backward, times alone."""
    import torch

    from benchmarks.measuring import measure
    from benchmarks.providers import Case

    for name in DTYPES:
        dtype = getattr(torch, name)
        for shape in shapes:
            if huge_pages and shape[0] * shape[1] * dtype.itemsize < HUGE_PAGE:
                continue
            case = Case(*shape, TEMPERATURE, dtype)
            for direction, temperature in kinds(shape):
                if huge_pages and direction == FORWARD:
                    continue
                yield measure(
                    case.at(temperature),
                    seconds,
                    direction,
                    with_memory=not huge_pages,
                    huge_pages=huge_pages,
                )


def run(report: Report, options: argparse.Namespace) -> None:
    """Everything, the most useful first."""
    from benchmarks import curves, providers
    from benchmarks.environment import environment

    report.results["environment"] = environment()
    report.results["missing"] = providers.absent()
    try:
        for found in measurements(options.shapes, options.seconds, huge_pages=False):
            report.add("measurements", found)
            show(found)
        report.draw()
        with_huge_pages(report, options)
        grid = curves.QUICK if options.quick else curves.FULL
        for curve in curves.curves(grid, options.seconds):
            report.add("curves", curve)
            print(f"curve over {curve['over']}, {curve['title']}", flush=True)
    finally:
        report.draw()


def with_huge_pages(report: Report, options: argparse.Namespace) -> None:
    """The same in a process whose torch asks for huge pages; kept as far as it came."""
    with tempfile.TemporaryDirectory() as folder:
        shapes = [f"{rows}x{classes}" for rows, classes in options.shapes]
        command = [sys.executable, "-m", "benchmarks.report", "--huge-pages-into", folder]
        command += ["--seconds", str(options.seconds), "--shapes", *shapes]
        status = None
        try:
            status = subprocess.run(command, cwd=ROOT, env=os.environ | HUGE_PAGES).returncode
        finally:
            report.results["measurements"] += read_part(Path(folder), "measurements", [])
            if status != 0:
                reason = "was interrupted" if status is None else f"ended with status {status}"
                report.results["missing"]["the rest with huge pages"] = f"its process {reason}"
    report.write()


def measure_huge_pages(folder: Path, options: argparse.Namespace) -> None:
    """What the process started by ``with_huge_pages`` does."""
    made = []
    for found in measurements(options.shapes, options.seconds, huge_pages=True):
        made.append(found)
        write_part(folder, "measurements", made)
        show(found)


# --- the command ----------------------------------------------------------------------------------


def show(m: Results) -> None:
    times = ", ".join(
        f"{name} {duration(found['seconds']) if 'seconds' in found else found['error']}"
        for name, found in m["providers"].items()
    )
    pages = ", huge pages" if m["huge_pages"] else ""
    kind = f"{m['dtype']} T = {m['temperature']:g} {m['direction']}{pages}"
    print(f"({m['rows']}, {m['classes']}) {kind}: {times}", flush=True)


def summary(report: Report) -> None:
    print()
    for target in report.results["targets"]:
        met = {True: "met", False: "NOT MET", None: "not measured"}[target["met"]]
        print(f"{met:<12} {target['name']}, {target['of']}: {target['measured']}")
    print(f"\n{report.folder / report.stem}.md")


def shape(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape like 512x32000")
    rows, classes = text.split("x")
    return int(rows), int(classes)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--seconds", type=float, help="of turns, of each measurement (default: 8)")
    parser.add_argument("--quick", action="store_true", help="0.2 seconds each, and small shapes")
    parser.add_argument("--shapes", type=shape, nargs="+", metavar="ROWSxCLASSES")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--readme", action="store_true", help="rewrite its generated part, too")
    parser.add_argument(
        "--again", type=Path, metavar="JSON", help="print and plot these results, measure nothing"
    )
    parser.add_argument("--huge-pages-into", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.seconds is None:
        options.seconds = 0.2 if options.quick else 8.0
    if options.shapes is None:
        options.shapes = QUICK_SHAPES if options.quick else SHAPES
    if options.readme and not options.out.resolve().is_relative_to(ROOT):
        parser.error("--readme needs the results inside the repository, to show the plot")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.huge_pages_into:
        measure_huge_pages(options.huge_pages_into, options)
        return 0
    if options.again:
        report = Report(options.out, json.loads(options.again.read_text(encoding="utf-8")))
        report.draw()
    else:
        report = Report(options.out, empty())
        run(report, options)
    summary(report)
    if options.readme:
        folder = options.out.resolve().relative_to(ROOT).as_posix()
        rewrite_readme(ROOT / "README.md", report.results, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
