"""A selection of everything is not written to files, and an adapter without one has everything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file
from support.bases import INT8, NF4, adapted, logits

from peft_sgrq import SGRQConfig, merge_checkpoint, verify_checkpoint

FILE = "adapter_config.json"


@pytest.mark.parametrize("base", [NF4, INT8], ids=lambda base: base.name)
def test_a_full_selection_is_not_in_the_file_and_is_there_after_loading(base, llama_dir: Path, tmp_path: Path, ids):
    model = adapted(base, llama_dir, ratio=1.0).eval()
    config = model.peft_config["default"]
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / FILE).read_text())["selection"] is None
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(base.load(llama_dir), tmp_path, **options).eval()
        assert loaded.peft_config["default"].selection == config.selection
        assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_files_that_name_everything_load_as_before(llama_dir: Path, tmp_path: Path, ids):
    model = adapted(NF4, llama_dir, ratio=1.0).eval()
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / FILE).read_text())
    fields["selection"] = model.peft_config["default"].selection
    (tmp_path / FILE).write_text(json.dumps(fields))
    loaded = PeftModel.from_pretrained(NF4.load(llama_dir), tmp_path).eval()
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_a_partial_selection_is_written(llama_dir: Path, tmp_path: Path):
    for ratio, pattern in ((0.5, {}), (1.0, {"q_proj": 0.5})):
        model = adapted(NF4, llama_dir, ratio=ratio, ratio_pattern=pattern)
        model.save_pretrained(tmp_path)
        written = json.loads((tmp_path / FILE).read_text())["selection"]
        assert written == model.peft_config["default"].selection


def test_layers_that_an_adapter_of_ratio_1_selects_in_part_are_written(llama_dir: Path, tmp_path: Path, ids):
    first = "model.layers.0.mlp.down_proj"  # of two groups, where others have one
    config = SGRQConfig(task_type="CAUSAL_LM", init_weights=False, selection={first: "80"})
    model = get_peft_model(NF4.load(llama_dir), config).eval()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / FILE).read_text())["selection"] == {first: "80"}
    loaded = PeftModel.from_pretrained(NF4.load(llama_dir), tmp_path).eval()
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_layers_without_weights_yet_have_everything(llama_dir: Path):
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(llama_dir))
    model = get_peft_model(model, SGRQConfig(task_type="CAUSAL_LM"), low_cpu_mem_usage=True)
    assert all(set(mask) <= set("f8ce0") for mask in model.peft_config["default"].selection.values())


def test_such_an_adapter_merges_on_files_and_by_auto_classes(llama_dir: Path, tmp_path: Path):
    NF4.load(llama_dir).save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = SGRQConfig(task_type="CAUSAL_LM", init_weights=False, criterion="diag")
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    merge_checkpoint(None, tmp_path / "adapter", tmp_path / "merged")
    assert verify_checkpoint(None, tmp_path / "adapter", tmp_path / "merged").ok
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    deltas = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    state = loaded.state_dict()
    name = next(name for name in deltas if name.endswith("sgrq_delta.weight"))
    assert torch.equal(state[name.replace(".weight", ".default.weight")], deltas[name])
