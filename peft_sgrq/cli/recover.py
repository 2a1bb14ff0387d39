"""Train the scales of a quantized model to give back what quantization took, and save them as an adapter.

The adapter is an ordinary one: `peft-sgrq merge` writes a better checkpoint of the same size, and
`SGRQConfig(init_weights=ADAPTER)` starts the training of a task from it.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from peft_sgrq.cli import inputs
from peft_sgrq.cli.argument_types import ratio
from peft_sgrq.files.output_folder import check_output_folder, written_folder
from peft_sgrq.files.paths_apart import check_apart, check_not_read

if TYPE_CHECKING:
    from peft_sgrq.recovery.recover import Recovery

_OPTIONS = (
    "epochs",
    "learning_rate",
    "augmented",
    "preservation",
    "importance",
    "distill_steps",
    "distill_learning_rate",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    inputs.add_model_arguments(parser)
    parser.add_argument("--reference", required=True, help="the model before quantization: a directory or a name")
    parser.add_argument("--data", required=True, help="a .txt, .jsonl, .csv or .parquet file, or a dataset of the Hub")
    parser.add_argument("-o", "--output", required=True, metavar="ADAPTER", help="the folder to write")
    inputs.add_data_arguments(parser)
    parser.add_argument(
        "--ratio", type=ratio, default=1.0, help="share of the scales trained, or knee or global (default: 1.0)"
    )
    parser.add_argument("--epochs", type=int, help="of each block; 0 leaves the first stage out")
    parser.add_argument("--learning-rate", type=float, help="of the first stage, of relative changes")
    parser.add_argument("--augmented", action=argparse.BooleanOptionalAction, help="match f(X_q) as well as f(X)")
    parser.add_argument("--preservation", type=float, metavar="WEIGHT", help="how much salient weights are held")
    parser.add_argument("--importance", choices=("fisher", "magnitude"), help="which are; magnitude: all alike")
    parser.add_argument("--distill-steps", type=int, help="steps of the second stage")
    parser.add_argument("--distill-learning-rate", type=float, help="of the second stage")
    parser.add_argument("--progress-file", metavar="FILE", help="to go on from when interrupted (default: beside -o)")


def check(args: argparse.Namespace) -> None:
    output = check_output_folder(args.output)
    if args.progress_file:
        check_apart(args.progress_file, output, "The progress file")
        check_not_read(args.progress_file, args.model, args.data, args.reference)
        if Path(os.path.realpath(args.progress_file)).is_relative_to(output):
            raise ValueError(
                f"The progress file {args.progress_file!r} is in the output {args.output!r}, which has to be new when "
                "the same command goes on, expected it elsewhere; name another, or leave it out."
            )
    inputs.check_model(args)
    inputs.check_sources(args, model=args.model, reference=args.reference)


def run(args: argparse.Namespace) -> int:
    from peft_sgrq.recovery.progress import check_progress_file

    progress_file = args.progress_file or f"{os.path.normpath(args.output)}.progress"
    check_progress_file(progress_file)
    if os.path.exists(progress_file):
        print(f"{progress_file} is there: going on from the blocks in it", file=sys.stderr)
    try:
        found = _recover(args, progress_file)
    except KeyboardInterrupt:
        if os.path.exists(progress_file):
            print(f"The finished blocks are in {progress_file}: the same command goes on from it.", file=sys.stderr)
        raise
    with written_folder(args.output) as folder:
        found.model.save_pretrained(folder)
    if os.path.exists(progress_file):
        os.remove(os.path.realpath(progress_file))
    for block in found.blocks:
        print(f"{block.name}: error {block.before:.4g} -> {block.after:.4g}, {block.seconds:.1f} s")
    if found.distillation:
        print(f"divergence {found.distillation.before:.4g} -> {found.distillation.after:.4g} nats a token")
    print(f"{args.output}: recovered in {found.seconds:.1f} s")
    return 0


def _recover(args: argparse.Namespace, progress_file: str) -> Recovery:
    from peft_sgrq.config import SGRQConfig
    from peft_sgrq.recovery.recover import recover

    model, tokenizer = inputs.load_model(args)
    config = SGRQConfig(
        ratio=args.ratio, target_modules=args.target_modules, group_size=args.group_size, task_type="CAUSAL_LM"
    )
    return recover(
        model,
        inputs.load_reference(args),
        inputs.load_data(args, tokenizer),
        config,
        tokenizer,
        progress_file=progress_file,
        progress=not args.quiet,
        **inputs.data_options(args),
        **{name: getattr(args, name) for name in _OPTIONS if getattr(args, name) is not None},
    )
