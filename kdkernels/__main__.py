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
    arguments = parser.parse_args(argv)
    info()
    return 0


if __name__ == "__main__":
    sys.exit(main())
