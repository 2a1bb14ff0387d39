"""The command `peft-sgrq`: one module a subcommand, listed in `COMMANDS`.

A subcommand's module has a docstring whose first line is its help, `add_arguments(parser)`, and `run(args)`. It
imports torch and the like inside `run`, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS: tuple[str, ...] = ("calibrate", "inspect", "merge", "recover", "verify")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command with all its subcommands."""
    parser = argparse.ArgumentParser(prog="peft-sgrq", description="Saliency-guided scale tuning of quantized models.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = import_module(f"{__name__}.{name}")
        text = (module.__doc__ or "").strip().splitlines()[0]
        command = commands.add_parser(name, help=text, description=text)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv (`Sequence[str]` or `None`): The arguments; those of the process if not given.

    Returns:
        `int`: The exit status: 0, 1 if a check said no, 2 for a mistake in the arguments or the files.
    """
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, TypeError, OSError) as error:
        print(f"peft-sgrq: error: {error}", file=sys.stderr)
        return 2
