"""`peft-sgrq inspect`, its picture, and the sizes it foretells."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bases import DENSE, INT8, NF4, Base, adapted

from peft_sgrq.cli import main
from peft_sgrq.formats.selectable_unit import SelectableUnit
from peft_sgrq.selection.layer_saliency import LayerSaliency
from peft_sgrq.selection.report.plot import plot_report
from peft_sgrq.selection.report.report import (
    report_adapter,
    report_saliency,
)
from peft_sgrq.selection.saliency import Saliency

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")


def saliency(blocks: int = 2, columns: int = 512, kinds: tuple[str, ...] = KINDS) -> Saliency:
    generator = torch.Generator().manual_seed(0)
    layers = {
        f"model.layers.{block}.{kind}": LayerSaliency(
            torch.randn(columns, generator=generator).exp(),
            (128, columns),
            SelectableUnit.GROUP,
            64,
            f"dense-64:{block}:{index}",
        )
        for block in range(blocks)
        for index, kind in enumerate(kinds)
    }
    return Saliency(layers, "obs", tokens=1000, seconds={"total": 1.5})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "saliency.safetensors"
    saliency().save(path)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    capsys.readouterr()  # what libraries printed while they were imported before
    assert main(["inspect", *map(str, arguments)]) == 0
    return capsys.readouterr().out


# sizes


def test_the_sizes_of_a_report_are_those_of_the_selections(file):
    report = report_saliency(saliency(), ratios=(0.25, "knee", "global"), budget=0.5)
    for size in report.sizes:
        counts = saliency().counts(size["ratio"], budget=0.5)
        assert size["scales"] == 128 * sum(counts.values())
        assert size["share"] == size["scales"] / (128 * 8 * 6)
        assert size["bytes_float32"] - size["bytes_bfloat16"] == pytest.approx(2 * size["scales"], abs=200)
    assert report.sizes[0]["ratio"] == 0.25 and report.sizes[0]["share"] == 0.25


def test_a_budget_nobody_asked_for_is_left_out_where_layers_have_too_few_groups_for_it():
    small = saliency(columns=64)  # one group a layer: the default budget, 0.4, is less than one of each
    assert "global" not in [size["ratio"] for size in report_saliency(small).sizes]
    assert "knee" in [size["ratio"] for size in report_saliency(small).sizes]
    for asked in ({"ratio": "global"}, {"budget": 0.3}):
        with pytest.raises(ValueError, match="`budget` allows"):
            report_saliency(small, **asked)


# the command on a saliency


def test_a_saliency_is_shown_as_tables(file, capsys):
    text = run(capsys, file)
    assert "criterion: obs" in text and "tokens: 1000" in text
    head = next(line for line in text.splitlines() if line.startswith("block"))
    assert head.split() == ["block", "q_proj", "k_proj", "down_proj"]
    sizes = text[text.index("Adapters to come") :].split("\n\n")[0].splitlines()
    assert [line.split()[0] for line in sizes[2:]] == ["0.05", "0.1", "0.2", "0.4", "1.0", "knee", "global"]
    full = next(line for line in sizes if line.split()[0] == "1.0")
    assert "6,144" in full and full.count("100.0 %") == 2


@pytest.mark.parametrize("ratio", ["0.25", "knee", "global"])
def test_json_says_what_would_be_selected(ratio, file, capsys):
    found = json.loads(run(capsys, file, "--json", "--ratio", ratio, "--budget", "3000"))
    expected = saliency().counts(0.25 if ratio == "0.25" else ratio, budget=3000)
    assert {layer["name"]: layer["selected"] for layer in found["layers"]} == expected
    for layer in found["layers"]:
        assert layer["ratio"] == layer["selected"] / 8 and layer["scales"] == 128 * layer["selected"]
        assert layer["held"] > layer["ratio"]
    if ratio == "global":
        assert sum(layer["scales"] for layer in found["layers"]) <= 3000


def test_layers_outside_of_blocks_and_experts_are_shown(tmp_path, capsys):
    one = saliency(kinds=("mlp.experts.0.up", "mlp.experts.1.up", "attn.q"))
    one.layers["lm_head"] = LayerSaliency(torch.ones(128), (512, 128), SelectableUnit.GROUP, 64, "")
    one.save(tmp_path / "s.safetensors")
    text = run(capsys, tmp_path / "s.safetensors", "--plot", tmp_path / "s.png")
    lines = [line.split() for line in text.splitlines()]
    assert ["block", "up", "q", "lm_head"] in lines and ["other", "50"] in lines


# the command on an adapter


@pytest.mark.parametrize("base", [NF4, INT8, DENSE, Base("fp4", True, torch.bfloat16)], ids=lambda base: base.name)
def test_an_adapter_is_shown_with_what_it_selects(base, llama_dir, tmp_path, capsys):
    model = adapted(base, llama_dir, ratio=0.5, group_size=16)
    model.save_pretrained(tmp_path)
    found = {layer["name"]: layer for layer in json.loads(run(capsys, tmp_path, "--json"))["layers"]}
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if hasattr(layer, "sgrq_delta")
    }
    assert found.keys() == layers.keys()
    for name, layer in layers.items():
        delta = layer.sgrq_delta["default"]
        assert found[name]["selected"] == len(delta.units)
        assert found[name]["scales"] == delta.weight.numel()
        assert found[name]["change"] == pytest.approx(float(delta.weight.detach().double().square().mean().sqrt()))
        assert found[name]["selectable"] is found[name]["held"] is None  # the saliency knows
    text = run(capsys, tmp_path)
    assert "Root mean square of the deltas" in text and "held" not in text


def test_an_adapter_with_its_saliency_says_what_share_it_holds(llama_dir, tmp_path, capsys):
    model = adapted(DENSE, llama_dir, ratio=0.5, group_size=16)
    model.save_pretrained(tmp_path / "adapter")
    layers = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "sgrq_delta"):
            scores = torch.rand(layer.in_features)
            layers[name.removeprefix("base_model.model.")] = LayerSaliency.of(layer.scaled_weight, scores)
    Saliency(layers, "obs").save(tmp_path / "s.safetensors")
    arguments = (tmp_path / "adapter", "--saliency", tmp_path / "s.safetensors")
    found = json.loads(run(capsys, *arguments, "--json", "--plot", tmp_path / "picture.png"))
    for layer in found["layers"]:
        delta = model.get_submodule(f"base_model.model.{layer['name']}").sgrq_delta["default"]
        scores = layers[layer["name"]].group_scores()
        assert layer["selectable"] == layers[layer["name"]].selectable
        assert layer["ratio"] == len(delta.units) / layer["selectable"]
        assert layer["held"] == pytest.approx(float(scores[delta.units].sum() / scores.sum()), rel=1e-5)
    assert (tmp_path / "picture.png").stat().st_size > 1000
    saliency().save(tmp_path / "other.safetensors")
    assert main(["inspect", str(tmp_path / "adapter"), "--saliency", str(tmp_path / "other.safetensors")]) == 2
    assert "that of another base" in capsys.readouterr().err


def test_an_adapter_is_shown_where_its_base_is_not(llama_dir, tmp_path, capsys):
    adapted(DENSE, llama_dir, ratio=0.5, group_size=16).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "nowhere")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert {layer["selected"] for layer in report_adapter(tmp_path).layers} == {2, 4}
    assert "Groups selected" in run(capsys, tmp_path, "--plot", tmp_path / "picture.png")


# the picture


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [1, 6, 80])
@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_picture_is_written_whole(blocks, ending, tmp_path):
    one = saliency(blocks)
    plot_report(report_saliency(one), tmp_path / f"picture.{ending}", one)
    assert [path.name for path in tmp_path.iterdir()] == [f"picture.{ending}"]
    start = (tmp_path / f"picture.{ending}").read_bytes()[:5]
    assert start == (b"\x89PNG\r" if ending == "png" else b"<?xml")


def test_the_picture_shows_the_numbers_of_the_report(tmp_path):
    one = saliency(3)
    report = report_saliency(one, 0.25)
    plot_report(report, tmp_path / "picture.svg", one)
    svg = (tmp_path / "picture.svg").read_text()
    for text in ("q_proj: knee at", "Cumulative saliency (obs)", "By layer: selected groups, %"):
        assert f"<!-- {text}" in svg


def test_without_matplotlib_the_error_says_what_to_install(file, tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install matplotlib"):
        plot_report(report_saliency(saliency()), tmp_path / "picture.png", saliency())
    assert main(["inspect", str(file), "--plot", str(tmp_path / "picture.png")]) == 2


# mistakes


def test_mistakes_are_explained(file, llama_dir, tmp_path, capsys):
    adapted(DENSE, llama_dir, group_size=16).save_pretrained(tmp_path / "adapter")
    (tmp_path / "broken.safetensors").write_bytes(file.read_bytes()[:-10])
    for arguments, message in [
        ((tmp_path / "adapter", "--ratio", "knee"), "leave --ratio out"),
        ((file, "--saliency", file), "leave --saliency out"),
        ((tmp_path / "broken.safetensors",), "truncated or corrupt"),
        ((file, "--ratio", "2"), r"in (0, 1]"),
        ((file, "--ratio", "global", "--budget", "10"), "raise the budget"),
        ((file, "--ratio", "layerwise"), "no such ratios"),
        ((file, "--plot", tmp_path / "picture.doc"), "doc"),
    ]:
        assert main(["inspect", *map(str, arguments)]) == 2, arguments
        assert message in capsys.readouterr().err


# what an adapter did


@pytest.fixture
def trained(llama_dir: Path, tmp_path: Path) -> Path:
    adapted(NF4, llama_dir, ratio=1.0).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_layers_of_an_adapter_stand_as_they_do_in_the_model(trained: Path):
    report = report_adapter(trained)
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert report.grid("scales")[1] == kinds
    assert [layer["name"].rpartition(".")[2] for layer in report.layers] == kinds * 2


def test_the_picture_of_an_adapter_shows_how_far_it_moved_the_scales(trained: Path, tmp_path: Path):
    plot_report(report_adapter(trained), tmp_path / "picture.svg")
    text = (tmp_path / "picture.svg").read_text()
    assert "How far the scales moved" in text
    assert "selected" not in text  # of everything there is nothing to see


def test_a_ratio_that_takes_far_more_than_it_says_is_noted(file: Path, tmp_path: Path, capsys):
    assert "0.05 takes 12.5 %" in run(capsys, file)  # one of eight groups
    saliency(columns=64 * 100).save(tmp_path / "wide.safetensors")
    assert "Note:" not in run(capsys, tmp_path / "wide.safetensors")
