"""``kdkernels`` on the command line, also as ``python -m kdkernels``."""

from __future__ import annotations

import argparse
import platform
import sys

import torch

import kdkernels
from kdkernels import backends

TRAINER = {
    "train": "distil a teacher into a student, beside the student alone",
    "evaluate": "accuracy of a trained model on its test images, or on a folder",
    "predict": "classes of image files",
    "export": "a trained model for torch.export and ONNX, checked",
    "search": "look for temperature, alpha and learning rate on validation images",
    "models": "the models that are built in",
}


def info() -> None:
    """Print what is available, what is not, and why."""
    print(
        f"kdkernels {kdkernels.__version__}  torch {torch.__version__}  "
        f"Python {platform.python_version()}  {platform.system()} {platform.machine()}"
    )
    for name, available, text in backends.report():
        print(f"  {name:<10} {'yes' if available else 'no ':<4} {text}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="kdkernels", description=kdkernels.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="which backends can run here, and why others cannot")
    given = sys.argv[1:] if argv is None else argv
    for name, text in TRAINER.items():
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        if given[:1] == [name]:  # info must work, and start fast, without the trainer
            try:
                from kdkernels.train import cli
            except ImportError as error:
                missing = f"{error.name} is not installed: pip install 'kdkernels[train]'"
                print(f"kdkernels {name}: error: {missing}", file=sys.stderr)
                return 2
            cli.add_options(name, command)
    arguments, unknown = parser.parse_known_args(given)
    if arguments.command != given[0]:  # nothing is added to what comes before the command
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if arguments.command != "info":
        return cli.run(arguments.command, arguments, unknown)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    info()
    return 0


if __name__ == "__main__":
    sys.exit(main())
