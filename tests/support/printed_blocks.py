"""The blocks of a page of documentation, run in order as a reader would, on tiny models under the printed names.

Models and data are folders with the names of the Hub, in the folder the blocks run in: transformers and datasets look
there first, so the code runs as it is printed.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from support.bases import NF4, save_tiny_llama
from transformers import AutoTokenizer

from peft_sgrq.cli import main

ROOT = Path(__file__).resolve().parents[2]
# What installs, serves or takes long: not run here, each for a reason that stands beside it.
NOT_RUN = {
    "pip": "changes the environment",
    "python": "scripts have tests of their own",
    "make": "installs",
    "vllm": "a server, tests/serving",
    "lm_eval": "in an environment of its own, tests/serving",
    "accelerate": "processes of their own, tests/examples/test_sft.py and tests/plugin",
    "llama-cli": "a program of llama.cpp's",
}
TRAINED = {"HuggingFaceTB/SmolLM2-135M-Instruct": "dense", "unsloth/Llama-3.2-1B-Instruct-bnb-4bit": "nf4"}
CHATS = "trl-lib/Capybara"
PREFERENCES = "trl-lib/ultrafeedback_binarized"
PROMPTS = "trl-lib/DeepMath-103K"


class Block(NamedTuple):
    """A block of a page: its language, its text, and the line it begins at."""

    language: str
    text: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page, or the code cells of a notebook."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        return [Block("python", "".join(cell["source"]), number) for number, cell in enumerate(cells)]
    found = re.finditer(r"^```(\w+)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return [Block(match[1], match[2], text.count("\n", 0, match.start()) + 1) for match in found]


def make_hub(folder: Path) -> None:
    """Tiny models and data, under the names that pages print."""
    for name, quant in TRAINED.items():
        dense = save_tiny_llama(folder / name)
        if quant == "nf4":
            model = NF4.load(dense)
            tokenizer = AutoTokenizer.from_pretrained(dense)
            (dense / "model.safetensors").unlink()
            model.save_pretrained(dense)
            tokenizer.save_pretrained(dense)
    user, good, bad = ({"role": role, "content": text} for role, text in (
        ("user", "Why is the sky blue?"), ("assistant", "It scatters blue."), ("assistant", "It is painted."),
    ))  # fmt: skip
    _write(folder / CHATS, [{"messages": [user, good]}] * 8)
    _write(folder / PREFERENCES, [{"chosen": [user, good], "rejected": [user, bad]}] * 8)
    _write(folder / PROMPTS, [{"prompt": [user]}] * 8)


def _write(folder: Path, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))


def run_blocks(blocks: list[Block], names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Runs blocks in the current folder, those in Python in one namespace; returns it."""
    names = {} if names is None else names
    for block in blocks:
        if block.language == "python":
            exec(compile(block.text, f"block at line {block.line}", "exec"), names)
        elif block.language in ("bash", "sh"):
            lines = block.text.replace("\\\n", " ").splitlines()
            for words in (shlex.split(line, comments=True) for line in lines):
                if words and words[0] == "peft-sgrq":
                    assert main(words[1:]) == 0, block
                elif words:
                    assert words[0] in NOT_RUN, f"{words[0]} is not known: line {block.line}"
    return names
