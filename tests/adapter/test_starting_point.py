"""An adapter may start from a saved one, a recovery for instance, with `init_weights`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.bases import DENSE, INT8, NF4, TRAINING, adapted, byte_tokenizer, logits, train_steps
from support.rounded_models import deltas

from peft_sgrq import SGRQConfig
from peft_sgrq.layer.masks import decode_mask, encode_mask


@pytest.fixture(params=[NF4, INT8], ids=lambda base: base.name)
def base(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def source(base, llama_dir: Path, tmp_path: Path) -> Path:
    """A saved adapter with random deltas on half of the groups."""
    adapted(base, llama_dir).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def started(base: Any, llama_dir: Path, source: Path, **config: Any) -> PeftModel:
    return get_peft_model(base.load(llama_dir), SGRQConfig(init_weights=source, task_type="CAUSAL_LM", **config))


def test_it_begins_where_the_saved_one_is(base, source, llama_dir: Path, ids):
    model = started(base, llama_dir, source)
    expected = PeftModel.from_pretrained(base.load(llama_dir), str(source))
    assert torch.equal(logits(model.eval(), ids), logits(expected, ids))
    config = model.peft_config["default"]
    assert config.selection == expected.peft_config["default"].selection
    assert config.ratio == 0.5
    losses = train_steps(model, ids)
    assert losses[-1] < losses[0]


def test_what_is_saved_stands_alone(base, source, llama_dir: Path, tmp_path: Path, ids):
    model = started(base, llama_dir, source)
    train_steps(model, ids, steps=1)
    model.save_pretrained(tmp_path / "trained")
    for file in source.iterdir():
        file.unlink()
    config = json.loads((tmp_path / "trained" / "adapter_config.json").read_text())
    assert config["init_weights"] is True
    loaded = PeftModel.from_pretrained(base.load(llama_dir), str(tmp_path / "trained"))
    assert torch.equal(logits(loaded, ids), logits(model.eval(), ids))


@pytest.mark.slow
def test_a_trainer_starts_from_it(source, base, llama_dir: Path, tmp_path: Path, ids):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    texts = Dataset.from_dict({"text": ["One and one is two."] * 4})
    trainer = SFTTrainer(
        base.load(llama_dir),
        args=SFTConfig(**{**TRAINING, "learning_rate": 0.0}, output_dir=str(tmp_path / "out"), max_steps=1),
        train_dataset=texts,
        processing_class=byte_tokenizer(),
        peft_config=SGRQConfig(init_weights=source, task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    expected = PeftModel.from_pretrained(base.load(llama_dir), str(source))
    loaded = PeftModel.from_pretrained(base.load(llama_dir), str(tmp_path / "trained"))
    assert torch.equal(logits(loaded, ids), logits(expected, ids))


def test_the_callers_config_can_be_used_again(base, source, llama_dir: Path):
    config = SGRQConfig(init_weights=str(source), task_type="CAUSAL_LM")
    first, second = (deltas(get_peft_model(base.load(llama_dir), config)) for _ in range(2))
    assert config.init_weights == str(source)
    assert config.selection is None
    assert all(delta.any() and torch.equal(delta, second[name]) for name, delta in first.items())


def test_a_larger_selection_holds_the_saved_one(base, source, llama_dir: Path, ids):
    everything = adapted(base, llama_dir, ratio=1.0, random=False).peft_config["default"].selection
    model = started(base, llama_dir, source, selection=everything)
    expected = PeftModel.from_pretrained(base.load(llama_dir), str(source))
    assert torch.equal(logits(model.eval(), ids), logits(expected, ids))
    assert model.num_parameters(only_trainable=True) > sum(delta.numel() for delta in deltas(expected).values())


def test_a_selection_that_would_lose_deltas_is_refused(source, base, llama_dir: Path):
    selection = dict(adapted(base, llama_dir).peft_config["default"].selection)
    name = "model.layers.0.mlp.down_proj"
    scaled_weight = dict(adapted(base, llama_dir).named_modules())[f"base_model.model.{name}"].scaled_weight
    groups = decode_mask(selection[name], scaled_weight.selectable)
    others = torch.tensor(sorted(set(range(scaled_weight.selectable)) - set(groups.tolist())))
    selection[name] = encode_mask(others, scaled_weight.selectable)
    model = base.load(llama_dir)
    with pytest.raises(ValueError, match=f"selects other groups of layer '{name}'"):
        get_peft_model(model, SGRQConfig(init_weights=source, selection=selection))
    assert not any("sgrq" in parameter for parameter, _ in model.named_parameters())


def test_another_ratio_is_not_taken_silently(source, base, llama_dir: Path, caplog):
    started(base, llama_dir, source)
    assert not caplog.text
    started(base, llama_dir, source, ratio=0.1)
    assert "ratio 0.1 is not used" in caplog.text


def test_another_group_size_is_refused(llama_dir: Path, tmp_path: Path):
    saved = adapted(DENSE, llama_dir, group_size=8)
    saved.peft_config["default"].base_fingerprint = None
    saved.save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=r"give the config the adapter's group size \(8\)"):
        started(DENSE, llama_dir, tmp_path / "source", group_size=16)


def test_layers_left_out_are_named(source, base, llama_dir: Path):
    with pytest.raises(ValueError, match="changes 12 layers that the config does not target"):
        started(base, llama_dir, source, target_modules=["q_proj"])


def test_further_layers_start_at_zero(base, llama_dir: Path, tmp_path: Path, ids):
    part = adapted(base, llama_dir, target_modules=["q_proj"])
    part.save_pretrained(tmp_path / "part")
    model = started(base, llama_dir, tmp_path / "part")
    assert torch.equal(logits(model.eval(), ids), logits(part, ids))
    assert len(deltas(model)) == 14


def test_another_base_is_refused(source, base, llama_dir: Path):
    other = NF4 if base is INT8 else INT8
    with pytest.raises(ValueError, match=r"trained on"):
        started(other, llama_dir, source)


def test_an_adapter_of_another_type_is_refused(base, llama_dir: Path, tmp_path: Path):
    get_peft_model(base.load(llama_dir), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match=r"type PeftType\.LORA, expected SGRQ"):
        started(base, llama_dir, tmp_path / "lora")


def test_a_folder_that_is_not_there_is_named(base, llama_dir: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"adapter of `init_weights` '.*nowhere' is no folder"):
        started(base, llama_dir, tmp_path / "nowhere")


def test_whole_modules_are_not_started_from(base, llama_dir: Path, tmp_path: Path):
    adapted(base, llama_dir, modules_to_save=["lm_head"]).save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="expected scales alone"):
        started(base, llama_dir, tmp_path / "whole")


@pytest.mark.parametrize("value", [None, 1, ["folder"]])
def test_what_names_no_adapter_is_refused(value):
    with pytest.raises(TypeError, match="`init_weights` is"):
        SGRQConfig(init_weights=value)
