"""What the other pages of docs print runs, in order, given the names that a page takes for granted."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from support.bases import NF4, NF4_NESTED, save_small_llama
from support.calibration import TEXTS
from support.gguf_files import mixed, tiny_model, write_gguf
from support.printed_blocks import ROOT, Block, blocks_of, make_hub, run_blocks
from support.quantized_checkpoints import FP8_BLOCKS
from transformers import AutoTokenizer

from peft_sgrq import SGRQConfig

pytestmark = pytest.mark.slow

BASE, DENSE = "unsloth/Llama-3.2-1B-Instruct-bnb-4bit", "HuggingFaceTB/SmolLM2-135M-Instruct"
FILE = "Llama-3.2-1B-Instruct-Q4_K_M.gguf"
RUN_ELSEWHERE = {
    "howto.md": "tests/docs/test_pages.py",
    "serving.md": "tests/formats/test_gguf_merging.py",  # the one command of ours
    "formats-gptq.md": "tests/formats/test_other_kernels.py",  # GPTQModel's checkpoints
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    make_hub(folder)
    return folder


def write_texts(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in TEXTS))


def quantized_and_texts() -> dict[str, Any]:
    write_texts(Path("DATA", "train.jsonl"))
    Path("MODEL").symlink_to(Path(BASE).resolve())
    Path("org").mkdir()
    Path("org", "model-before-quantization").symlink_to(Path(DENSE).resolve())
    return {"model": NF4.load(BASE), "tokenizer": AutoTokenizer.from_pretrained(BASE), "texts": TEXTS}


def guide() -> dict[str, Any]:
    get_peft_model(NF4.load(BASE), SGRQConfig(task_type="CAUSAL_LM", init_weights=False)).save_pretrained("adapter")
    return {"model": NF4.load(BASE), "base": NF4_NESTED.load(DENSE), "adapter": "adapter"}


def merging() -> dict[str, Any]:
    model = get_peft_model(NF4.load(BASE), SGRQConfig(task_type="CAUSAL_LM", init_weights=False))
    model.save_pretrained("llama-sgrq")
    Path("my-base").symlink_to(Path(BASE).resolve())
    FP8_BLOCKS.make(Path("made"))
    Path("org").mkdir()
    Path("made", "base").rename("org/model-fp8")
    return {"model": model}


def rotation() -> dict[str, Any]:
    pytest.importorskip("compressed_tensors")
    save_small_llama(Path("org", "model"))
    write_texts(Path("texts.jsonl"))
    return {}


def gguf() -> dict[str, Any]:
    write_gguf(Path(FILE), tiny_model("llama"), mixed)
    return {}


PAGES: dict[str, Callable[[], dict[str, Any]]] = {
    "guide.md": guide,
    "merging.md": merging,
    "recovery.md": quantized_and_texts,
    "selection.md": quantized_and_texts,
    "rotation.md": rotation,
    "gguf.md": gguf,
}


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_from_top_to_bottom(page: str, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for folder in hub.iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    run_blocks(blocks_of(ROOT / "docs" / page), PAGES[page]())


def test_no_page_prints_code_that_no_test_runs():
    def is_ours(block: Block) -> bool:
        return block.language != "bash" or re.search(r"^peft-sgrq ", block.text, flags=re.MULTILINE) is not None

    printing = {
        page.name
        for page in (ROOT / "docs").glob("*.md")
        if any(is_ours(block) for block in blocks_of(page) if block.language != "diff")
    }
    assert printing == {*PAGES, *RUN_ELSEWHERE}
    assert all((ROOT / test).is_file() for test in RUN_ELSEWHERE.values())
    for page in printing:
        assert {block.language for block in blocks_of(ROOT / "docs" / page)} <= {"python", "bash"}
