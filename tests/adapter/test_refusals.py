"""An adapter replaced in place is the new one entirely; what does not fit is refused with a sentence that helps."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from support.bases import DENSE, INT8, NF4, NF4_NESTED, Base, adapted, logits
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from peft_sgrq import SGRQConfig

FILE = "adapter_model.safetensors"
FP4 = Base("fp4", False, torch.float32)
NF4_BF16 = Base("nf4", False, torch.bfloat16)
DOWN = "model.layers.0.mlp.down_proj"  # it has two groups, so that ratio 0.5 leaves one unselected
KEY = f"base_model.model.{DOWN}.sgrq_delta.weight"


def save(model: PeftModel, directory: Path) -> Path:
    model.save_pretrained(directory)
    return directory


def other_groups(model: PeftModel) -> dict[str, str]:
    """A selection as large as the model's, of other groups where there are others."""
    swapped = {"80": "40", "40": "80"}
    config = model.peft_config["default"]
    return {name: swapped[mask] if name.endswith("down_proj") else mask for name, mask in config.selection.items()}


def change(directory: Path, **tensors: torch.Tensor) -> None:
    save_file({**load_file(directory / FILE), **tensors}, directory / FILE, metadata={"format": "pt"})


@pytest.fixture
def model(llama_dir: Path) -> PeftModel:
    return adapted(NF4, llama_dir)


@pytest.fixture
def directory(model: PeftModel, tmp_path: Path) -> Path:
    return save(model, tmp_path / "adapter")


# replaced in place


@pytest.mark.parametrize("base", [NF4, NF4_NESTED, INT8, DENSE], ids=lambda base: base.name, indirect=True)
def test_an_adapter_is_replaced_in_place(base: Base, llama_dir: Path, tmp_path: Path, ids):
    old, new = adapted(base, llama_dir), adapted(base, llama_dir)
    with torch.no_grad():
        for parameter in new.parameters():
            if parameter.requires_grad:
                parameter.mul_(-0.5)
    assert not torch.equal(logits(old, ids), logits(new, ids))
    objects = [parameter for parameter in old.parameters() if parameter.requires_grad]
    old.load_adapter(save(new, tmp_path / "new"), "default")
    assert torch.equal(logits(old, ids), logits(new, ids))
    after = [parameter for parameter in old.parameters() if parameter.requires_grad]
    assert len(after) == 14 and list(map(id, after)) == list(map(id, objects))


def replaced(model: PeftModel, llama_dir: Path, tmp_path: Path) -> tuple[PeftModel, PeftModel]:
    """The model with its adapter replaced by one that selects other groups, and the model that one is from."""
    new = adapted(NF4, llama_dir, selection=other_groups(model))
    assert new.peft_config["default"].selection != model.peft_config["default"].selection
    model.load_adapter(save(new, tmp_path / "new"), "default")
    return model, new


def test_a_replacing_adapter_brings_its_selection(model, llama_dir: Path, tmp_path: Path, ids):
    before = logits(model, ids)
    old, new = replaced(model, llama_dir, tmp_path)
    assert torch.equal(logits(old, ids), logits(new, ids)) and not torch.equal(logits(old, ids), before)
    again = save(old, tmp_path / "again")
    assert SGRQConfig.from_pretrained(str(again)).selection == new.peft_config["default"].selection
    tensors, expected = load_file(again / FILE), load_file(tmp_path / "new" / FILE)
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    assert torch.equal(logits(PeftModel.from_pretrained(NF4.load(llama_dir), again), ids), logits(new, ids))


def test_a_copy_of_a_replaced_adapter_selects_what_it_selects(model, llama_dir: Path, tmp_path: Path, ids):
    old, new = replaced(model, llama_dir, tmp_path)
    old.add_adapter("ref", old.peft_config["default"])  # as TRL makes its reference
    for name, parameter in old.named_parameters():
        if ".default." in name:
            old.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    old.set_adapter("ref")
    assert torch.equal(logits(old, ids), logits(new, ids))


def test_a_replaced_adapter_merges_as_the_new_one(model, llama_dir: Path, tmp_path: Path, ids):
    old, new = replaced(model, llama_dir, tmp_path)
    assert torch.equal(logits(old.merge_and_unload().eval(), ids), logits(new, ids))


