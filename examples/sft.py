"""Fine-tunes a quantized model with SGRQ and TRL, merges it, and pushes the adapter to the Hub if asked.

    python examples/sft.py \\
        --model_name_or_path unsloth/Llama-3.2-1B-Instruct-bnb-4bit \\
        --dataset_name trl-lib/Capybara \\
        --output_dir llama-sgrq --max_steps 500 --push_to_hub

    python examples/sft.py --config examples/sft.yaml

A base that is quantized already loads the same everywhere, so the adapter fits everywhere. A model that is not is
quantized while loading with `--load_in_4bit` or `--load_in_8bit`. The data is a dataset of the Hub, a folder, or a
.jsonl, .json, .csv or .parquet file, with a column of texts, or of chats (`messages`). All arguments of TRL's
SFTConfig work; some have other defaults here, those for scales, and the dtype is the one this machine computes fast
in. With `--group_size 32` the base's groups are split first, and each half has a scale of its own; the split base is
saved in OUTPUT_DIR/base, because the adapter belongs to it.

On several devices: `accelerate launch --config_file examples/accelerate/ddp.yaml examples/sft.py ...`;
docs/distributed.md says which configuration is for what.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    for library in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # what they have not found is not needed here
        logging.getLogger(library).setLevel(logging.ERROR)

import torch
from datasets import Dataset, IterableDataset, load_dataset
from huggingface_hub import create_repo, upload_folder
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_quantization_config

from peft_sgrq import SGRQConfig, compute_in, fast_dtype, merge_checkpoint, split_groups
from peft_sgrq.base.loading_arguments import loading_arguments
from peft_sgrq.base.precision import describe_dtype
from peft_sgrq.choices import NAMED_RATIOS, RECOMMENDED_LEARNING_RATE
from peft_sgrq.files.hub import check_source

FILES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
COLUMNS = ("messages", "prompt", "conversations", "input_ids")  # besides that of texts; TRL knows what to do with them


@dataclass
class TrainingArguments(SFTConfig):
    """TRL's settings, with the defaults of scales: their relative changes want larger steps than LoRA's matrices."""

    learning_rate: float = field(
        default=RECOMMENDED_LEARNING_RATE,
        metadata={"help": "Peak of the schedule; that of LoRA moves scales nowhere."},
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Of the schedule; below 1 a share of all steps."})
    use_cpu: bool = field(
        default=not (torch.cuda.is_available() or torch.backends.mps.is_available()),
        metadata={"help": "Train on the CPU (default: where there is no GPU)."},
    )

    def __post_init__(self) -> None:
        if self.bf16 is None and not self.fp16:
            fast = fast_dtype("cpu" if self.use_cpu else None)
            self.bf16, self.fp16 = fast == torch.bfloat16, fast == torch.float16
        super().__post_init__()


@dataclass
class ModelArguments(ModelConfig):
    """TRL's arguments of the model; those of LoRA are refused."""

    dtype: str | None = field(
        default="auto",
        metadata={
            "help": "Of what is not quantized (default: that of the checkpoint, or what this machine is fast in).",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )


@dataclass
class SGRQArguments:
    ratio: str = field(
        default="1.0",
        metadata={
            "help": "Share of the scales to train, in (0, 1], knee or global for the largest; 0 for zero points alone."
        },
    )
    zero_points: bool = field(
        default=False,
        metadata={"help": "Also train zero points, where the format has them as floats; with --learning_rate 2e-3."},
    )
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers to tune, by name or end of name (default: all quantized ones)."}
    )
    adapter_dtype: str = field(
        default="float32", metadata={"help": "float32, or bfloat16 for a file of half the size."}
    )
    group_size: int | None = field(
        default=None, metadata={"help": "Split the base's groups into such of this many columns, 32 for example."}
    )
    merge: bool = field(default=True, metadata={"help": "Also save the merged model, in OUTPUT_DIR/merged."})


def fail(text: str) -> None:
    """Ends the script with a sentence about an argument."""
    raise SystemExit(f"sft.py: error: {text}")


def check_arguments(script: ScriptArguments, base: ModelConfig) -> None:
    """Refuses what would be passed over, and what is missing, before anything is loaded."""
    for option in fields(ModelConfig):
        if option.name.startswith(("lora_", "use_peft", "use_rslora", "use_dora")):
            value = getattr(base, option.name)
            if value != option.default:
                fail(
                    f"--{option.name} is {value!r}, an argument of other adapters, expected those of scales; use "
                    "--target_modules and --ratio, or leave it out."
                )
    if base.model_name_or_path is None:
        fail("--model_name_or_path is missing, expected the folder of a model or its name on the Hub.")
    if script.dataset_name is None:
        fail("--dataset_name is missing, expected a dataset of the Hub, a folder, or a .jsonl, .csv or .parquet file.")
    try:
        check_source(base.model_name_or_path, "model", base.model_revision)
        check_source(script.dataset_name, "data", kind="dataset")
    except ValueError as error:
        fail(str(error))


def make_config(sgrq: SGRQArguments) -> SGRQConfig:
    """The adapter's config; a mistake in it ends the script."""
    ratio: Any = sgrq.ratio
    try:
        ratio = ratio if ratio in NAMED_RATIOS else float(ratio)
    except ValueError:
        fail(f"--ratio is {ratio!r}, expected a number in (0, 1] or one of {', '.join(NAMED_RATIOS)}.")
    try:
        return SGRQConfig(
            task_type="CAUSAL_LM",
            ratio=ratio,
            zero_points=sgrq.zero_points,
            target_modules=sgrq.target_modules,
            adapter_dtype=sgrq.adapter_dtype,
        )
    except (ValueError, TypeError) as error:
        raise SystemExit(f"sft.py: error: {error}") from None


