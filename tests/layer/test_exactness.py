"""Zero change is no change, merged equals unmerged, unmerge restores, and codes never change: bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from support.bases import BASES, DENSE, NF4, NF4_NESTED, Base, adapted, logits, train_steps
from support.single_layers import adapt, conv1d, linear_4bit, linear_8bit, linear_dense, the_layer

from peft_sgrq import SGRQConfig, SGRQLinear

GPT2_BASES = [DENSE, Base("dense", False, torch.bfloat16), NF4]


@pytest.fixture(
    params=[("llama", base) for base in BASES] + [("gpt2", base) for base in GPT2_BASES],
    ids=lambda param: f"{param[0]}-{param[1].name}",
)
def model_and_base(request, llama_dir, gpt2_dir) -> tuple[Path, Base]:
    """The directory of a tiny Llama or GPT-2 (whose layers are Conv1D), and how to load it."""
    name, base = request.param
    return (llama_dir if name == "llama" else gpt2_dir), base


def layers(model: Any) -> dict[str, SGRQLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SGRQLinear)}


def tensors(layer: Any) -> dict[str, torch.Tensor]:
    """Every tensor object a base layer holds: parameters, quantization state, int8 codes and scales."""
    found = dict(layer.named_parameters())
    for owner in (layer.weight, getattr(layer, "state", None), getattr(layer.weight, "quant_state", None)):
        found |= {f"{type(owner).__name__}.{key}": value for key, value in getattr(owner, "__dict__", {}).items()}
    second = getattr(getattr(layer.weight, "quant_state", None), "state2", None)
    found |= {f"state2.{key}": value for key, value in getattr(second, "__dict__", {}).items()}
    found.pop("MatmulLtState.idx", None)  # the outlier columns of the last batch, not part of the layer
    return {key: value for key, value in found.items() if isinstance(value, torch.Tensor)}


def same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[key].dtype == value.dtype and torch.equal(found[key], value) for key, value in expected.items()
    )


def copies(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in found.items()}


def test_zero_delta_gives_the_bits_of_the_base(model_and_base, ids):
    directory, base = model_and_base
    plain, model = base.load(directory), adapted(base, directory, random=False)
    assert torch.equal(logits(model, ids), logits(plain, ids))
    assert torch.equal(logits(model, ids[:1, :1]), logits(plain, ids[:1, :1]))
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)  # the path with gradients
    # In training mode int8 computes by another kernel; the dropout of GPT-2 would hide that.
    if "llama" in plain.config.model_type:
        assert torch.equal(logits(model.train(), ids), logits(plain.train(), ids))


def test_merged_equals_unmerged(model_and_base, ids):
    directory, base = model_and_base
    plain, model = base.load(directory), adapted(base, directory)
    unmerged = logits(model, ids), logits(model, ids[:1, :1])
    assert not torch.allclose(unmerged[0], logits(plain, ids), atol=0.1), "the adapter must change something"
    assert torch.equal(model(input_ids=ids).logits, unmerged[0])  # the path with gradients
    model.merge_adapter()
    assert torch.equal(logits(model, ids), unmerged[0])
    assert torch.equal(logits(model, ids[:1, :1]), unmerged[1])
    model.unmerge_adapter()
    assert torch.equal(logits(model, ids), unmerged[0])


def test_merged_equals_unmerged_in_training_mode(base, llama_dir, ids):
    model = adapted(base, llama_dir)
    train_steps(model, ids)
    unmerged = logits(model.train(), ids)
    model.merge_adapter()
    assert torch.equal(logits(model, ids), unmerged)


@pytest.mark.parametrize("base", [NF4_NESTED, DENSE], ids=lambda base: base.name)
def test_merged_generates_the_tokens_of_unmerged(base, llama_dir, ids):
    model = adapted(base, llama_dir)
    generated = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    assert not torch.equal(generated, base.load(llama_dir).generate(input_ids=ids, max_new_tokens=8, do_sample=False))
    assert torch.equal(model.merge_and_unload().generate(input_ids=ids, max_new_tokens=8, do_sample=False), generated)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32], ids=str)
def test_merged_equals_unmerged_with_codes_stored_as_floats(storage):
    # bnb_4bit_quant_storage, which FSDP needs.
    model = adapt(linear_4bit(8, 192, nested=True, storage=storage)).eval()
    codes, x = the_layer(model).base_layer.weight.data.view(torch.uint8).clone(), torch.randn(3, 192)
    expected = model(x)
    model.merge_adapter()
    assert torch.equal(model(x), expected)
    assert torch.equal(the_layer(model).base_layer.weight.data.view(torch.uint8), codes)


def test_an_input_that_bitsandbytes_cannot_compute_with_is_refused():
    model, x = adapt(linear_4bit(8, 128)).eval().double(), torch.randn(2, 1, 128, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(2):
            with pytest.raises(ValueError, match=r"torch.float64, the dtype of its input .* expected"):
                model(x)
    layer = linear_4bit(8, 128)
    layer.compute_dtype, layer.compute_type_is_set = torch.float32, True
    model = adapt(layer).eval().double()
    unmerged = [model(x) for _ in range(3)]  # the later ones by a decoder
    model.merge_adapter()
    assert all(torch.equal(y, model(x)) for y in unmerged)


def test_merged_equals_unmerged_with_outlier_columns():
    model = adapt(linear_8bit(8, 192, threshold=2.0)).eval()
    x = torch.randn(5, 192)
    assert (x.abs() > 2).any()
    expected = model(x)
    model.merge_adapter()
    assert torch.equal(model(x), expected)


def test_several_adapters_merge_together_or_one_after_another(base, llama_dir, ids):
    model = adapted(base, llama_dir)
    model.add_adapter("b", SGRQConfig(init_weights=False, ratio=0.7))
    model.base_model.set_adapter(["default", "b"])
    both = logits(model, ids)
    for merges in ([["default", "b"]], [["default"], ["b"]], [["b"], ["default"]]):
        for names in merges:
            model.merge_adapter(names)
        assert torch.equal(logits(model, ids), both)
        model.unmerge_adapter()
    assert torch.equal(logits(model, ids), both)


def test_unmerge_restores_the_very_same_tensors(model_and_base, ids):
    directory, base = model_and_base
    model = adapted(base, directory)
    with model.disable_adapter():
        logits(model, ids)  # the first forward call of an int8 base moves its scales
    before = {name: tensors(layer.base_layer) for name, layer in layers(model).items()}
    values = {name: copies(found) for name, found in before.items()}
    model.merge_adapter()
    logits(model, ids)
    assert all(not same_tensors(tensors(layer.base_layer), values[name]) for name, layer in layers(model).items())
    model.unmerge_adapter()
    for name, layer in layers(model).items():
        after = tensors(layer.base_layer)
        assert all(after[key] is tensor for key, tensor in before[name].items()), name
        assert same_tensors(after, values[name]), name


def test_a_merged_model_can_be_converted_and_unmerged(llama_dir, ids):
    model, expected = adapted(DENSE, llama_dir), adapted(DENSE, llama_dir).to(torch.bfloat16)
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    assert {parameter.dtype for parameter in layers(model).popitem()[1].base_layer.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(model, ids), logits(expected, ids))


def test_merging_and_unmerging_leaves_names_of_parameters_and_state(base, llama_dir):
    model = adapted(base, llama_dir)
    parameters, state = {name for name, _ in model.named_parameters()}, copies(model.state_dict())
    model.merge_adapter()
    assert {name for name, _ in model.named_parameters()} == parameters
    if not base.nested:  # nested scales have other names than plain ones
        assert model.state_dict().keys() == state.keys()
    model.unmerge_adapter()
    assert same_tensors(model.state_dict(), state)


def test_a_thousand_cycles_change_nothing(base, llama_dir, ids):
    model = adapted(base, llama_dir, target_modules=["layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"])
    expected, state = logits(model, ids), copies(model.state_dict())
    for _ in range(1000):
        for layer in layers(model).values():
            layer.merge()
        for layer in layers(model).values():
            layer.unmerge()
    assert same_tensors(model.state_dict(), state)
    assert torch.equal(logits(model, ids), expected)
    model.merge_adapter()
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("kind", ["nf4", "nf4-nested", "fp4", "int8", "dense", "dense-bfloat16", "ragged", "conv1d"])
def test_codes_and_unselected_scales_never_change(kind):
    layer = {
        "nf4": lambda: linear_4bit(8, 320),
        "nf4-nested": lambda: linear_4bit(8, 320, nested=True),
        "fp4": lambda: linear_4bit(8, 320, "fp4"),
        "int8": lambda: linear_8bit(8, 320),
        "dense": lambda: linear_dense(8, 320),
        "dense-bfloat16": lambda: linear_dense(8, 320, dtype=torch.bfloat16),
        "ragged": lambda: linear_dense(8, 300),
        "conv1d": lambda: conv1d(8, 320),
    }[kind]()

    def weight() -> torch.Tensor:
        if hasattr(layer.weight, "quant_state"):
            return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        if kind == "int8":
            scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
            return layer.weight.data * scales.unsqueeze(1)
        return layer.weight.detach().T if kind == "conv1d" else layer.weight.detach()

    selected = [1, 4]
    before, codes = weight().clone(), layer.weight.detach().clone()
    model = adapt(layer, selected).eval()
    model.merge_adapter()
    after = weight()
    changed = torch.zeros(8 if kind == "int8" else 5, dtype=torch.bool)
    changed[selected] = True
    if kind == "int8":
        assert torch.equal(after[~changed], before[~changed])
        assert (after[changed] != before[changed]).any(1).all()
    else:
        columns = changed.repeat_interleave(64)[: before.shape[1]]
        assert torch.equal(after[:, ~columns], before[:, ~columns])
        assert (after[:, columns] != before[:, columns]).any(0).all()
    if layer.weight.dtype in (torch.uint8, torch.int8):
        assert torch.equal(layer.weight.detach(), codes)


def test_merge_and_unload_leaves_a_plain_model_with_the_same_logits(model_and_base, ids):
    directory, base = model_and_base
    model = adapted(base, directory)
    expected = logits(model, ids)
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged, ids), expected)
    assert [type(module) for module in merged.modules()] == [type(module) for module in base.load(directory).modules()]
    assert not any("sgrq" in name for name, _ in merged.named_parameters())


def test_unload_gives_the_base_back(model_and_base, ids):
    directory, base = model_and_base
    plain = base.load(directory)
    state, expected = copies(plain.state_dict()), logits(plain, ids)
    model = adapted(base, directory)
    logits(model, ids)
    unloaded = model.unload()
    assert torch.equal(logits(unloaded, ids), expected)
    assert same_tensors(unloaded.state_dict(), state)


def test_a_disabled_adapter_gives_the_bits_of_the_base(model_and_base, ids):
    directory, base = model_and_base
    plain, model = base.load(directory), adapted(base, directory)
    expected = logits(model, ids)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(plain, ids))
    assert torch.equal(logits(model, ids), expected)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(plain, ids))


@pytest.mark.parametrize("merged_before", [False, True], ids=["unmerged", "merged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unnesting_is_exact_and_recorded(llama_dir, ids, tmp_path, dtype, merged_before):
    base = Base("nf4", True, dtype)
    model = adapted(base, llama_dir, random=False)
    expected = logits(model, ids)
    if merged_before:
        model.merge_adapter()
    merged = model.merge_and_unload()
    states = [module.weight.quant_state for module in merged.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert states and not any(state.nested for state in states)
    assert all(state.absmax.dtype == torch.float32 for state in states)
    assert torch.equal(logits(merged, ids), expected)
    merged.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert saved["bnb_4bit_use_double_quant"] is False
    assert merged.config.quantization_config.bnb_4bit_use_double_quant is False
