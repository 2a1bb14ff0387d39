"""The command `peft-sgrq`: one module a subcommand, listed in `COMMANDS`.

A subcommand's module has a docstring whose first line is its help, `add_arguments(parser)`, and `run(args)`. It
imports torch and the like inside `run`, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS: tuple[str, ...] = ("allocate", "calibrate", "inspect", "merge", "recover", "rotate", "verify")
_BY_SIGNAL = 128


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
        argv (`Sequence[str]` or `None`): The arguments; those of the process if not given, which then is what Ctrl-C
            ends. A caller that gives some gets the KeyboardInterrupt.

    Returns:
        `int`: The exit status: 0, 1 if a check said no, 2 for a mistake in the arguments or the files, 130 if it was
        interrupted (Ctrl-C), 141 if what it printed to was closed.
    """
    try:
        status = _run(argv)
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:  # by `| head`, which has what it wants
        _leave_closed_pipes()
        return _BY_SIGNAL + 13  # SIGPIPE, as a shell tells it
    return status


def _run(argv: Sequence[str] | None) -> int:
    try:
        try:
            args = build_parser().parse_args(argv)
        except SystemExit as end:
            return int(end.code or 0)
        import_module("peft_sgrq.plugin.registration").register()
        return args.run(args)
    except KeyboardInterrupt:
        if argv is not None:
            raise
        print("peft-sgrq: interrupted", file=sys.stderr)
        return _BY_SIGNAL + 2  # SIGINT
    except BrokenPipeError:
        raise
    except (ValueError, TypeError, OSError) as error:
        print(f"peft-sgrq: error: {error}", file=sys.stderr)
        return 2


def _leave_closed_pipes() -> None:
    """Has what is still to be printed into a pipe that nobody reads go nowhere, or Python complains when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except (AttributeError, ValueError):  # there is none, or it is closed
            pass
