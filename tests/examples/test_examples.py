"""The examples' own arithmetic and text; the demo itself is run by `make demo`."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from adapter_size import SHAPES, linear_shapes
from demo import spell
from demo_text import task_documents
from perplexity import perplexity, tokenize
from support.bases import NF4, byte_tokenizer, logits
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_perplexity_is_that_of_the_model_s_own_loss(llama_dir: Path):
    model = NF4.load(llama_dir)
    windows = torch.randint(3, 256, (5, 24))
    with torch.no_grad():
        losses = [model(input_ids=window[None], labels=window[None]).loss.item() for window in windows]
    assert math.isclose(perplexity(model, windows, batch_size=2), math.exp(sum(losses) / len(losses)), rel_tol=1e-5)


def test_windows_are_the_text_in_order():
    text = "abcdefgh" * 4
    windows = tokenize(byte_tokenizer(), text, length=8, limit=3)
    assert windows.shape == (3, 8)
    assert byte_tokenizer().decode(windows.flatten()) == text[:24]


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(ValueError, match="has 3 tokens, expected at least 8"):
        tokenize(byte_tokenizer(), "abc", length=8, limit=3)


def test_held_out_text_is_not_in_the_training_text():
    train, held_out = task_documents()
    paragraphs = {paragraph.strip() for text in train for paragraph in text.split("\n\n")}
    for text in held_out:
        assert not paragraphs & {paragraph.strip() for paragraph in text.split("\n\n") if len(paragraph.strip()) > 40}
    assert sum(map(len, train)) > 5 * sum(map(len, held_out)) > 100_000


def test_demo_model_loads_and_knows_the_language():
    model = AutoModelForCausalLM.from_pretrained(EXAMPLES / "demo_model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "demo_model")
    windows = tokenize(tokenizer, task_documents()[1][0], length=256, limit=4)
    shuffled = windows[:, torch.randperm(256)]
    assert perplexity(model, windows) < 60
    assert perplexity(model, shuffled) > 5 * perplexity(model, windows)
    assert logits(model, windows[:1]).shape == (1, 256, len(tokenizer))
    assert (EXAMPLES / "demo_model" / "model.safetensors").stat().st_size < 12e6


def test_an_8b_llama_has_7_billion_weights_in_linear_layers():
    shapes = linear_shapes(SHAPES["8B (Llama 3.1)"])
    assert len(shapes) == 7 * 32
    assert sum(rows * columns for rows, columns in shapes) == 6_979_321_856


def test_table_cells_are_readable():
    assert [spell(value) for value in (True, 12345, 0.0, 0.12345, 31.26, None)] == [
        "yes", "12,345", "0", "0.123", "31.3", "",
    ]  # fmt: skip
