"""Score the columns of a model on some data and save them, to select from at any ratio.

The file is what `Saliency.load` reads: `Saliency.load(path).configure(config, ratio=...)` fills a config with a
selection, and `peft-sgrq inspect` shows what ratios would give.
"""

from __future__ import annotations

import argparse
import sys

from peft_sgrq.choices import DEFAULT_CRITERION
from peft_sgrq.cli import inputs
from peft_sgrq.cli.argument_types import CRITERION_NAMES, criterion
from peft_sgrq.files.output import check_output, is_standard_output
from peft_sgrq.files.paths_apart import check_not_read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    inputs.add_model_arguments(parser)
    parser.add_argument("data", metavar="DATA", help="a .txt, .jsonl, .csv or .parquet file, or a dataset of the Hub")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the safetensors file to write")
    parser.add_argument(
        "--criterion",
        default=DEFAULT_CRITERION,
        type=criterion,
        help=f"how salience is measured: {CRITERION_NAMES} (default: diag)",
    )
    inputs.add_data_arguments(parser)
    parser.add_argument("--original", help="for the criterion error: the model before quantization")
    parser.add_argument("--memory-limit", metavar="SIZE", help='of Hessians in models that are no chain, e.g. "4GB"')


def check(args: argparse.Namespace) -> None:
    check_output(args.output)
    check_not_read(args.output, args.model, args.data, args.original)
    inputs.check_model(args)
    inputs.check_sources(args, model=args.model, original=args.original)


def run(args: argparse.Namespace) -> int:
    from peft_sgrq.config import SGRQConfig
    from peft_sgrq.selection.calibrate import calibrate

    # A ratio is chosen when the file is used; the scores are the same at any.
    config = SGRQConfig(
        target_modules=args.target_modules, group_size=args.group_size, criterion=args.criterion, ratio=0.4
    )
    model, tokenizer = inputs.load_model(args)
    data = inputs.load_data(args, tokenizer)
    saliency = calibrate(
        model,
        config,
        data,
        tokenizer,
        original=args.original,
        memory_limit=args.memory_limit,
        progress=not args.quiet,
        **inputs.data_options(args),
    )
    saliency.save(args.output)
    print(
        f"{args.output}: {saliency.criterion} of {len(saliency.layers)} layers on {saliency.tokens:,} tokens, "
        f"{saliency.seconds['total']:.1f} s",
        file=sys.stderr if is_standard_output(args.output) else None,
    )
    return 0
