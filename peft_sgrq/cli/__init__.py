"""The command `peft-sgrq`: one module a subcommand, listed in `COMMANDS`.

A subcommand's module has a docstring whose first line is its help, `add_arguments(parser)`, `check(args)`, which
refuses what is not there and what cannot be written, and `run(args)`. It imports torch and the like inside `run`, so
that `--help` and mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any

from peft_sgrq import __version__

COMMANDS: tuple[str, ...] = ("allocate", "calibrate", "inspect", "merge", "recover", "rotate", "verify")
_BY_SIGNAL = 128


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command with all its subcommands."""
    parser = argparse.ArgumentParser(prog="peft-sgrq", description="Saliency-guided scale tuning of quantized models.")
    parser.add_argument("--version", action="version", version=f"peft-sgrq {__version__}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(metavar="COMMAND")
    for name in COMMANDS:
        module = import_module(f"{__name__}.{name}")
        text = (module.__doc__ or "").strip().splitlines()[0]
        command = commands.add_parser(name, help=text, description=text)
        module.add_arguments(command)
        command.set_defaults(check=module.check, run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv (`Sequence[str]` or `None`): The arguments; those of the process if not given, which then is what Ctrl-C
            ends. A caller that gives some gets the KeyboardInterrupt.

    Returns:
        `int`: The exit status: 0, 1 if a check said no, 2 for a mistake in the arguments or the files, 130 if it was
        interrupted (Ctrl-C), 141 if what it printed to was closed.

    Raises:
        SystemExit: If the process is told to end (SIGTERM, SIGHUP); what was half written is gone then.
    """
    try:
        with _ends_cleanly() if argv is None else nullcontext():
            status = _run(argv)
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:  # by `| head`, which has what it wants
        _leave_broken_outputs()
        return _BY_SIGNAL + 13  # SIGPIPE, as a shell tells it
    except OSError as error:  # no space where the output is led to
        print(f"peft-sgrq: error: what is printed could not be written: {error.strerror or error}", file=sys.stderr)
        _leave_broken_outputs()
        return 2
    return status


def _run(argv: Sequence[str] | None) -> int:
    try:
        try:
            parser = build_parser()
            args = parser.parse_args(argv)
        except SystemExit as end:
            return int(end.code or 0)
        if args.run is None:
            parser.print_help()
            return 0
        args.check(args)
        _quiet_libraries()
        import_module("peft_sgrq.plugin.registration").register()
        return args.run(args)
    except KeyboardInterrupt:
        if argv is not None:
            raise
        print("peft-sgrq: interrupted", file=sys.stderr)
        return _BY_SIGNAL + 2  # SIGINT
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        if error.errno is not None and error.filename is None and sys.stdout:
            sys.stdout.flush()  # raises again if it is of what is printed, which is still to be written then
        spelled = error if error.filename is None else f"{error.filename}: {error.strerror}"
        print(f"peft-sgrq: error: {spelled}", file=sys.stderr)
        return 2
    except (ValueError, TypeError, ImportError) as error:
        print(f"peft-sgrq: error: {error}", file=sys.stderr)
        return 2


@contextmanager
def _ends_cleanly() -> Iterator[None]:
    """While this is open, a process that is told to end cleans up, as one does that Ctrl-C interrupts."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(_BY_SIGNAL + number)

    known = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    is_main = threading.current_thread() is threading.main_thread()  # no other may
    numbers = [number for number in known if is_main and signal.getsignal(number) is signal.SIG_DFL]
    try:
        for number in numbers:
            signal.signal(number, end)
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _quiet_libraries() -> None:
    """Keeps what libraries say about kernels they have not found, and a command does not need, from coming first."""
    for library in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # the last warns of torchao
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="You passed `quantization_config`")  # to choose a kernel


def _leave_broken_outputs() -> None:
    """Has what is still to be printed where nothing can be written go nowhere, or Python complains when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except (AttributeError, ValueError):  # there is none, or it is closed
            pass
