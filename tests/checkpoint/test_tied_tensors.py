"""Adapters that train one of several tied tensors: merged on files or in memory they give the trained model's bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from support.quantized_checkpoints import edit_config, tensors_of
from support.small_models import TIED, in_nf4, load, outputs, save, train_randomly

from peft_sgrq import SGRQConfig, merge_checkpoint, verify_checkpoint

pytestmark = pytest.mark.slow

ROWS = [3, 7]
TRAINED: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"modules_to_save": ["embed_tokens"]}),
    ("llama", {"modules_to_save": ["lm_head"]}),
    ("llama", {"modules_to_save": ["lm_head", "embed_tokens"]}),
    ("llama", {"trainable_token_indices": ROWS}),
    ("llama", {"trainable_token_indices": {"lm_head": ROWS}}),
    ("llama", {"trainable_token_indices": {"embed_tokens": ROWS, "lm_head": [5]}}),
    ("gpt2", {"modules_to_save": ["wte"]}),
    ("bart", {"modules_to_save": ["lm_head"]}),
    ("bart", {"modules_to_save": ["encoder.embed_tokens"]}),
    ("bart", {"trainable_token_indices": {"shared": ROWS}}),
    ("t5", {"modules_to_save": ["shared"]}),  # whose config must go on saying that they are tied
    ("t5", {"trainable_token_indices": {"shared": [3], "lm_head": [5]}}),
    ("bert", {"modules_to_save": ["word_embeddings"]}),  # which unties two biases, too
    ("gemma3", {"modules_to_save": ["embed_tokens"]}),
    ("gemma3", {"trainable_token_indices": ROWS}),
    ("llava", {"modules_to_save": ["lm_head"]}),  # which ties because its text config does
]


def _name(value: Any) -> str:
    return value if isinstance(value, str) else "-".join(f"{key}={item}" for key, item in value.items())


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def base(kind: str, quantized: bool = True) -> Path:
        name = f"{kind}-{quantized}"
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            dense = save(TIED[kind], root / "dense")
            made[name] = in_nf4(dense, root / "base") if quantized else dense
        return made[name]

    return base


def trained(base: Path, out: Path, **config: Any) -> tuple[Any, torch.Tensor]:
    """A model with an adapter that was saved, and its logits."""
    model = train_randomly(get_peft_model(load(base), SGRQConfig(init_weights=False, **config)))
    model.save_pretrained(out)
    return model, outputs(model)


@pytest.mark.parametrize(("kind", "config"), TRAINED, ids=_name)
def test_both_merges_give_the_bits_of_the_trained_model(kind, config, bases, tmp_path):
    base = bases(kind)
    model, expected = trained(base, tmp_path / "adapter", **config)
    assert not torch.equal(outputs(load(base)), expected)
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "files")
    model.merge_and_unload().save_pretrained(tmp_path / "memory")
    assert torch.equal(outputs(load(tmp_path / "files")), expected)
    assert torch.equal(outputs(load(tmp_path / "memory")), expected)
    report = verify_checkpoint(base, tmp_path / "adapter", tmp_path / "files")
    assert (report.errors, report.notes) == ([], [])
    assert verify_checkpoint(base, tmp_path / "adapter", tmp_path / "memory").errors == []


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bart"])
def test_scales_of_a_tied_head_are_its_own(kind, bases, tmp_path):
    base = bases(kind, quantized=False)
    model, expected = trained(base, tmp_path / "adapter", target_modules=["lm_head"])
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "files")
    assert torch.equal(outputs(load(tmp_path / "files")), expected)
    model.merge_and_unload().save_pretrained(tmp_path / "memory")
    for merged in ("files", "memory"):
        assert verify_checkpoint(base, tmp_path / "adapter", tmp_path / merged).errors == []


@pytest.mark.parametrize(
    "config", [{"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": ROWS}], ids=_name
)
def test_a_checkpoint_that_holds_a_tied_tensor_twice_stays_consistent(config, bases, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(bases("llama"), base)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    model, expected = trained(base, tmp_path / "adapter", **config)
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "files")
    assert torch.equal(outputs(load(tmp_path / "files")), expected)
    model.merge_and_unload().save_pretrained(tmp_path / "memory")  # where a tied tensor is once
    for merged in ("files", "memory"):
        assert verify_checkpoint(base, tmp_path / "adapter", tmp_path / merged).errors == []


def test_a_checkpoint_that_only_names_the_head_is_the_same(bases, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(bases("llama"), base)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    _, expected = trained(base, tmp_path / "adapter", modules_to_save=["embed_tokens"])
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "files")
    assert torch.equal(outputs(load(tmp_path / "files")), expected)


def test_an_untied_tensor_is_in_the_index_of_shards(bases, tmp_path):
    base = tmp_path / "base"
    load(bases("llama", quantized=False)).save_pretrained(base, max_shard_size="100KB")
    assert len(list(base.glob("*.safetensors"))) > 1
    _, expected = trained(base, tmp_path / "adapter", modules_to_save=["embed_tokens"])
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "files")
    assert torch.equal(outputs(load(tmp_path / "files")), expected)
    index = json.loads((tmp_path / "files" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(tmp_path / "files").values())
    assert "lm_head.weight" in index["weight_map"]


@pytest.mark.parametrize("spoil", ["tied to the embedding", "the old embedding", "the tie"])
def test_verify_sees_a_head_that_follows_the_embedding(spoil, bases, tmp_path):
    base = bases("llama")
    trained(base, tmp_path / "adapter", modules_to_save=["embed_tokens"])
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "files")
    path = tmp_path / "files" / "model.safetensors"
    tensors = load_file(path)
    if spoil == "tied to the embedding":  # what a merge that takes both for one would write
        tensors.pop("lm_head.weight")
        edit_config(tmp_path / "files", tie_word_embeddings=True)
    elif spoil == "the old embedding":
        tensors["model.embed_tokens.weight"] = tensors["lm_head.weight"].clone()
    else:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    assert not verify_checkpoint(base, tmp_path / "adapter", tmp_path / "files").ok


def of_an_unknown_class(base: Path, out: Path, **metadata: str) -> Path:
    """The checkpoint as one of a model that transformers does not know."""
    shutil.copytree(base, out)
    edit_config(out, model_type="of_its_own", architectures=["OwnForCausalLM"])
    save_file(load_file(out / "model.safetensors"), out / "model.safetensors", metadata={"format": "pt", **metadata})
    return out


def test_an_embedding_that_may_be_tied_is_refused_where_transformers_knows_nothing(bases, tmp_path):
    base = bases("llama")
    trained(base, tmp_path / "adapter", modules_to_save=["embed_tokens"])
    unknown = of_an_unknown_class(base, tmp_path / "unknown")
    with pytest.raises(ValueError, match=r"'model\.embed_tokens\.weight', which the checkpoint may tie"):
        merge_checkpoint(unknown, tmp_path / "adapter", tmp_path / "files")
    assert not (tmp_path / "files").exists()


def test_a_tie_that_the_file_names_is_known_without_transformers(bases, tmp_path):
    base = bases("llama")
    trained(base, tmp_path / "adapter", modules_to_save=["embed_tokens"])
    tie = {"lm_head.weight": "model.embed_tokens.weight"}
    unknown = of_an_unknown_class(base, tmp_path / "unknown", **tie)
    merge_checkpoint(unknown, tmp_path / "adapter", tmp_path / "files")
    before, after = tensors_of(unknown), tensors_of(tmp_path / "files")
    assert torch.equal(after["lm_head.weight"], before["model.embed_tokens.weight"])
    assert not torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "files" / "config.json").read_text())["tie_word_embeddings"] is False
