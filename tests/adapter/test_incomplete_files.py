"""The file of an adapter holds what its config says, or it is refused: in memory, as a start and on files alike."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_sgrq import SGRQConfig, merge_checkpoint

LAYER = "base_model.model.model.layers.0.mlp.down_proj.sgrq_delta"
Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def without(ending: str) -> Change:
    return lambda tensors: {key: value for key, value in tensors.items() if not key.startswith(LAYER + ending)}


def of_dtype(dtype: torch.dtype) -> Change:
    return lambda tensors: tensors | {f"{LAYER}.weight": tensors[f"{LAYER}.weight"].to(dtype)}


CHANGES: dict[str, tuple[Change, str]] = {
    "a layer": (without(""), "no deltas for 1 of the 14 layers"),
    "deltas": (without(".weight"), "no deltas for 1 of the 14 layers"),
    "everything": (lambda tensors: {"other": torch.zeros(1)}, "no deltas for 14 of the 14 layers"),
    "integers": (of_dtype(torch.int32), "expected float32, bfloat16 or float16"),
    "float8": (of_dtype(torch.float8_e4m3fn), "expected float32, bfloat16 or float16"),
}


def load(base: Path, adapter: Path, out: Path, **kwargs: Any) -> None:
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, **kwargs)


def load_empty(base: Path, adapter: Path, out: Path) -> None:
    load(base, adapter, out, low_cpu_mem_usage=True)


def start(base: Path, adapter: Path, out: Path) -> None:
    config = SGRQConfig(task_type="CAUSAL_LM", init_weights=str(adapter))
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)


WAYS = [load, load_empty, start, merge_checkpoint]


@pytest.mark.parametrize("lost", CHANGES)
@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_is_not_what_its_config_says_is_refused(way, lost, nested, tmp_path):
    change, said = CHANGES[lost]
    shutil.copytree(nested[1], tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(ValueError, match=said):
        way(nested[0], tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
