"""Rotations at run time: through files by our loader, and dropped by transformers' own."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from peft import get_peft_model
from support.bases import logits
from support.rotated_models import assert_same, random_model, state
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_sgrq import SGRQConfig, allocate_bits, load_rotated, quantize, recover, rotate

pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.filterwarnings("ignore:The model has online rotations")


@pytest.mark.parametrize("rotations", [("R3",), ("R4",), ("R1", "R2", "R3", "R4")], ids="+".join)
def test_the_loader_gives_the_model_that_was_saved(rotations, tmp_path, ids):
    model = random_model("llama with biases")
    rotate(model, rotations=rotations)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_rotated(tmp_path).eval(), ids % 256), logits(model, ids % 256))


def test_rotations_in_some_layers_alone_are_saved_and_loaded(tmp_path, ids):
    model = random_model("llama, tied", num_hidden_layers=4)
    found = rotate(model, [ids % 256], rotations=("R1", "R3", "R4"))
    chosen = [len(found.chosen.get(name, [])) for name in ("R3", "R4")]
    assert any(0 < count < 4 for count in chosen), "all or none: the test shows nothing"
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_rotated(tmp_path).eval(), ids % 256), logits(model, ids % 256))


def test_keys_are_rounded_where_they_are_rotated_and_queries_are_not(tmp_path, monkeypatch, ids):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = random_model("llama with biases")
    rotate(model, rotations=["R3"])
    quantize(model, "W4A16KV4").save_pretrained(tmp_path)
    groups = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["config_groups"]
    assert all("attention" not in str(group["targets"]) for group in groups.values())
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    levels = []

    def record(module, query, key, value, *args, **kwargs):
        levels.append([max(len(head.unique()) for head in x.flatten(0, -2)) for x in (query, key, value)])
        return plain(module, query, key, value, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", record)
    for one in (model, load_rotated(tmp_path).eval()):
        levels.clear()
        logits(one, ids % 256)
        assert len(levels) == 2
        for query, key, value in levels:
            assert query == 16 and key < 16 and value < 16  # of 16 numbers of a head


def test_each_model_keeps_its_own_attention_implementation(tmp_path, ids):
    """The hooked attention of compressed-tensors is one for all models, and none for "eager"."""
    models = {}
    for name in ("sdpa", "eager"):
        model = models[name] = random_model("llama with biases")
        model.set_attn_implementation(name)
        rotate(model, [ids % 256], rotations=["R3"], select="all", tolerance=1e-5)
        model.save_pretrained(tmp_path / name)
        models[f"{name}, loaded"] = load_rotated(tmp_path / name, attn_implementation=name).eval()
    called = {name: model.model.layers[0].self_attn.config._attn_implementation for name, model in models.items()}
    assert len(set(called.values())) == 2
    other = torch.cat([ids[:, :-1], (ids[:, -1:] + 1) % 256], 1) % 256
    for model in models.values():  # with a mask of another implementation attention would not be causal
        one, two = logits(model, ids % 256), logits(model, other)
        torch.testing.assert_close(one[:, :-1], two[:, :-1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one, logits(models["sdpa"], ids % 256), rtol=1e-3, atol=1e-3)
    models["sdpa"].set_attn_implementation("eager")
    with pytest.raises(ValueError, match="attn_implementation='eager'` when it is loaded"):
        logits(models["sdpa"], ids % 256)


def test_compressed_tensors_still_hooks_one_attention_for_all(monkeypatch):
    from compressed_tensors.modeling import QuantizedAttentionImpl, initialize_hooked_attention

    monkeypatch.setattr(QuantizedAttentionImpl, "_original_impl", "eager")
    models = [random_model("llama, tied", num_hidden_layers=1) for _ in range(2)]
    for model, name in zip(models, ("eager", "sdpa"), strict=True):
        model.set_attn_implementation(name)
        initialize_hooked_attention(model, model.model.layers[0].self_attn)
    assert QuantizedAttentionImpl._original_impl == "sdpa"
    assert models[0].config._attn_implementation == models[1].config._attn_implementation == "ct_hooked_attention"
    models[0].set_attn_implementation("eager")
    initialize_hooked_attention(models[0], models[0].model.layers[0].self_attn)
    with pytest.raises(KeyError, match="eager"):
        models[0](input_ids=torch.ones(1, 2, dtype=torch.long))


def test_checkpoints_without_online_rotations_load_as_ever(llama_dir, ids):
    plain = AutoModelForCausalLM.from_pretrained(llama_dir)
    assert torch.equal(logits(load_rotated(llama_dir), ids), logits(plain, ids))


def test_a_checkpoint_that_lost_its_matrices_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    model = random_model("mistral")
    rotate(model, rotations=["R4"])
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "R4" not in name}
    assert len(kept) < len(tensors)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the matrix of a rotation"):
        load_rotated(tmp_path)


def test_transformers_still_drops_online_rotations(tmp_path, ids):
    model = random_model("llama, tied")
    rotate(model, rotations=["R4"])
    model.save_pretrained(tmp_path)
    dropped = logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), ids % 256)
    expected = logits(model, ids % 256)
    assert (dropped - expected).abs().max() > 0.1 * expected.abs().max()


def test_the_code_of_a_card_and_the_commands_load_with_rotations(llama_dir, tmp_path, ids):
    from peft_sgrq.cli import main

    dense, base = tmp_path / "dense", tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32)
    rotate(model, rotations=["R1", "R3", "R4"])
    for folder in (dense, base):
        (model if folder is dense else quantize(model)).save_pretrained(folder)
        AutoTokenizer.from_pretrained(llama_dir).save_pretrained(folder)
    (tmp_path / "text.txt").write_text("Queries and keys are rotated when the model runs. " * 8)
    run = ["recover", base, "--reference", dense, "--data", tmp_path / "text.txt", "-o", tmp_path / "adapter"]
    assert main([*map(str, run), "--epochs", "1", "--quiet"]) == 0
    card = (tmp_path / "adapter" / "README.md").read_text()
    code = card.split("## Load")[1].split("```python\n")[1].split("```")[0]
    found: dict[str, Any] = {}
    exec(code.replace("path or Hub name of this adapter", str(tmp_path / "adapter")), found)
    adapted = found["model"].eval()
    assert not torch.equal(logits(adapted, ids), logits(load_rotated(base).eval(), ids))
    expected = logits(adapted, ids)
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert "loads by `peft_sgrq.load_rotated` alone" in card
    assert torch.equal(logits(load_rotated(tmp_path / "merged").eval(), ids), expected)


def test_a_model_that_lost_its_rotations_is_refused_by_all_that_takes_it(tmp_path, ids):
    model = random_model("llama, tied")
    rotate(model, rotations=["R4"])
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="load_rotated"):
        get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path), SGRQConfig())
    get_peft_model(load_rotated(tmp_path), SGRQConfig())
    quantize(model).save_pretrained(tmp_path / "quantized")
    lost = AutoModelForCausalLM.from_pretrained(tmp_path)
    for use in (
        rotate,
        quantize,
        lambda one: allocate_bits(one, [ids % 256], bits=5, progress=False),
        lambda one: recover(load_rotated(tmp_path / "quantized"), one, [ids % 256], progress=False),
    ):
        before = state(lost)
        with pytest.raises(ValueError, match="load_rotated"):
            use(lost)
        assert_same(lost, before)
