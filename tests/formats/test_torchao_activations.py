"""torchao layers that quantize activations in several ways are told apart, in memory, on files and in printed code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.bases import DENSE, logits
from support.single_layers import adapt, the_layer
from torch import nn
from transformers import AutoModelForCausalLM, TorchAoConfig

from peft_sgrq import SGRQConfig, merge_checkpoint
from peft_sgrq.formats.loading import quantization_code
from peft_sgrq.formats.registry import resolve_weight

torchao = pytest.importorskip("torchao.quantization")


def quantizing(kind: str) -> Any:
    from torchao.quantization.granularity import PerTensor

    asymmetric = {"act_mapping_type": torchao.MappingType.ASYMMETRIC} if "asymmetric" in kind else {}
    if "dynamic" in kind:
        return torchao.Int8DynamicActivationInt8WeightConfig(**asymmetric)
    scale, zero = torch.tensor([[0.03]]), torch.tensor([[3]], dtype=torch.int8)
    fixed = {"act_quant_scale": scale, **({"act_quant_zero_point": zero} if asymmetric else {})}
    return torchao.Int8StaticActivationInt8WeightConfig(**fixed, **asymmetric, granularity=PerTensor())


def layer(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64)).requires_grad_(False)
    torchao.quantize_(model, quantizing(kind))
    return model[0].requires_grad_(False)


@pytest.mark.parametrize("kind", ["dynamic", "dynamic-asymmetric", "static", "static-asymmetric"])
def test_activations_are_rounded_as_in_the_base_and_gradients_pass(kind):
    base, x, dy = layer(kind), torch.randn(5, 128, requires_grad=True), torch.randn(5, 64)
    assert resolve_weight(base, 64).name.endswith(f"-{kind}")
    model = adapt(layer(kind), init_weights=True, ratio=1.0).eval()
    assert torch.equal(model(x), base(x))
    with torch.no_grad():
        the_layer(model).sgrq_delta["default"].weight.normal_(std=0.1)
    y = model.train()(x)
    (y * dy).sum().backward()
    adapted, delta = the_layer(model), the_layer(model).sgrq_delta["default"].weight
    weight = adapted.scaled_weight.dequantize(adapted.effective_scales(("default",)), torch.float32)
    torch.testing.assert_close(x.grad, dy @ weight)
    changes = dy.t() @ adapted.scaled_weight.computed_input(x.detach()) * weight / (1 + delta)
    expected = changes.sum(1, keepdim=True) if delta.shape[0] == 64 else changes.sum().view(1, 1)
    torch.testing.assert_close(delta.grad, expected, rtol=1e-4, atol=1e-4)
    model.merge_adapter()
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("kind", ["dynamic", "dynamic-asymmetric"])
def test_the_code_that_is_printed_quantizes_activations_likewise(kind):
    code = quantization_code(resolve_weight(layer(kind), 64).quantization() or {})
    names: dict[str, Any] = {}
    for library, used in code.names.items():
        exec(f"from {library} import {', '.join(used)}", names)
    torch.manual_seed(0)
    names["base"] = nn.Sequential(nn.Linear(128, 64))
    exec("\n".join(code.statements), names)
    x = torch.randn(5, 128)
    assert torch.equal(names["base"](x), layer(kind)(x))


def test_no_code_is_printed_that_would_round_otherwise():
    assert str(quantization_code(resolve_weight(layer("static"), 64).quantization() or {})) == ""


def test_an_adapter_is_refused_where_activations_are_quantized_otherwise(llama_dir, tmp_path, ids):
    def load(kind: str, directory: Any = llama_dir) -> Any:
        settings = {"quantization_config": TorchAoConfig(quantizing(kind))} if directory is llama_dir else {}
        return AutoModelForCausalLM.from_pretrained(directory, dtype=DENSE.dtype, **settings).eval()

    load("dynamic-asymmetric").save_pretrained(tmp_path / "base")
    config = SGRQConfig(task_type="CAUSAL_LM", init_weights=False)
    model = get_peft_model(load("", tmp_path / "base"), config).eval()
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert torch.equal(logits(load("", tmp_path / "merged"), ids), logits(model, ids))
    with pytest.raises(ValueError, match=r"int8-row-dynamic\), expected .*int8-row-dynamic-asymmetric"):
        PeftModel.from_pretrained(load("dynamic"), tmp_path / "adapter")