@pytest.mark.parametrize(("old", "new"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_an_adapter_of_another_dtype_replaces_one_exactly(old, new, llama_dir: Path, tmp_path: Path, ids):
    model = adapted(NF4, llama_dir, adapter_dtype=old)
    other = adapted(NF4, llama_dir, adapter_dtype=new)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "sgrq_delta" in name:
                parameter.mul_(-1.1)
    model.load_adapter(save(other, tmp_path), "default")
    assert model.peft_config["default"].adapter_dtype == new
    assert torch.equal(logits(model, ids), logits(other, ids))


def test_a_selection_of_another_size_cannot_replace_one(model, llama_dir: Path, tmp_path: Path, ids):
    before = logits(model, ids)
    larger = save(adapted(NF4, llama_dir, ratio=1.0), tmp_path / "larger")
    with pytest.raises((RuntimeError, ValueError), match=r"shape \(64, 2\), expected \(64, 1\).*new adapter name"):
        model.load_adapter(larger, "default")
    assert torch.equal(logits(model, ids), before)


def test_deltas_changed_behind_autograd_are_seen(model, ids):
    before = logits(model, ids)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(-0.5)  # as many callbacks do, such as averages of the weights
    assert not torch.equal(logits(model, ids), before)


# wrong bases


def other_weights(llama_dir: Path, directory: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(-1)
    model.save_pretrained(directory)
    return directory


def wrong_base(kind: str, llama_dir: Path, tmp_path: Path) -> torch.nn.Module:
    if kind == "merged":
        return adapted(NF4, llama_dir).merge_and_unload().eval()
    if kind == "weights":
        return NF4.load(other_weights(llama_dir, tmp_path / "other"))
    return {"fp4": FP4, "int8": INT8, "dense": DENSE, "nested": NF4_NESTED, "bfloat16": NF4_BF16}[kind].load(llama_dir)


WRONG = {
    "weights": r"'model\.layers\.1\.mlp\.up_proj' has other weights.*\(1 of 14 layers differ\)",
    "merged": r"has the codes but not the scales.*merged into it already.*\(14 of 14 layers differ\)",
    "nested": r"has the codes but not the scales",
    "fp4": r"is quantized with bitsandbytes \(fp4-64\), expected quantized with bitsandbytes \(nf4-64\)",
    "int8": r"is quantized with bitsandbytes \(int8-row\), expected quantized with bitsandbytes \(nf4-64\)",
    "dense": r"is not quantized .*, expected quantized with bitsandbytes \(nf4-64\)",
    "bfloat16": r"has other weights|has the codes but not the scales",
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_base_is_refused_and_stays_as_it_is(kind, model, directory, llama_dir: Path, tmp_path: Path, ids):
    wrong = wrong_base(kind, llama_dir, tmp_path)
    before = logits(wrong, ids)
    for load in (lambda: PeftModel.from_pretrained(wrong, directory), lambda: wrong.load_adapter(str(directory))):
        with pytest.raises(ValueError, match="The adapter does not fit this base: .*" + WRONG[kind]) as caught:
            load()
        assert "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4'" in str(caught.value)
        assert "config.base_fingerprint = None" in str(caught.value)
        assert torch.equal(logits(wrong, ids), before)
        assert not [name for name, _ in wrong.named_modules() if "sgrq" in name]


@pytest.mark.parametrize("base", [NF4, NF4_BF16, NF4_NESTED, INT8], ids=lambda base: base.name, indirect=True)
def test_the_printed_code_loads_the_right_base(base: Base, llama_dir: Path, tmp_path: Path, ids):
    model = adapted(base, llama_dir)
    where = save(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"load the base with AutoModelForCausalLM") as caught:
        AutoPeftModelForCausalLM.from_pretrained(where)
    code = re.search(r"load the base with (Auto.*\)\))\.", str(caught.value))[1]
    names = {"AutoModelForCausalLM": AutoModelForCausalLM, "BitsAndBytesConfig": BitsAndBytesConfig}
    loaded = PeftModel.from_pretrained(eval(code, names).eval(), where)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


@pytest.mark.parametrize("kind", ["weights", "merged", "nested", "bfloat16", "fp4"])
def test_a_wrong_base_can_be_forced(kind, model, directory, llama_dir: Path, tmp_path: Path, ids):
    config = SGRQConfig.from_pretrained(str(directory))
    config.base_fingerprint = None
    wrong = wrong_base(kind, llama_dir, tmp_path)
    before = logits(wrong, ids)
    forced = PeftModel.from_pretrained(wrong, directory, config=config)
    after = logits(forced, ids)
    assert not torch.equal(after, before)
    other = wrong_base(kind, llama_dir, tmp_path)
    other.load_adapter(str(directory), peft_config=config)
    assert torch.equal(logits(other, ids), after)
    # From then on the adapter belongs to that base.
    again = PeftModel.from_pretrained(wrong_base(kind, llama_dir, tmp_path), save(forced, tmp_path / "forced"))
    assert torch.equal(logits(again, ids), after)


def test_an_adapter_of_missing_layers_is_refused(directory, llama_dir: Path):
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    for field in ("selection", "base_fingerprint"):
        config[field]["model.layers.2.mlp.up_proj"] = config[field]["model.layers.1.mlp.up_proj"]
    path.write_text(json.dumps(config))
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    again = {key.replace("layers.1", "layers.2"): t.clone() for key, t in tensors.items() if "1.mlp.up_proj" in key}
    save_file(tensors | again, file)
    with pytest.raises(ValueError, match=r"does not have.*'model\.layers\.2\.mlp\.up_proj'"):
        PeftModel.from_pretrained(NF4.load(llama_dir), directory)


# broken files


def by_peft(base: torch.nn.Module, directory: Path) -> torch.nn.Module:
    return PeftModel.from_pretrained(base, directory)


def by_peft_low(base: torch.nn.Module, directory: Path) -> torch.nn.Module:
    return PeftModel.from_pretrained(base, directory, low_cpu_mem_usage=True)


def by_transformers(base: torch.nn.Module, directory: Path) -> torch.nn.Module:
    base.load_adapter(str(directory))
    return base


LOADERS = [by_peft, by_peft_low, by_transformers]


@pytest.mark.parametrize(
    ("load", "keep"),
    [
        *((by_peft, keep) for keep in (0, 7, 100, 0.5, -1)),
        (by_peft_low, 0.5),
        (by_transformers, 0),
        (by_transformers, -1),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_a_truncated_file_is_refused(load, keep, directory, llama_dir: Path):
    whole = (directory / FILE).read_bytes()
    cut = whole[: int(len(whole) * keep) if isinstance(keep, float) else keep]
    (directory / FILE).write_bytes(cut)
    # transformers opens the file itself, and asks the config of an adapter nothing.
    error, text = (
        (SafetensorError, "Error while deserializing header")
        if load is by_transformers
        else (ValueError, rf"{FILE} is truncated or corrupt: found {len(cut)} bytes")
    )
    with pytest.raises(error, match=text):
        load(NF4.load(llama_dir), directory)


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_delta_that_is_no_number_is_refused(load, value, directory, llama_dir: Path):
    weight = load_file(directory / FILE)[KEY]
    weight[5, 0] = value
    change(directory, **{KEY: weight})
    with pytest.raises((RuntimeError, ValueError), match="NaN or infinite deltas, expected finite"):
        load(NF4.load(llama_dir), directory)


@pytest.mark.parametrize("load", LOADERS)
def test_a_delta_of_a_wrong_shape_is_refused(load, directory, llama_dir: Path):
    change(directory, **{KEY: torch.zeros(64, 2)})
    # transformers' own error refers to a report it logs.
    text = "ignore_mismatched_sizes" if load is by_transformers else rf"{DOWN}\.sgrq_delta\D*64, 2\D*64, 1"
    with pytest.raises((RuntimeError, ValueError), match=text):
        load(NF4.load(llama_dir), directory)


@pytest.mark.parametrize("load", LOADERS)
def test_a_selection_of_a_wrong_size_is_refused(load, directory, llama_dir: Path):
    change(directory, **{KEY.replace("weight", "selection"): torch.tensor([0xC0], dtype=torch.uint8)})
    with pytest.raises((RuntimeError, ValueError), match="selection"):
        load(NF4.load(llama_dir), directory)


@pytest.mark.parametrize("mask", ["c0", "00", "20", "8000", ""])
def test_a_config_with_another_selection_than_the_file_is_refused(mask, directory, llama_dir: Path):
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    config["selection"][DOWN] = mask
    path.write_text(json.dumps(config))
    with pytest.raises((RuntimeError, ValueError), match=DOWN.replace(".", r"\.")):
        PeftModel.from_pretrained(NF4.load(llama_dir), directory)
