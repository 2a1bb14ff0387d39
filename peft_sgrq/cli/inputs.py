"""What commands run on: the arguments that name a model and data, and how both are loaded."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from peft_sgrq.files.gguf_names import is_gguf
from peft_sgrq.files.hub import check_source
from peft_sgrq.files.sources import check_adapter_folder

_FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_TEXTS = (".txt", ".md", "")
_DTYPES = ("auto", "float32", "bfloat16", "float16")


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
        choices=_DTYPES,
        help="of what is not quantized (default: that of the checkpoint, or float32 on CPUs without bfloat16)",
    )


def check_model(args: argparse.Namespace) -> None:
    """Refuses arguments of `add_model_arguments` that would be passed over."""
    if args.double_quant and args.quantize not in ("nf4", "fp4"):
        raise ValueError(
            f"--double-quant is given and --quantize is {args.quantize}, expected nf4 or fp4, whose scales can be "
            "quantized, too; give one, or leave --double-quant out."
        )


def add_dense_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that `load_dense` takes."""
    parser.add_argument(
        "model", metavar="MODEL", help="a dense causal language model: a directory or a name on the Hub"
    )
    parser.add_argument("--dtype", default="auto", choices=_DTYPES, help="default: that of the checkpoint")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that say which part of the data is used, and `--quiet`."""
    parser.add_argument("--column", help="of the dataset, with texts, chats or token ids (default: text)")
    parser.add_argument("--split", default="train", help="of a dataset of the Hub (default: train)")
    parser.add_argument("--samples", type=int, default=128, help="sequences at most (default: %(default)s)")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a sequence at most (default: 512)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences in a batch (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of samples")
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def data_options(args: argparse.Namespace) -> dict[str, Any]:
    """The part of the data that `add_data_arguments` asks for, as arguments of the functions that take data."""
    return {name: getattr(args, name) for name in ("column", "samples", "max_length", "batch_size", "seed")}


def add_adapter_arguments(parser: argparse.ArgumentParser, merged: str) -> None:
    """Those that name an adapter, what it is merged into, and the result, whose help is `merged`."""
    parser.add_argument("adapter", metavar="ADAPTER", help="folder or Hub id of the adapter")
    parser.add_argument("merged", metavar="MERGED", help=merged)
    parser.add_argument("--base", help="folder, Hub id or .gguf file of the base; the adapter names it, too")
    parser.add_argument("--revision", help="revision of the base on the Hub")


def check_adapter(args: argparse.Namespace) -> None:
    """Refuses an adapter and a base that are neither here nor on the Hub."""
    check_source(args.adapter, "adapter")
    if os.path.isdir(args.adapter):
        check_adapter_folder(args.adapter)
    if args.base is not None:
        check_source(args.base, "base model", args.revision)


def check_sources(args: argparse.Namespace, **models: str | None) -> None:
    """Refuses names of models and of data that are neither here nor on the Hub, before anything is loaded."""
    for what, name in models.items():
        if name is not None:
            check_source(name, what)
    if args.data is not None:
        check_source(args.data, "data", kind="dataset")
        ending = os.path.splitext(args.data)[1]
        if os.path.isfile(args.data) and ending not in (*_FORMATS, *_TEXTS):
            raise ValueError(
                f"{args.data} ends in {ending!r}, expected a text file (.txt, .md) or one of {', '.join(_FORMATS)}; "
                "convert it, or give the name of a dataset."
            )


def load_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model, quantized if asked for, on the GPU if there is one, and its tokenizer."""
    import torch
    from transformers import AutoTokenizer, BitsAndBytesConfig

    from peft_sgrq.base.loading_arguments import loading_arguments
    from peft_sgrq.base.precision import compute_in, describe_dtype, fast_dtype
    from peft_sgrq.rotation.online import load_rotated

    if is_gguf(args.model):
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
    model = load_rotated(args.model, **kwargs)
    if dtype != "auto":
        compute_in(model, dtype)
        if args.dtype == "auto" and not args.quiet:
            print(f"computing in {describe_dtype(dtype)}", file=sys.stderr)
    return model, tokenizer


def load_dense(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model in eval mode, on the GPU if there is one, and its tokenizer."""
    import torch
    from transformers import AutoTokenizer

    from peft_sgrq.rotation.online import load_rotated

    model = load_rotated(args.model, dtype=args.dtype).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), AutoTokenizer.from_pretrained(args.model)


def load_reference(args: argparse.Namespace) -> Any:
    """The model before quantization: its name, or itself if it has online rotations, which are not streamed."""
    from transformers import AutoConfig

    from peft_sgrq.base.workarounds.dropped_rotations import FIELD
    from peft_sgrq.rotation.online import load_rotated

    rotated = getattr(AutoConfig.from_pretrained(args.reference), FIELD, None)
    return load_rotated(args.reference, dtype="auto").eval() if rotated else args.reference


def load_data(args: argparse.Namespace, tokenizer: Any) -> Any:
    """A text file as pieces of `--max-length` tokens, any other file or name as a dataset."""
    from datasets import load_dataset  # type: ignore[import-untyped]

    path = Path(args.data)
    if not path.is_file():
        return load_dataset(args.data, split=args.split)
    if path.suffix in _FORMATS:
        return load_dataset(_FORMATS[path.suffix], data_files=str(path), split="train")
    ids = tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    return [{"input_ids": ids[start : start + args.max_length]} for start in range(0, len(ids), args.max_length)]