def load_split(
    script: ScriptArguments, training: SFTConfig, split: str, argument: str
) -> Dataset | IterableDataset | None:
    """One split of the data; a split or a column that is not there ends the script."""
    path = Path(script.dataset_name)
    options: dict[str, Any] = {"streaming": script.dataset_streaming}
    if path.is_file():
        if path.suffix not in FILES:
            fail(f"--dataset_name is {str(path)!r}, expected a file that ends in {', '.join(FILES)}; convert it.")
        splits = load_dataset(FILES[path.suffix], data_files=str(path), **options)
    else:
        splits = load_dataset(script.dataset_name, name=script.dataset_config, **options)
    if split not in splits:
        fail(f"{path} has the splits {', '.join(splits)}, expected {split!r}; name another by --{argument}.")
    found = splits[split]
    columns, text = list(found.column_names or ()), training.dataset_text_field
    if columns and text not in columns and not set(COLUMNS) & set(columns):
        fail(
            f"{path} has the columns {', '.join(columns)}, expected {text!r} with texts or 'messages' with chats; "
            "name the column of texts by --dataset_text_field."
        )
    return found


def main() -> None:
    parser = TrlParser((ScriptArguments, TrainingArguments, ModelArguments, SGRQArguments))
    script, training, base, sgrq = parser.parse_args_and_config()
    check_arguments(script, base)
    config = make_config(sgrq)
    train = load_split(script, training, script.dataset_train_split, "dataset_train_split")
    held_out = None
    if training.eval_strategy != "no":
        held_out = load_split(script, training, script.dataset_test_split, "dataset_test_split")

    code = {"revision": base.model_revision, "trust_remote_code": getattr(training, "trust_remote_code", False)}
    loading: dict[str, Any] = {**loading_arguments(base.model_name_or_path, **code), **code}
    if base.dtype != "auto":
        loading["dtype"] = getattr(torch, base.dtype)
    if base.attn_implementation is not None:
        loading["attn_implementation"] = base.attn_implementation
    if base.dtype == "auto":
        base.dtype = str(fast_dtype("cpu" if training.use_cpu else None)).removeprefix("torch.")
    quantization = get_quantization_config(base)
    if quantization is not None:  # a model that is quantized already brings its own
        loading["quantization_config"] = quantization
    model = AutoModelForCausalLM.from_pretrained(base.model_name_or_path, **loading)
    if loading["dtype"] != "auto":
        compute_in(model, loading["dtype"])
    if training.process_index == 0:
        print(f"sft.py: the model is in {describe_dtype(model.dtype)}", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(base.model_name_or_path, **code)
    files = base.model_name_or_path if quantization is None else None  # of the base, to merge into
    if sgrq.group_size is not None:
        folder = Path(training.output_dir, "base")
        model = split_groups(model, sgrq.group_size)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model.name_or_path = files = str(folder)  # what the adapter says it belongs to
    if script.ignore_bias_buffers:
        model._ddp_params_and_buffers_to_ignore = [
            name for name, buffer in model.named_buffers() if buffer.dtype == torch.bool
        ]

    trainer = SFTTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=config,
    )
    trainer.train()
    trainer.save_model(training.output_dir)
    trainer.accelerator.wait_for_everyone()  # until the adapter is written
    alone = trainer.accelerator.num_processes == 1
    if training.push_to_hub and trainer.accelerator.is_main_process:
        push(training)
        if sgrq.group_size is not None:
            print(f"sft.py: the adapter belongs to the split base in {files}; upload that, too", flush=True)

    if sgrq.merge and trainer.accelerator.is_main_process:
        out = Path(training.output_dir, "merged")
        revision = base.model_revision if files == base.model_name_or_path else None
        try:
            merge(trainer, files, out, revision, base.model_name_or_path, loading)
        except ValueError as error:  # of a format that is merged in memory alone
            if not alone:
                raise
            print(f"sft.py: merging in memory: {error}", flush=True)
            merge(trainer, None, out, None, base.model_name_or_path, loading)
        print(f"sft.py: the merged model is in {out}", flush=True)


def push(training: SFTConfig) -> None:
    """Uploads the adapter, its card and the tokenizer: not by the trainer, whose card would take the place of ours."""
    name, token = training.hub_model_id or Path(training.output_dir).name, training.hub_token
    repository = create_repo(name, token=token, private=training.hub_private_repo, exist_ok=True)
    folders_and_pickles = ["*/*", "*.bin"]
    upload_folder(
        repo_id=repository.repo_id, folder_path=training.output_dir, ignore_patterns=folders_and_pickles, token=token
    )


def merge(
    trainer: SFTTrainer, files: str | None, out: Path, revision: str | None, base: str, loading: dict[str, Any]
) -> None:
    """Saves the merged model and its tokenizer: on the files of the base, or in memory where it has none."""
    adapter = trainer.args.output_dir
    if files is not None:
        merge_checkpoint(files, adapter, out, revision=revision, overwrite=True)
        return
    model = trainer.model
    if trainer.accelerator.num_processes > 1:  # the engine may have this model in shards; what it has saved is whole
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, **loading), adapter)
    merged = model.merge_and_unload()
    merged.config.use_cache = True  # which TRL switches off to train
    merged.save_pretrained(out)
    trainer.processing_class.save_pretrained(out)


if __name__ == "__main__":
    main()
