"""``kdkernels`` on the command line, also as ``python -m kdkernels``."""

from __future__ import annotations

import argparse
import platform
import sys

import torch

import kdkernels
from kdkernels import backends


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
    train = commands.add_parser("train", help="distil on real images: a complete example")
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["train"]:  # info must work, and start fast, without the trainer
        from kdkernels.train import cli

        cli.add_options(train)
    arguments = parser.parse_args(given)
    if arguments.command == "train":
        return cli.run(arguments)
    info()
    return 0


if __name__ == "__main__":
    sys.exit(main())
