"""Merge an adapter into the files of its base: no model in memory, only scale tensors change."""

from __future__ import annotations

import argparse

from peft_sgrq.cli.inputs import add_adapter_arguments, check_adapter
from peft_sgrq.files.gguf_names import makes_gguf
from peft_sgrq.files.output_folder import check_merged_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_adapter_arguments(parser, "folder to make; a file if the base is a .gguf file")
    parser.add_argument("--overwrite", action="store_true", help="replace MERGED if it exists")
    parser.add_argument(
        "--name", help="of a .gguf file: the general.name to write into its header (default: as it is)"
    )
    parser.add_argument("--no-check", action="store_true", help="merge even if the base is not the adapter's")


def check(args: argparse.Namespace) -> None:
    check_adapter(args)
    if not makes_gguf(args.merged, args.base, args.adapter):
        check_merged_folder(args.merged, args.overwrite)


def run(args: argparse.Namespace) -> int:
    from peft_sgrq.checkpoint.merge import merge_checkpoint

    report = merge_checkpoint(
        args.base,
        args.adapter,
        args.merged,
        revision=args.revision,
        overwrite=args.overwrite,
        check_base=not args.no_check,
        name=args.name,
    )
    print(f"{report.out}: {report.layers} layers merged, {report.bytes_changed / 1e6:.2f} MB of scales written")
    return 0
