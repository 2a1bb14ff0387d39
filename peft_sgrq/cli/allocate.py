"""Find how many bits each layer of a dense model is to get under one budget, and write the plan.

The plan is JSON with the same for compressed-tensors, AutoRound (`layer_config`) and GPTQModel (`dynamic`);
`--checkpoint` rounds the model to nearest by it and saves that.
"""

from __future__ import annotations

import argparse

from peft_sgrq.cli import inputs
from peft_sgrq.cli.argument_types import bits
from peft_sgrq.files.output import check_output
from peft_sgrq.files.output_folder import check_output_folder, written_folder
from peft_sgrq.files.paths_apart import check_apart, check_not_read
from peft_sgrq.rotation.scheme import BIT_CRITERIA, WIDTHS, parse_scheme


def add_arguments(parser: argparse.ArgumentParser) -> None:
    inputs.add_dense_model_arguments(parser)
    parser.add_argument("data", metavar="DATA", help="a .txt, .jsonl, .csv or .parquet file, or a dataset of the Hub")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the JSON file to write")
    parser.add_argument("--bits", type=bits, default=2.5, help='a weight with scales, or a size such as "3GB"')
    parser.add_argument(
        "--widths",
        type=int,
        nargs="+",
        choices=WIDTHS,
        default=[2, 3, 4],
        metavar="BITS",
        help="of 2 to 8 (default: 2 3 4)",
    )
    parser.add_argument("--group-size", type=int, default=64, help="columns that share a scale (default: 64)")
    parser.add_argument("--criterion", choices=BIT_CRITERIA, default="fisher", help="default: fisher")
    parser.add_argument("--pairs", action="store_true", help="with measured: pairs of layers, too")
    parser.add_argument("--no-fuse", action="store_true", help="let query, key and value, gate and up differ")
    parser.add_argument("--checkpoint", metavar="FOLDER", help="quantize by the plan, and save that here")
    inputs.add_data_arguments(parser)
    parser.set_defaults(samples=64)


def check(args: argparse.Namespace) -> None:
    parse_scheme("W4A16", args.group_size)
    if args.pairs and args.criterion != "measured":
        raise ValueError(f"--pairs needs --criterion measured, found {args.criterion}; leave it out.")
    check_output(args.output)
    check_not_read(args.output, args.model, args.data)
    if args.checkpoint:
        check_output_folder(args.checkpoint)
        check_apart(args.output, args.checkpoint)
    inputs.check_sources(args, model=args.model)


def run(args: argparse.Namespace) -> int:
    from peft_sgrq.rotation.allocate_bits import allocate_bits
    from peft_sgrq.rotation.quantize import quantize

    model, tokenizer = inputs.load_dense(args)
    plan = allocate_bits(
        model,
        inputs.load_data(args, tokenizer),
        tokenizer=tokenizer,
        bits=args.bits,
        widths=args.widths,
        group_size=args.group_size,
        criterion=args.criterion,
        pairs=args.pairs,
        fuse=not args.no_fuse,
        progress=not args.quiet,
        **inputs.data_options(args),
    )
    if args.checkpoint:
        quantize(model, plan)
        with written_folder(args.checkpoint) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    plan.save(args.output)
    print(plan.table())
    return 0
