"""Ways in which the deltas of a model change, each a function of the model and an empty directory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from support.bases import DENSE, INT8, NF4, NF4_NESTED, logits
from torch import nn

from peft_sgrq import SGRQConfig

kinds = pytest.mark.parametrize("base", [NF4, NF4_NESTED, INT8, DENSE], ids=lambda base: base.name)


def deltas(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if "sgrq_delta" in name]


def computed_anew(model: PeftModel, ids: torch.Tensor) -> torch.Tensor:
    """The logits by another way, which uses no cache: written into the scales of the base."""
    active = model.active_adapters
    model.merge_adapter(active)
    expected = logits(model, ids)
    model.unmerge_adapter()
    return expected


def frozen(model: PeftModel) -> PeftModel:
    """The model as it is when it is loaded for inference."""
    return model.requires_grad_(False)


def by_optimizer(model: PeftModel, directory: Path) -> None:
    optimizer = torch.optim.AdamW(deltas(model), lr=0.1)
    for delta in deltas(model):
        delta.grad = torch.randn_like(delta)
    optimizer.step()  # in eval mode, no forward pass with gradients


def by_fused_optimizer(model: PeftModel, directory: Path) -> None:
    optimizer = torch.optim.AdamW(deltas(model), lr=0.1, fused=True)  # the Trainer's default
    for delta in deltas(model):
        delta.grad = torch.randn_like(delta)
    optimizer.step()


def by_training_in_eval_mode(model: PeftModel, directory: Path) -> None:
    ids = torch.randint(3, 256, (2, 9))
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.AdamW(deltas(model), lr=0.1, fused=True).step()


def by_in_place_change(model: PeftModel, directory: Path) -> None:
    with torch.no_grad():
        for delta in deltas(model):
            delta.neg_()


def by_averaging(model: PeftModel, directory: Path) -> None:
    for delta in deltas(model):
        delta.data.mul_(0.4).add_(torch.ones_like(delta) / 10)  # as TRL's SyncRefModelCallback, on a frozen reference


def by_new_data(model: PeftModel, directory: Path) -> None:
    for delta in deltas(model):
        delta.data = torch.randn_like(delta) / 10


def by_load_state_dict(model: PeftModel, directory: Path) -> None:
    model.load_state_dict(
        {key: -value if "weight" in key else value for key, value in only_deltas(model)}, strict=False
    )


def by_assigned_state_dict(model: PeftModel, directory: Path) -> None:
    state = {key: -value if "weight" in key else value for key, value in only_deltas(model)}
    model.load_state_dict(state, strict=False, assign=True)


def only_deltas(model: PeftModel) -> list[tuple[str, torch.Tensor]]:
    return [(key, value) for key, value in model.state_dict().items() if "sgrq_delta" in key]


def by_peft_state_dict(model: PeftModel, directory: Path) -> None:
    state = get_peft_model_state_dict(model)
    set_peft_model_state_dict(model, {key: -value if "weight" in key else value for key, value in state.items()})


def by_another_adapter(model: PeftModel, directory: Path) -> None:
    model.add_adapter("b", SGRQConfig(init_weights=False))
    model.set_adapter("b")


def by_a_second_adapter(model: PeftModel, directory: Path) -> None:
    model.add_adapter("b", SGRQConfig(init_weights=False))
    model.base_model.set_adapter(["default", "b"])


def by_an_adapter_of_the_same_name(model: PeftModel, directory: Path) -> None:
    config = model.peft_config["default"]
    model.delete_adapter("default")
    model.add_adapter("default", config)
    model.set_adapter("default")


def by_moving(model: PeftModel, directory: Path) -> None:
    by_new_data(model, directory)
    model.to("cpu", torch.bfloat16)


def by_training(model: PeftModel, directory: Path) -> None:
    model.train()
    for delta in deltas(model):
        delta.data.mul_(-1)
    model.eval()


OPTIMIZERS = [by_optimizer, by_fused_optimizer, by_training_in_eval_mode]
OTHERS = [value for name, value in list(globals().items()) if name.startswith("by_") and value not in OPTIMIZERS]
