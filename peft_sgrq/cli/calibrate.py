"""Score the columns of a model on some data and save them, to select from at any ratio.

The file is what `Saliency.load` reads: `Saliency.load(path).configure(config, ratio=...)` fills a config with a
selection, and `peft-sgrq inspect` shows what ratios would give.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from peft_sgrq.choices import DEFAULT_CRITERION
from peft_sgrq.cli.argument_types import CRITERION_NAMES, criterion

_FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("data", metavar="DATA", help="a .txt, .jsonl, .csv or .parquet file, or a dataset of the Hub")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the safetensors file to write")
    parser.add_argument(
        "--criterion",
        default=DEFAULT_CRITERION,
        type=criterion,
        help=f"how salience is measured: {CRITERION_NAMES} (default: diag)",
    )
    add_data_arguments(parser)
    parser.add_argument("--original", help="for the criterion error: the model before quantization")
    parser.add_argument("--memory-limit", metavar="SIZE", help='of Hessians in models that are no chain, e.g. "4GB"')


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that `load_model` and a config take."""
    parser.add_argument(
        "model", metavar="MODEL", help="a causal language model: a directory, a name on the Hub, or a .gguf file"
    )
    parser.add_argument("--target-modules", nargs="+", metavar="NAME", help="layers (default: all quantized ones)")
    parser.add_argument("--group-size", type=int, default=64, help="columns per scale where nothing is quantized")
    parser.add_argument("--quantize", choices=("nf4", "fp4", "int8"), help="quantize the model by bitsandbytes first")
    parser.add_argument("--double-quant", action="store_true", help="with nf4 and fp4: quantize the scales, too")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of what is not quantized (default: that of the checkpoint, or float32 on CPUs without bfloat16)",
    )


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that say which part of the data is used, and `--quiet`."""
    parser.add_argument("--column", help="of the dataset, with texts, chats or token ids (default: text)")
    parser.add_argument("--split", default="train", help="of a dataset of the Hub (default: train)")
    parser.add_argument("--samples", type=int, default=128, help="sequences at most (default: 128)")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a sequence at most (default: 512)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences in a batch (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of samples")
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def run(args: argparse.Namespace) -> int:
    from peft_sgrq.files.output import check_output, is_standard_output

    check_output(args.output)
    check_sources(args, model=args.model, original=args.original)
    from peft_sgrq.config import SGRQConfig
    from peft_sgrq.selection.calibrate import calibrate

    # A ratio is chosen when the file is used; the scores are the same at any.
    config = SGRQConfig(
        target_modules=args.target_modules, group_size=args.group_size, criterion=args.criterion, ratio=0.4
    )
    model, tokenizer = load_model(args)
    data = load_data(args, tokenizer)
    saliency = calibrate(
        model,
        config,
        data,
        tokenizer,
        column=args.column,
        samples=args.samples,
        max_length=args.max_length,
        batch_size=args.batch_size,
        original=args.original,
        memory_limit=args.memory_limit,
        seed=args.seed,
        progress=not args.quiet,
    )
    saliency.save(args.output)
    print(
        f"{args.output}: {saliency.criterion} of {len(saliency.layers)} layers on {saliency.tokens:,} tokens, "
        f"{saliency.seconds['total']:.1f} s",
        file=sys.stderr if is_standard_output(args.output) else None,
    )
    return 0


def check_sources(args: argparse.Namespace, **models: str | None) -> None:
    """Refuses names of models and of data that are neither here nor on the Hub, before anything is loaded."""
    from peft_sgrq.files.hub import check_source

    for what, name in models.items():
        if name is not None:
            check_source(name, what)
    if args.data is not None:
        check_source(args.data, "data", kind="dataset")


def load_data(args: argparse.Namespace, tokenizer: Any) -> Any:
    """A text file as pieces of `--max-length` tokens, any other file or name as a dataset."""
    from pathlib import Path

    from datasets import load_dataset  # type: ignore[import-untyped]

    path = Path(args.data)
    if not path.is_file():
        return load_dataset(args.data, split=args.split)
    if path.suffix in _FORMATS:
        return load_dataset(_FORMATS[path.suffix], data_files=str(path), split="train")
    if path.suffix not in (".txt", ".md", ""):
        raise ValueError(
            f"{path} ends in {path.suffix!r}, expected a text file (.txt, .md) or one of {', '.join(_FORMATS)}; "
            "convert it, or give the name of a dataset."
        )
    ids = tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    return [{"input_ids": ids[start : start + args.max_length]} for start in range(0, len(ids), args.max_length)]


def load_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model, quantized if asked for, on the GPU if there is one, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    from peft_sgrq.base.loading_arguments import loading_arguments
    from peft_sgrq.base.precision import compute_in, describe_dtype, fast_dtype

    if args.model.endswith(".gguf"):
        from peft_sgrq.formats.gguf.loading import load_gguf

        if args.quantize:
            raise ValueError(
                f"--quantize is {args.quantize} and {args.model} a GGUF file, quantized already; leave --quantize out."
            )
        place = "auto" if torch.cuda.is_available() else None
        return load_gguf(args.model, dtype=None if args.dtype == "auto" else args.dtype, device_map=place)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    kwargs: dict[str, Any] = loading_arguments(args.model)
    kwargs["device_map"] = "auto" if torch.cuda.is_available() else None
    if args.dtype != "auto":
        kwargs["dtype"] = getattr(torch, args.dtype)
    dtype = kwargs["dtype"]
    if args.quantize == "int8":
        kwargs["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif args.quantize:
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=args.quantize,
            bnb_4bit_use_double_quant=args.double_quant,
            bnb_4bit_compute_dtype=fast_dtype() if dtype == "auto" else dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(args.model, **kwargs)
    if dtype != "auto":
        compute_in(model, dtype)
        if args.dtype == "auto" and not args.quiet:
            print(f"computing in {describe_dtype(dtype)}", file=sys.stderr)
    return model, tokenizer
