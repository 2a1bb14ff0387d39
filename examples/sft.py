"""Fine-tunes a quantized model with SGRQ and TRL, merges it, and pushes both to the Hub if asked.

    python examples/sft.py \\
        --model_name_or_path unsloth/Llama-3.2-1B-Instruct-bnb-4bit \\
        --dataset_name trl-lib/Capybara \\
        --output_dir llama-sgrq --max_steps 500 --push_to_hub

A base that is quantized already loads the same everywhere, so the adapter fits everywhere. A model that is not is
quantized while loading with `--load_in_4bit` or `--load_in_8bit`. All arguments of TRL's SFTConfig work; some have
other defaults here, those for scales. With `--group_size 32` the base's groups are split first, and each half has a
scale of its own; the split base is saved in OUTPUT_DIR/base, because the adapter belongs to it.

On several devices: `accelerate launch --config_file examples/accelerate/ddp.yaml examples/sft.py ...`;
docs/distributed.md says which configuration is for what.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from datasets import load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_quantization_config

from peft_sgrq import SGRQConfig, merge_checkpoint, split_groups


@dataclass
class TrainingArguments(SFTConfig):
    """TRL's settings, with the defaults of scales: their relative changes want larger steps than LoRA's matrices."""

    learning_rate: float = field(default=2e-2, metadata={"help": "Peak of the schedule."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Of the schedule; below 1 a share of all steps."})


@dataclass
class SGRQArguments:
    ratio: float = field(default=1.0, metadata={"help": "Share of the scales to train."})
    adapter_dtype: str = field(
        default="float32", metadata={"help": "float32, or bfloat16 for a file of half the size."}
    )
    group_size: int | None = field(
        default=None, metadata={"help": "Split the base's groups into such of this many columns, 32 for example."}
    )
    merge: bool = field(default=True, metadata={"help": "Also save the merged model, in OUTPUT_DIR/merged."})


def main() -> None:
    parser = TrlParser((ScriptArguments, TrainingArguments, ModelConfig, SGRQArguments))
    script, training, base, sgrq = parser.parse_args_and_config()

    loading = {"revision": base.model_revision, "dtype": base.dtype, "attn_implementation": base.attn_implementation}
    quantization = get_quantization_config(base)
    if quantization is not None:  # a model that is quantized already brings its own
        loading["quantization_config"] = quantization
    model = AutoModelForCausalLM.from_pretrained(base.model_name_or_path, **loading)
    tokenizer = AutoTokenizer.from_pretrained(base.model_name_or_path, revision=base.model_revision)
    if sgrq.group_size is not None:
        folder = Path(training.output_dir, "base")
        model = split_groups(model, sgrq.group_size)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model.name_or_path = str(folder)  # what the adapter says it belongs to
    dataset = load_dataset(script.dataset_name, name=script.dataset_config)

    trainer = SFTTrainer(
        model=model,
        args=training,
        train_dataset=dataset[script.dataset_train_split],
        eval_dataset=dataset[script.dataset_test_split] if training.eval_strategy != "no" else None,
        processing_class=tokenizer,
        peft_config=SGRQConfig(task_type="CAUSAL_LM", ratio=sgrq.ratio, adapter_dtype=sgrq.adapter_dtype),
    )
    trainer.train()
    trainer.save_model(training.output_dir)
    trainer.accelerator.wait_for_everyone()  # until the adapter is written
    alone = trainer.accelerator.num_processes == 1
    if training.push_to_hub:
        if alone:
            trainer.model.push_to_hub(training.hub_model_id or Path(training.output_dir).name)
        else:
            trainer.push_to_hub()  # by the first process, of what it has saved

    if sgrq.merge and alone:
        merged = trainer.model.merge_and_unload()
        merged.save_pretrained(Path(training.output_dir, "merged"))
        tokenizer.save_pretrained(Path(training.output_dir, "merged"))
    elif sgrq.merge and trainer.accelerator.is_main_process:
        # The engine may have this model in shards; what it has saved is whole.
        out = Path(training.output_dir, "merged")
        if quantization is None:
            merge_checkpoint(base.model_name_or_path, training.output_dir, out, revision=base.model_revision)
        else:  # there are no files of the quantized base yet
            model = AutoModelForCausalLM.from_pretrained(base.model_name_or_path, **loading)
            PeftModel.from_pretrained(model, training.output_dir).merge_and_unload().save_pretrained(out)
            tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
