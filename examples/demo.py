"""Tunes a 4-bit model with SGRQ and with LoRA, merges both, and compares what is left of the tuning.

    python examples/demo.py                                   # the small model and the text of this repository
    python examples/demo.py --model MODEL --dataset DATASET   # any causal language model and text dataset of the Hub

The base is quantized to NF4 and saved. Each method tunes it with TRL's SFTTrainer on the same data for the same number
of steps, saves its adapter, merges it, and saves the merged model, which a second process then loads with plain
transformers. One table shows perplexity on held-out text at each of these stations, sizes and times.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    if not {"-h", "--help"} & set(sys.argv):
        print("Loading torch, transformers and TRL ...", file=sys.stderr, flush=True)
    for library in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # what they have not found is not needed here
        logging.getLogger(library).setLevel(logging.ERROR)

import torch
from datasets import Dataset, load_dataset
from demo_text import task_documents
from peft import LoraConfig, PeftConfig, PeftModel
from perplexity import keep_stored_layout, load, logits_of, perplexity, tokenize
from progress_lines import ProgressLines
from transformers import AutoTokenizer, BitsAndBytesConfig, PrinterCallback, set_seed
from transformers.utils import logging as transformers_logging
from trl import SFTConfig, SFTTrainer

from peft_sgrq import SGRQConfig, fast_dtype
from peft_sgrq.base.precision import describe_dtype

HERE = Path(__file__).resolve().parent


@dataclass
class Method:
    name: str
    config: PeftConfig
    learning_rate: float


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HERE / "demo_model"), help="a causal language model, not yet quantized")
    parser.add_argument(
        "--dataset", help="a dataset of the Hub with the splits train and test (default: Python's docs)"
    )
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--ratio", type=float, default=1.0, help="share of the scales that SGRQ trains")
    parser.add_argument("--rank", type=int, default=16, help="rank of LoRA")
    parser.add_argument("--learning-rate", type=float, default=4e-2, help="of SGRQ")
    parser.add_argument("--lora-learning-rate", type=float, default=8e-3)
    parser.add_argument("--adam-beta1", type=float, default=0.9)
    parser.add_argument("--eval-windows", type=int, default=80, help="windows of held-out text at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("sgrq", "lora"), help="run one method alone")
    return parser.parse_args()


def load_texts(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    if arguments.dataset is None:
        return task_documents()
    splits = load_dataset(arguments.dataset)
    return list(splits["train"][arguments.text_column]), list(splits["test"][arguments.text_column])


def quantize(arguments: argparse.Namespace, directory: Path) -> None:
    """Saves the model in NF4, so that both methods start from the same codes and scales."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=arguments.dtype
    )
    model = load(arguments.model, dtype=arguments.dtype, quantization_config=quantization)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(arguments.model).save_pretrained(directory)


def tune(
    method: Method, base: Path, train: Dataset, arguments: argparse.Namespace, directory: Path
) -> tuple[Any, float]:
    set_seed(arguments.seed)
    model = load(str(base))
    keep_stored_layout(model)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(directory / "trainer"),
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch_size,
            learning_rate=method.learning_rate,
            adam_beta1=arguments.adam_beta1,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, arguments.steps // 20),
            max_length=arguments.length,
            packing=True,
            packing_strategy="wrapped",
            activation_checkpointing=False,
            use_cpu=not torch.cuda.is_available(),
            bf16=arguments.dtype == torch.bfloat16,
            fp16=arguments.dtype == torch.float16,
            logging_steps=1,
            disable_tqdm=not sys.stderr.isatty(),
            save_strategy="no",
            report_to="none",
            seed=arguments.seed,
        ),
        train_dataset=train,
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=method.config,
    )
    if not sys.stderr.isatty():
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(ProgressLines(method.name))
    start = time.perf_counter()
    trainer.train()
    return trainer.model, time.perf_counter() - start


