"""A calibrated config goes where any config goes, and other ratios cost nothing."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
from peft import PeftConfig, PeftModel, get_peft_model
from support.bases import DENSE, INT8, NF4, NF4_NESTED, TRAINING, Base, byte_tokenizer
from support.calibration import TEXTS, run

from peft_sgrq import Saliency, SGRQConfig, calibrate
from peft_sgrq.layer.masks import decode_mask, encode_mask
from peft_sgrq.selection.ratio import select_top


@pytest.mark.slow
@pytest.mark.parametrize("base", [NF4_NESTED, INT8, DENSE], ids=lambda base: base.name)
@pytest.mark.parametrize("ratio", [0.3, "knee", "global"])
def test_a_calibrated_config_goes_through_a_trainer_unchanged(base: Base, ratio, llama_dir: Path, tmp_path: Path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    config = SGRQConfig(ratio=ratio, group_size=16, budget=0.9, ratio_pattern={"o_proj": 1.0}, task_type="CAUSAL_LM")
    tokenizer = byte_tokenizer()
    model = base.load(llama_dir)
    saliency = calibrate(model, config, TEXTS, tokenizer, progress=False)
    expected = saliency.select(ratio, {"o_proj": 1.0}, 0.9)
    assert config.selection == expected and config.criterion == "diag" and config.ratio == ratio
    given = copy.deepcopy(config)
    trainer = SFTTrainer(
        model,
        args=SFTConfig(**TRAINING, output_dir=str(tmp_path), max_steps=2, max_length=32),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
        peft_config=config,
    )
    trainer.train()
    assert replace(config, base_model_name_or_path=None) == given  # PEFT writes that
    trainer.model.save_pretrained(tmp_path / "adapter")
    saved = PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert saved.selection == expected and saved.ratio == ratio and saved.criterion == "diag"
    loaded = PeftModel.from_pretrained(base.load(llama_dir), tmp_path / "adapter")
    for name, mask in expected.items():
        layer = loaded.get_submodule(f"base_model.model.{name}")
        assert layer.sgrq_delta["default"].units.tolist() == decode_mask(mask, layer.scaled_weight.selectable).tolist()


def test_another_ratio_costs_nothing(llama_dir: Path, tmp_path: Path):
    config = SGRQConfig(ratio=0.2, group_size=16, task_type="CAUSAL_LM")
    model = DENSE.load(llama_dir)
    saliency = run(model, config=config)
    saliency.save(tmp_path / "saliency.safetensors")
    loaded = Saliency.load(tmp_path / "saliency.safetensors")
    other = SGRQConfig(group_size=16, task_type="CAUSAL_LM")
    assert loaded.configure(other, ratio=0.75) is other and other.ratio == 0.75
    for name, scores in saliency.scores.items():
        count = round(0.75 * len(scores) / 16)
        groups = select_top(scores.view(-1, 16).sum(1), count)
        assert other.selection[name] == encode_mask(groups, len(scores) // 16)
    peft_model = get_peft_model(model, other)
    assert peft_model.peft_config["default"].selection == other.selection


@pytest.mark.parametrize(
    "config, warned", [({}, True), ({"ratio": 0.4}, False), ({"ratio_pattern": {"q": 0.4}}, False)]
)
def test_a_ratio_that_leaves_nothing_to_select_is_pointed_out(config, warned, llama_dir: Path, caplog):
    calibrate(DENSE.load(llama_dir), SGRQConfig(group_size=16, **config), criterion="magnitude", progress=False)
    assert ("every scale is trained whatever its saliency" in caplog.text) == warned


def test_a_config_of_fewer_layers_takes_those_of_the_saliency(llama_dir: Path):
    model = DENSE.load(llama_dir)
    saliency = run(model)
    config = saliency.configure(SGRQConfig(target_modules=["q_proj"], group_size=16))
    assert list(config.selection) == [f"model.layers.{index}.self_attn.q_proj" for index in range(2)]
    get_peft_model(model, config)
    with pytest.raises(ValueError, match=r"targets none of the 14 layers"):
        saliency.configure(SGRQConfig(target_modules=["c_attn"]))


@pytest.mark.parametrize("ratio", ["knee", "global", 0.3])
def test_named_ratios_work_on_magnitudes_without_calibration(ratio, llama_dir: Path):
    model = DENSE.load(llama_dir)
    saliency = calibrate(model, SGRQConfig(group_size=16), criterion="magnitude", progress=False)
    config = SGRQConfig(ratio=ratio, group_size=16, budget=0.6, ratio_pattern={"v_proj": 1.0})
    selection = get_peft_model(model, config).peft_config["default"].selection
    assert selection == saliency.select(ratio, {"v_proj": 1.0}, 0.6)
    assert config.selection is None  # the caller's config stays as it is


@pytest.mark.parametrize("base", [NF4, INT8, DENSE], ids=lambda base: base.name)
def test_layerwise_ratios_are_found_kept_and_saved(base: Base, llama_dir: Path, tmp_path: Path):
    config = SGRQConfig(ratio="layerwise", budget=0.95, group_size=16, task_type="CAUSAL_LM")
    model = base.load(llama_dir)
    found = calibrate(model, config, TEXTS, byte_tokenizer(), progress=False)
    assert list(found.ratios) == list(found.layers) and found.seconds["ratios"] > 0
    layers = found.layers.items()
    spent = sum(layer.scales_per_group * found.counts("layerwise")[name] for name, layer in layers)
    assert spent <= 0.95 * sum(layer.scales_per_group * layer.selectable for _, layer in layers)
    assert config.selection == found.select(found.ratios) and config.ratio == "layerwise"
    found.save(tmp_path / "s.safetensors")
    assert Saliency.load(tmp_path / "s.safetensors").select("layerwise") == config.selection
    get_peft_model(model, config)
