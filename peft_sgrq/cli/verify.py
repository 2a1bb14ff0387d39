"""Check that a checkpoint is its base with an adapter merged, and nothing else; exit status 1 if not."""

from __future__ import annotations

import argparse
import json

from peft_sgrq.cli.inputs import add_adapter_arguments, check_adapter
from peft_sgrq.files.hub import check_source

_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_adapter_arguments(parser, "folder, Hub id or .gguf file of the merged checkpoint")
    parser.add_argument("--no-check", action="store_true", help="compare even if the base is not the adapter's")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def check(args: argparse.Namespace) -> None:
    check_adapter(args)
    check_source(args.merged, "merged checkpoint")


def run(args: argparse.Namespace) -> int:
    from peft_sgrq.checkpoint.verify import verify_checkpoint

    report = verify_checkpoint(
        args.base, args.adapter, args.merged, revision=args.revision, check_base=not args.no_check
    )
    if args.json:
        print(json.dumps({"ok": report.ok, **report._asdict()}, indent=2))
        return 0 if report.ok else 1
    for line in (report.errors + report.notes)[:_SHOWN]:
        print(line)
    if len(report.errors) > _SHOWN:
        print(f"and {len(report.errors) - _SHOWN} more")
    counts = f"{report.same} tensors as in the base, {report.merged} with the adapter merged"
    print(f"{'right' if report.ok else 'WRONG'}: {counts}, {len(report.errors)} differences")
    return 0 if report.ok else 1