def run(method: Method, base: Path, train: Dataset, held_out: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One column of the table."""
    directory = arguments.output / method.name.split()[0].lower()
    windows = tokenize(
        AutoTokenizer.from_pretrained(base),
        held_out.read_text(encoding="utf-8"),
        arguments.length,
        arguments.eval_windows,
    )
    say(f"{method.name}: {arguments.steps} steps.")
    model, seconds = tune(method, base, train, arguments, directory)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    model.save_pretrained(directory / "adapter")

    say(f"{method.name}: trained in {seconds:.0f} s; merging, saving and loading it again.")
    # What a user would serve: the saved adapter on the base as it is stored.
    fresh = load(str(base))
    keep_stored_layout(fresh)
    base_logits = logits_of(fresh, windows)
    model = PeftModel.from_pretrained(fresh, directory / "adapter")
    tuned, tuned_logits = perplexity(model, windows), logits_of(model, windows)

    start = time.perf_counter()
    merged_model = model.merge_and_unload()
    merge_seconds = time.perf_counter() - start
    keep_stored_layout(merged_model)
    merged, merged_logits = perplexity(merged_model, windows), logits_of(merged_model, windows)
    # Without the argument transformers 5.23 cannot save a model it loaded quantized; SGRQ's merge mends that itself.
    merged_model.save_pretrained(directory / "merged", save_original_format=False)
    AutoTokenizer.from_pretrained(base).save_pretrained(directory / "merged")

    reloaded, reloaded_logits = evaluate_in_second_process(directory / "merged", held_out, arguments)
    effect = (tuned_logits - base_logits).norm().item()
    return {
        "trained parameters": trained,
        "perplexity tuned": tuned,
        "perplexity merged": merged,
        "perplexity merged, saved, reloaded": reloaded,
        "logits merged = tuned": torch.equal(merged_logits, tuned_logits),
        "logits reloaded = tuned": torch.equal(reloaded_logits, tuned_logits),
        "merge error / effect of the adapter": (merged_logits - tuned_logits).norm().item() / effect,
        "adapter MB": file_size(directory / "adapter"),
        "merged MB": file_size(directory / "merged"),
        "seconds to train": seconds,
        "seconds to merge": merge_seconds,
    }


def evaluate_in_second_process(
    directory: Path, held_out: Path, arguments: argparse.Namespace
) -> tuple[float, torch.Tensor]:
    """Perplexity and logits of a saved model in a process that knows nothing of peft_sgrq."""
    logits = directory / "logits.pt"
    command = [sys.executable, HERE / "perplexity.py", directory, held_out, "--logits", logits]
    command += ["--length", str(arguments.length), "--limit", str(arguments.eval_windows)]
    environment = {**os.environ, "PEFT_SGRQ_AUTOLOAD": "0"}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    result = torch.load(logits)
    logits.unlink()
    return json.loads(output.splitlines()[-1])["perplexity"], result


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def file_size(directory: Path) -> float:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors")) / 1e6


def print_table(columns: dict[str, dict[str, Any]]) -> None:
    rows = list(dict.fromkeys(row for column in columns.values() for row in column))
    header = ["", *columns]
    table = [[row, *(spell(column.get(row)) for column in columns.values())] for row in rows]
    widths = [max(len(line[index]) for line in [header, *table]) for index in range(len(header))]
    for number, line in enumerate([header, ["-" * width for width in widths], *table]):
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        print("| " + " | ".join(cells) + " |" if number != 1 else "|-" + "-|-".join(cells) + "-|")


def spell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return "0" if value == 0 else f"{value:.3f}" if value < 10 else f"{value:.1f}"
    return "" if value is None else str(value)


def main() -> None:
    arguments = parse_arguments()
    arguments.dtype = fast_dtype()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    arguments.output.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()

    say(f"Computing in {describe_dtype(arguments.dtype)}; quantizing {arguments.model} to NF4.")
    train_texts, held_out_texts = load_texts(arguments)
    train = Dataset.from_dict({"text": train_texts})
    held_out = arguments.output / "held_out.txt"
    held_out.write_text("\n\n".join(held_out_texts), encoding="utf-8")
    base = arguments.output / "base-nf4"
    quantize(arguments, base)

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    windows = tokenize(tokenizer, held_out.read_text(encoding="utf-8"), arguments.length, arguments.eval_windows)
    say(f"Perplexity of the model and of its NF4 version, on {windows.numel():,} held-out tokens.")
    full = load(arguments.model, dtype=arguments.dtype)
    quantized = load(str(base))
    keep_stored_layout(quantized)
    shared = {
        "perplexity full precision": perplexity(full, windows),
        "perplexity NF4": perplexity(quantized, windows),
        "NF4 base MB": file_size(base),
    }
    del full, quantized

    methods = {
        "sgrq": Method("SGRQ", SGRQConfig(ratio=arguments.ratio, task_type="CAUSAL_LM"), arguments.learning_rate),
        "lora": Method(
            f"LoRA r={arguments.rank}",
            LoraConfig(
                r=arguments.rank, lora_alpha=arguments.rank, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
            arguments.lora_learning_rate,
        ),
    }
    chosen = [methods[arguments.only]] if arguments.only else list(methods.values())
    columns = {method.name: shared | run(method, base, train, held_out, arguments) for method in chosen}

    print()
    print_table(columns)
    packages = ("peft", "torch", "transformers", "trl", "bitsandbytes")
    dtype = describe_dtype(arguments.dtype)
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    print(f"\n{arguments.steps} steps of {arguments.batch_size} x {arguments.length} tokens, {dtype}; {versions};")
    print(f"{platform.machine()}, {os.cpu_count()} CPUs; {time.perf_counter() - start:.0f} seconds in all.")
    (arguments.output / "results.json").write_text(json.dumps(columns, indent=2))


if __name__ == "__main__":
    main()
