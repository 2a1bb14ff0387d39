"""Models whose names are nested otherwise on the disk: merged on files they give the bits of the trained model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from support.quantized_checkpoints import tensors_of
from support.small_models import COMPOSITE, in_nf4, load, outputs, save, train_randomly
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from peft_sgrq import SGRQConfig, merge_checkpoint, verify_checkpoint
from peft_sgrq.files import architecture

pytestmark = pytest.mark.slow

TEXT_ONLY = r".*(language_model|text_model).*(q|k|v)_proj"  # layers that the vision tower has, too


@pytest.fixture(scope="module", params=COMPOSITE, ids=str)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(request.param)
    return in_nf4(save(COMPOSITE[request.param], root / "dense"), root / "base")


@pytest.mark.parametrize(
    "config",
    [
        {"modules_to_save": ["norm", "lm_head"], "trainable_token_indices": {"embed_tokens": [3, 7]}},
        {"target_modules": TEXT_ONLY, "modules_to_save": ["embed_tokens"]},
    ],
    ids=["everything", "text-only"],
)
def test_merged_on_files_gives_the_bits_of_the_trained_model(base, config, tmp_path):
    tied = load(base).config.tie_word_embeddings
    if tied and "trainable_token_indices" in config:  # PEFT refuses rows of an embedding whose head is trained whole
        config = {**config, "modules_to_save": ["norm"]}
    model = train_randomly(get_peft_model(load(base), SGRQConfig(init_weights=False, **config)))
    expected = outputs(model)
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "files")
    assert torch.equal(outputs(load(tmp_path / "files")), expected)
    model.merge_and_unload().save_pretrained(tmp_path / "memory")
    for merged in ("files", "memory"):
        assert verify_checkpoint(base, tmp_path / "adapter", tmp_path / merged).errors == []


@pytest.mark.parametrize("kind", ["llava", "gemma3"])
@pytest.mark.parametrize("checked", [True, False])
def test_the_digest_chooses_among_towers_where_transformers_knows_nothing(kind, checked, tmp_path, monkeypatch):
    base = in_nf4(save(COMPOSITE[kind], tmp_path / "dense"), tmp_path / "base")
    config: dict[str, Any] = {"target_modules": ".*proj|.*fc1", "modules_to_save": ["norm"]}
    model = train_randomly(get_peft_model(load(base), SGRQConfig(init_weights=False, **config)))
    if not checked:
        model.peft_config["default"].base_fingerprint = None  # then the prefixes of layers that are found tell
        model.peft_config["default"].target_modules = {"gate_proj", "q_proj"}
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "known")
    monkeypatch.setattr(architecture, "build", lambda *args: None)
    try:
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "files")
    except ValueError as error:
        assert not checked and "could be any of" in str(error)  # a refusal is right, a wrong tower is not
    else:
        files, known = (tmp_path / name / "model.safetensors" for name in ("files", "known"))
        assert files.read_bytes() == known.read_bytes()


def test_layers_that_are_called_otherwise_on_the_disk_are_found(tmp_path):
    torch.manual_seed(0)
    settings = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = ViTForImageClassification(ViTConfig(**settings, image_size=16, patch_size=8))
    model.save_pretrained(tmp_path / "base")  # encoder.layer.0.attention.attention.query, in memory q_proj

    def loaded(path: Path) -> Any:
        return AutoModelForImageClassification.from_pretrained(path).eval()

    pixels = torch.rand(1, 3, 16, 16)
    adapted = get_peft_model(loaded(tmp_path / "base"), SGRQConfig(init_weights=False)).eval()
    expected = adapted(pixels).logits
    adapted.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "files")
    assert torch.equal(loaded(tmp_path / "files")(pixels).logits, expected)
    assert verify_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "files").ok
    assert isinstance(PeftModel.from_pretrained(loaded(tmp_path / "base"), tmp_path / "adapter"), PeftModel)


def test_verify_sees_a_tower_that_was_swapped(tmp_path):
    base = in_nf4(save(COMPOSITE["llava"], tmp_path / "dense"), tmp_path / "base")
    model = train_randomly(get_peft_model(load(base), SGRQConfig(init_weights=False, target_modules=TEXT_ONLY)))
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "files")
    shutil.copytree(tmp_path / "files", tmp_path / "spoiled")
    tensors = tensors_of(tmp_path / "spoiled")
    end = "layers.0.self_attn.q_proj.weight.absmax"
    text, vision = (next(name for name in tensors if name.endswith(f"{part}.{end}")) for part in ("model", "encoder"))
    tensors[text], tensors[vision] = tensors[vision].clone(), tensors[text].clone()
    save_file(tensors, tmp_path / "spoiled" / "model.safetensors", metadata={"format": "pt"})
    assert verify_checkpoint(base, tmp_path / "adapter", tmp_path / "files").ok
    assert not verify_checkpoint(base, tmp_path / "adapter", tmp_path / "spoiled").ok
