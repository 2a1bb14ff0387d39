"""The examples that measure rotations and bits: they do what they say, resume, and the page has their tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import planned_bits
import pytest
import rotated_bits
import rotation_table
import torch
from mixed_columns import PARTS, Columns, diagonal_fisher
from straight_through import straight_through
from support.bases import logits
from support.rotated_models import random_model
from transformers import AutoModelForCausalLM

from peft_sgrq import quantize, rotate
from peft_sgrq.passes.data import load_batches
from peft_sgrq.rotation.quantize import quantizable_layers
from peft_sgrq.rotation.rounding import quantized_weight
from peft_sgrq.rotation.scheme import Scheme
from peft_sgrq.selection.layerwise.probe import split_rows

pytest.importorskip("compressed_tensors")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The model has online rotations")]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    rows = [{"text": f"Line {i}: the quick brown fox jumps over {i * i} lazy dogs. " * 3} for i in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def run(module: Any, monkeypatch: pytest.MonkeyPatch, directory: Path, text: Path, out: Path, *arguments: Any) -> Any:
    shared = ["--model", directory, "--test", text, "--calibration", text, "--out", out]
    shared += ["--windows", 2, "--length", 16, "--rows", 4]
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, [*shared, *arguments])])
    module.main()
    (setting,) = json.loads(out.read_text())
    return setting


def test_rotations_are_measured_before_and_after_tuning_and_resumed(llama_dir, text, tmp_path, monkeypatch, capsys):
    arguments = ["--rotations", "none", "adaptive", "--schemes", "W4A4KV4", "--group-sizes", 64, "--seeds", 0, 1]
    arguments += ["--methods", *rotated_bits.METHODS, "--train", text, "--task", text, "--steps", 4]
    arguments += ["--train-length", 16]
    out = tmp_path / "found.json"
    setting = run(rotated_bits, monkeypatch, llama_dir, text, out, *arguments)
    assert len(setting["runs"]) == 3 * len(rotated_bits.METHODS)  # the seed of no rotation means nothing
    losses = {
        (one["method"], one["rotation"]): one["perplexity"]["task"] for one in setting["runs"] if one["seed"] == 0
    }
    for method in ("scales", "dense", "straight-through"):
        assert losses[method, "none"] < losses["none", "none"]
    content = out.read_bytes()
    capsys.readouterr()
    run(rotated_bits, monkeypatch, llama_dir, text, out, *arguments)
    assert out.read_bytes() == content and capsys.readouterr().out == "Everything is done.\n"
    assert "| adaptive |" in rotation_table.describe(json.loads(content))


def test_bits_are_measured_by_who_gives_them_before_and_after_recovery(llama_dir, text, tmp_path, monkeypatch):
    methods = [name for name in planned_bits.METHODS if "autoround" not in name]
    arguments = ["--bits", 2.5, "--methods", *methods, "--recovery-rows", 4, "--epochs", 1]
    setting = run(planned_bits, monkeypatch, llama_dir, text, tmp_path / "found.json", *arguments)
    assert [one["method"] for one in setting["runs"]] == ["uniform", *methods]
    assert all(one["after"] != one["before"] for one in setting["runs"])
    assert all(one.get("spent", 0) <= 2.5 for one in setting["runs"])
    assert "programme" in rotation_table.describe([setting])


@pytest.mark.parametrize("rotations", [(), ("R1", "R2", "R3", "R4")], ids=["none", "all"])
def test_what_is_trained_straight_through_computes_as_the_quantized_model(rotations, llama_dir, ids):
    models = [AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32).eval() for _ in range(2)]
    for model in models if rotations else ():
        rotate(model, rotations=rotations)
    weights = straight_through(models[0], "W8A8KV8", 64)  # of few bits, sums in another order round to other codes
    found = models[0](input_ids=ids, labels=ids, use_cache=False)
    expected = logits(quantize(models[1], "W8A8KV8"), ids)
    assert (found.logits - expected).norm() < 1e-2 * expected.norm()
    found.loss.backward()
    assert all(weight.grad.abs().sum() > 0 for weight in weights)


def test_columns_of_two_widths_cost_what_they_say_and_the_rest_is_uniform(ids):
    model = random_model("llama with biases")
    rows = split_rows(load_batches([ids % 256]))
    layers, scheme = quantizable_layers(model), Scheme(4, group_size=16)
    columns = Columns(layers, diagonal_fisher(model, layers, rows), (2, 3, 4), scheme)
    size = sum(layer.weight.numel() for layer in layers.values())
    for bits in (2.25, 2.5, 3.0):
        for way in ("fixed", "threshold", "programme"):
            options = columns.choose(way, int(bits * size), model, rows)
            assert sum(columns.cost(name, option) for name, option in options.items()) <= bits * size
            assert way != "fixed" or len(set(options.values())) == 1
    name = "model.layers.0.self_attn.q_proj"
    errors = [(columns.weight(name, option) - layers[name].weight).norm().item() for option in columns.widths]
    assert errors == sorted(errors, reverse=True)
    assert columns.cost(name, 0) == 2 * 64 * 64 and columns.cost(name, PARTS + 1) == 64 * (64 * 3 + 16)


def test_layers_that_autoround_passed_over_are_no_row_of_the_table():
    scheme, generator = Scheme(4, group_size=16), torch.Generator().manual_seed(0)
    for columns in (32, 40):  # groups; one scale a row
        dense = torch.randn(8, columns, generator=generator)
        rounded = quantized_weight(dense, scheme.weight_args(2, scheme.by_row(columns)))
        planned_bits.refuse_unrounded({"one": rounded, "two": rounded.bfloat16()}, {"one": 2, "two": 2}, scheme)
        with pytest.raises(ValueError, match=r"1 of 2 layers.*two \[8, "):
            planned_bits.refuse_unrounded({"one": rounded, "two": dense}, {"one": 2, "two": 2}, scheme)


def test_the_page_has_the_tables_of_the_results():
    page = (ROOT / "docs" / "rotation.md").read_text()
    files = sorted((ROOT / "docs" / "results").glob("rotation-*.json")) + sorted(
        (ROOT / "docs" / "results").glob("bits-*.json")
    )
    assert files
    for path in files:
        assert rotation_table.describe(json.loads(path.read_text())) in page
