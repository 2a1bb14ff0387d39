"""Deltas are one parameter for as long as they live: no cast changes their bits, or takes away what hooks them."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from support.bases import DENSE, INT8, NF4, Base, adapted
from torch import nn

from peft_sgrq import SGRQConfig
from peft_sgrq.layer.delta import DeltaParameter


def deltas(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if "sgrq_delta" in name]


# Ways an adapter comes into a model, of a base and of the folder of an adapter.


def by_get_peft_model(base: Base, llama_dir: Path, directory: Path) -> Any:
    return adapted(base, llama_dir)


def by_from_pretrained(base: Base, llama_dir: Path, directory: Path) -> Any:
    return PeftModel.from_pretrained(base.load(llama_dir), directory, is_trainable=True)


def by_low_memory(base: Base, llama_dir: Path, directory: Path) -> Any:
    return PeftModel.from_pretrained(base.load(llama_dir), directory, is_trainable=True, low_cpu_mem_usage=True)


def by_transformers(base: Base, llama_dir: Path, directory: Path) -> Any:
    model = base.load(llama_dir)
    model.load_adapter(str(directory), is_trainable=True)
    return model


def by_injection(base: Base, llama_dir: Path, directory: Path) -> Any:
    model = inject_adapter_in_model(SGRQConfig(ratio=0.5), base.load(llama_dir), low_cpu_mem_usage=True)
    set_peft_model_state_dict(model, load_peft_weights(str(directory)), low_cpu_mem_usage=True)
    return model


def by_assigning(base: Base, llama_dir: Path, directory: Path) -> Any:
    model = adapted(base, llama_dir)
    state = {key: value.bfloat16() for key, value in model.state_dict().items() if "sgrq_delta" in key}
    model.load_state_dict(state, strict=False, assign=True)
    return model


def by_copying(base: Base, llama_dir: Path, directory: Path) -> Any:
    return copy.deepcopy(adapted(base, llama_dir))


def by_pickling(base: Base, llama_dir: Path, directory: Path) -> Any:
    file = io.BytesIO()
    torch.save(
        nn.ModuleList(
            module
            for module in adapted(base, llama_dir).modules()
            if hasattr(module, "dtype") and type(module).__name__ == "Delta"
        ),
        file,
    )
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = [value for name, value in list(globals().items()) if name.startswith("by_")]


def through_data(model: nn.Module) -> None:
    for parameter in deltas(model):
        parameter.data = parameter.data.to(torch.bfloat16)  # as TRL's trainers do


CASTS: dict[str, Callable[[nn.Module], Any]] = {
    "data": through_data,
    "half": lambda model: [module.half() for module in model.modules() if type(module).__name__ == "Delta"],
    "to": lambda model: [module.to(torch.bfloat16) for module in model.modules() if type(module).__name__ == "Delta"],
    "train": lambda model: model.train().eval().train(),
    "saving": lambda model: model.state_dict(),
}


@pytest.fixture(scope="module")
def saved(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for base in (NF4, INT8, DENSE):
        found[base.name] = tmp_path_factory.mktemp(base.name)
        adapted(base, llama_dir).save_pretrained(found[base.name])
    return found


@pytest.mark.parametrize("base", [NF4, INT8, DENSE], ids=lambda base: base.name)
@pytest.mark.parametrize("way", WAYS)
def test_no_cast_changes_deltas_or_loses_what_hooks_their_gradients(way, base: Base, saved, llama_dir: Path):
    """DistributedDataParallel hooks the accumulators of gradients."""
    model = way(base, llama_dir, saved[base.name])
    found = deltas(model) or list(model.parameters())
    assert found and all(type(parameter) is DeltaParameter for parameter in found)
    before, called = [parameter.detach().clone() for parameter in found], []
    nodes = []  # the accumulator lives as long as something holds it
    for parameter in found:
        parameter.requires_grad_(True)
        nodes.append(parameter.expand_as(parameter).grad_fn.next_functions[0][0])
        nodes[-1].register_hook(lambda *grads, one=parameter: called.append(one))
    for cast in CASTS.values():
        cast(model)
        assert all(parameter.dtype == torch.float32 for parameter in found)
        assert all(map(torch.equal, found, before))
    sum(parameter.sum() for parameter in found).backward()
    assert len(called) == len(found)


def test_other_values_are_taken_whatever_their_dtype():
    parameter = DeltaParameter(torch.zeros(3, 2))
    for values in (torch.ones(3, 2, dtype=torch.bfloat16), torch.full((3, 2), 0.5, dtype=torch.float64)):
        parameter.data = values
        assert parameter.dtype == torch.float32 and torch.equal(parameter.detach(), values.float())
    parameter.data = torch.empty(0)  # as an engine does that keeps the values elsewhere
    assert parameter.shape == (0,)
    parameter.data = torch.randn(3, 2)
    kept = parameter.detach().clone()
    parameter.data = torch.full((3, 2), float("nan"), dtype=torch.float16)
    assert parameter.isnan().all() and not kept.isnan().any()


def test_a_delta_parameter_is_a_parameter_to_torch():
    parameter = DeltaParameter(torch.randn(3, 2, dtype=torch.float64), requires_grad=False)
    assert isinstance(parameter, nn.Parameter) and parameter.dtype == torch.float32 and not parameter.requires_grad
    twin = copy.deepcopy(parameter)
    assert type(twin) is DeltaParameter and torch.equal(twin, parameter) and twin.data_ptr() != parameter.data_ptr()
    parameter.data.mul_(2)
    assert torch.equal(parameter, 2 * twin)
    assert type(parameter + 1) is torch.Tensor and type(parameter.data) is torch.Tensor
