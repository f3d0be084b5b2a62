"""Progress: bars on a terminal, readable lines anywhere else."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Protocol


class Progress(Protocol):
    """What the training loop reports. A context manager: bars are closed on the way out."""

    def __enter__(self) -> Progress: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    def start(self, run: str, steps: int) -> None: ...

    def step(self, step: int, terms: dict[str, float]) -> None: ...

    def evaluated(self, step: int, accuracy: float) -> None: ...


def _shown(terms: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:7.4f}" for name, value in terms.items())


class Bars:
    """One bar per run, with the terms of the loss and the validation accuracy beside it."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        self.progress = RichProgress(
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[terms]}{task.fields[accuracy]}"),
        )

    def __enter__(self) -> Progress:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def start(self, run: str, steps: int) -> None:
        self.task = self.progress.add_task(run, total=steps, terms="", accuracy="")

    def step(self, step: int, terms: dict[str, float]) -> None:
        self.progress.update(self.task, completed=step, terms=_shown(terms))

    def evaluated(self, step: int, accuracy: float) -> None:
        self.progress.update(self.task, accuracy=f"  validation {accuracy:.1%}")


class Lines:
    """A few lines per run, for logs and pipes."""

    LINES = 4

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def start(self, run: str, steps: int) -> None:
        self.run, self.steps, self.printed = run, steps, 0

    def step(self, step: int, terms: dict[str, float]) -> None:
        self.terms = terms

    def evaluated(self, step: int, accuracy: float) -> None:
        if step * self.LINES >= (self.printed + 1) * self.steps:
            self.printed = step * self.LINES // self.steps
            print(
                f"{self.run:<24} step {step:>5}/{self.steps}  {_shown(self.terms)}  "
                f"validation {accuracy:.1%}",
                flush=True,
            )


def progress() -> Progress:
    """Bars if standard output is a terminal, lines if not."""
    return Bars() if sys.stdout.isatty() else Lines()
