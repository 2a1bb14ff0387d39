"""Rotate a dense model so that quantization costs it less, and save it; what it computes stays.

With the default rotations the result is an ordinary dense checkpoint that any quantizer takes. `--quantize` rounds it
to nearest at the bits of `--scheme` and saves that.
"""

from __future__ import annotations

import argparse

from peft_sgrq.cli import inputs
from peft_sgrq.files.output import check_output
from peft_sgrq.files.output_folder import check_output_folder, written_folder
from peft_sgrq.files.paths_apart import check_apart, check_not_read
from peft_sgrq.rotation.scheme import ROTATIONS, parse_scheme


def add_arguments(parser: argparse.ArgumentParser) -> None:
    inputs.add_dense_model_arguments(parser)
    parser.add_argument("--data", help="to choose by error: a .txt, .jsonl, .csv or .parquet file, or a dataset")
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="the folder to write")
    parser.add_argument("--scheme", default="W4A4KV4", help="the bits to come (default: W4A4KV4)")
    parser.add_argument("--group-size", type=int, default=64, help="columns that will share a scale (default: 64)")
    parser.add_argument(
        "--rotations", nargs="+", choices=ROTATIONS, default=["R1", "R2"], metavar="NAME", help="of R1 R2 R3 R4"
    )
    parser.add_argument("--select", choices=("measured", "all"), help="default: measured if there is data")
    parser.add_argument("--quantize", action="store_true", help="round to nearest, and save that")
    parser.add_argument("--report", metavar="FILE", help="write what was chosen and the errors as JSON")
    inputs.add_data_arguments(parser)
    parser.set_defaults(samples=16)


def check(args: argparse.Namespace) -> None:
    parse_scheme(args.scheme, args.group_size)
    if args.select == "measured" and not args.data:
        raise ValueError("--select measured needs data, found none; give --data.")
    check_output_folder(args.output)
    if args.report:
        check_output(args.report, "The report")
        check_not_read(args.report, args.model, args.data)
        check_apart(args.report, args.output, "The report")
    inputs.check_sources(args, model=args.model)


def run(args: argparse.Namespace) -> int:
    from peft_sgrq.rotation.quantize import quantize
    from peft_sgrq.rotation.rotate import rotate

    model, tokenizer = inputs.load_dense(args)
    found = rotate(
        model,
        inputs.load_data(args, tokenizer) if args.data else None,
        tokenizer=tokenizer,
        scheme=args.scheme,
        rotations=args.rotations,
        select=args.select,
        group_size=args.group_size,
        **inputs.data_options(args),
    )
    if args.quantize:
        quantize(model, args.scheme, group_size=args.group_size)
    with written_folder(args.output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    if args.report:
        found.save(args.report)
    print(found)
    print(f"{args.output}: {'quantized to ' + args.scheme if args.quantize else 'a dense checkpoint'}")
    return 0
