"""A saved adapter gives the outputs it was saved with, however it is loaded, and nothing else loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from support.bases import DENSE, INT8, NF4, NF4_NESTED, Base, adapted, byte_tokenizer, logits
from transformers import AutoModelForCausalLM, pipeline

from peft_sgrq import SGRQConfig

FILE = "adapter_model.safetensors"
NF4_BF16 = Base("nf4", True, torch.bfloat16)
SOURCES = [NF4, NF4_NESTED, NF4_BF16, INT8, DENSE]
BITS = 1e-3 / 3  # a number with more bits than bfloat16 has


def deltas(model: torch.nn.Module, adapter: str = "default") -> dict[str, torch.Tensor]:
    marker = f".sgrq_delta.{adapter}.weight"
    return {
        name.removeprefix("base_model.model.").removesuffix(marker): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if name.endswith(marker)
    }


def same_adapter(model: torch.nn.Module, saved: torch.nn.Module, adapter: str = "default") -> bool:
    found, expected = deltas(model, adapter), deltas(saved)
    assert {value.dtype for value in found.values()} == {torch.float32}
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def load_kwargs(base: Base) -> dict[str, Any]:
    return {"dtype": base.dtype, **({"quantization_config": base.quantization} if base.quantization else {})}


@pytest.fixture(params=SOURCES, ids=lambda base: base.name)
def source(request: pytest.FixtureRequest) -> Base:
    return request.param


@pytest.fixture
def saved(source: Base, llama_dir: Path, tmp_path: Path) -> tuple[PeftModel, Path]:
    """A model with a random adapter, and where it is saved."""
    model = adapted(source, llama_dir)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(BITS)
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


@pytest.fixture
def nf4_saved(llama_dir: Path, tmp_path: Path) -> tuple[PeftModel, Path]:
    model = adapted(NF4, llama_dir)
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


# PEFT


@pytest.mark.parametrize("kwargs", [{}, {"low_cpu_mem_usage": True}, {"is_trainable": True}], ids=str)
def test_peft_loads_what_was_saved(kwargs, source: Base, saved, llama_dir: Path, ids):
    model, directory = saved
    loaded = PeftModel.from_pretrained(source.load(llama_dir), directory, **kwargs)
    loaded.eval()
    assert torch.equal(logits(loaded, ids), logits(model, ids)) and same_adapter(loaded, model)
    trained = any(parameter.requires_grad for parameter in loaded.parameters())
    assert trained == kwargs.get("is_trainable", False)
    assert loaded.peft_config["default"].selection == model.peft_config["default"].selection


def test_a_second_adapter_leaves_the_first_alone(source: Base, saved, llama_dir: Path, tmp_path: Path, ids):
    model, directory = saved
    torch.manual_seed(1)
    two = adapted(source, llama_dir, init_weights=True, ratio=1.0)
    expected = logits(two, ids)
    for low in (False, True):
        name = f"other{low}"
        two.load_adapter(directory, adapter_name=name, low_cpu_mem_usage=low)
        assert torch.equal(logits(two, ids), expected)
        two.set_adapter(name)
        assert torch.equal(logits(two, ids), logits(model, ids)) and same_adapter(two, model, name)
        two.set_adapter("default")
    assert torch.equal(logits(two, ids), expected)
    two.save_pretrained(tmp_path / "two", selected_adapters=["otherFalse"])
    again = load_file(tmp_path / "two" / "otherFalse" / FILE)
    assert all(torch.equal(value, again[key]) for key, value in load_file(directory / FILE).items())


def test_the_file_holds_deltas_and_selections_and_nothing_else(saved):
    model, directory = saved
    assert {path.name for path in directory.iterdir()} == {"adapter_config.json", FILE, "README.md"}
    tensors = load_file(directory / FILE)
    expected = deltas(model)
    for name, value in expected.items():
        key = f"base_model.model.{name}.sgrq_delta."
        assert torch.equal(tensors.pop(key + "weight"), value)
        mask = tensors.pop(key + "selection")
        assert mask.dtype == torch.uint8
        assert mask.numpy().tobytes().hex() == model.peft_config["default"].selection[name]
    assert not tensors


def test_bfloat16_halves_the_file_and_loses_nothing(source: Base, llama_dir: Path, tmp_path: Path, ids):
    kinds = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    expected, sizes = {}, {}
    for name, dtype in kinds.items():
        model = adapted(source, llama_dir, adapter_dtype=dtype)
        with torch.no_grad():
            next(parameter for parameter in model.parameters() if parameter.requires_grad).add_(BITS)
        expected[name] = logits(model, ids)
        model.save_pretrained(tmp_path / name)
        tensors = {key: value for key, value in load_file(tmp_path / name / FILE).items() if key.endswith("weight")}
        assert {value.dtype for value in tensors.values()} == {dtype}
        sizes[name] = sum(value.numel() * value.element_size() for value in tensors.values())
        loaded = PeftModel.from_pretrained(source.load(llama_dir), tmp_path / name)
        assert torch.equal(logits(loaded, ids), expected[name])
        assert {value.dtype for value in deltas(loaded).values()} == {torch.float32}
    assert sizes["float32"] == 2 * sizes["bfloat16"]
    assert not torch.equal(expected["float32"], expected["bfloat16"])


# Auto classes and transformers


def test_auto_peft_quantizes_the_base_on_the_fly(source: Base, saved, ids):
    model, directory = saved
    loaded = AutoPeftModelForCausalLM.from_pretrained(directory, **load_kwargs(source)).eval()
    assert torch.equal(logits(loaded, ids), logits(model, ids)) and same_adapter(loaded, model)


@pytest.mark.parametrize("source", [NF4, NF4_BF16, INT8], indirect=True, ids=lambda base: base.name)
def test_auto_classes_need_no_arguments_on_a_prequantized_base(source: Base, llama_dir: Path, tmp_path: Path, ids):
    source.load(llama_dir).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = adapted(source, tmp_path / "base")
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    assert type(plain).__name__ == "LlamaForCausalLM" and not torch.equal(logits(plain.eval(), ids), expected)
    for auto in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        assert torch.equal(logits(auto.from_pretrained(tmp_path / "adapter").eval(), ids), expected)
    pipe = pipeline("text-generation", model=str(tmp_path / "adapter"), dtype="auto")
    assert torch.equal(logits(pipe.model.eval(), ids), expected) and same_adapter(pipe.model, model)


def by_load_adapter(base: Base, llama_dir: Path, directory: Path) -> Any:
    model = base.load(llama_dir)
    model.load_adapter(str(directory))
    return model


def by_from_pretrained(base: Base, llama_dir: Path, directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, **load_kwargs(base)).eval()


def by_pipeline(base: Base, llama_dir: Path, directory: Path) -> Any:
    kwargs = load_kwargs(base)
    return pipeline("text-generation", str(directory), dtype=kwargs.pop("dtype"), model_kwargs=kwargs).model.eval()


def by_state_dict(base: Base, llama_dir: Path, directory: Path) -> Any:
    model, config = base.load(llama_dir), PeftConfig.from_pretrained(str(directory))
    state = {key.removeprefix("base_model.model."): value for key, value in load_file(directory / FILE).items()}
    inject_adapter_in_model(config, model, state_dict=state)
    result = set_peft_model_state_dict(model, state)
    assert not result.unexpected_keys
    return model


@pytest.mark.parametrize("load", [by_load_adapter, by_from_pretrained, by_pipeline, by_state_dict])
def test_transformers_loads_what_was_saved(load, source: Base, saved, llama_dir: Path, ids):
    model, directory = saved
    loaded = load(source, llama_dir, directory)
    assert torch.equal(logits(loaded, ids), logits(model, ids)) and same_adapter(loaded, model)


def test_injection_by_a_state_dict_alone_adapts_its_layers(nf4_saved, llama_dir: Path, ids):
    model, _ = nf4_saved
    state = get_peft_model_state_dict(model)
    state = {key.removeprefix("base_model.model."): value for key, value in state.items() if ".layers.0." in key}
    plain = NF4.load(llama_dir)
    inject_adapter_in_model(SGRQConfig(ratio=0.5), plain, state_dict=state)
    set_peft_model_state_dict(plain, state)
    found, expected = deltas(plain), deltas(model)
    assert found.keys() == {name for name in expected if ".layers.0." in name}
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_transformers_adds_enables_disables_and_deletes(source: Base, llama_dir: Path, tmp_path: Path, ids):
    model = source.load(llama_dir)
    base = logits(model, ids)
    model.add_adapter(SGRQConfig(ratio=0.5, init_weights=False), adapter_name="first")
    model.add_adapter(SGRQConfig(ratio=0.5, init_weights=False), adapter_name="second")
    second = logits(model, ids)
    model.set_adapter("first")
    first = logits(model, ids)
    assert not torch.equal(first, second) and not torch.equal(first, base)
    model.disable_adapters()
    assert torch.equal(logits(model, ids), base)
    model.enable_adapters()
    assert torch.equal(logits(model, ids), first)
    model.delete_adapter("second")
    assert torch.equal(logits(model, ids), first) and not deltas(model, "second")
    assert {value.dtype for value in deltas(model, "first").values()} == {torch.float32}
    model.save_pretrained(tmp_path / "first")
    assert PeftConfig.from_pretrained(str(tmp_path / "first")).selection
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "first", **load_kwargs(source)).eval()
    assert torch.equal(logits(again, ids), first)


def test_a_loaded_adapter_is_saved_with_the_same_bytes(saved, source: Base, llama_dir: Path, tmp_path: Path):
    _, directory = saved
    before = load_file(directory / FILE)
    for model in (
        by_load_adapter(source, llama_dir, directory),
        PeftModel.from_pretrained(source.load(llama_dir), directory),
    ):
        model.save_pretrained(tmp_path / type(model).__name__)
        again = load_file(tmp_path / type(model).__name__ / FILE)
        assert again.keys() == before.keys() and all(torch.equal(again[key], before[key]) for key in again)
        configs = [SGRQConfig.from_pretrained(str(place)) for place in (tmp_path / type(model).__name__, directory)]
        assert configs[0] == configs[1]
