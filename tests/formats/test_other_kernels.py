"""GPTQ, AWQ and AutoRound models that were loaded without a word about kernels are tuned, calibrated and loaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from support.bases import logits
from support.packed_checkpoints import CHECKPOINTS
from transformers import AutoModelForCausalLM

from peft_sgrq import SGRQConfig, calibrate, split_groups
from peft_sgrq.base.loading_arguments import loading_arguments
from peft_sgrq.formats.registry import runs_on_trainable_kernel

pytestmark = pytest.mark.slow

NAMES = ("gptq-4bit", "awq-4bit", "autoround-4bit")
each = pytest.mark.parametrize(
    "checkpoint", [found for found in CHECKPOINTS if found.name in NAMES], ids=lambda found: found.name
)


@pytest.fixture(autouse=True)
def uncompiled(eager) -> None:
    """Kernels are compiled in test_packed_models.py."""


def load(checkpoint: Any, directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=checkpoint.dtype).eval()


@each
def test_every_way_of_loading_gives_the_bits_of_the_kernel_that_was_chosen(
    checkpoint, packed_checkpoints, ids, tmp_path
):
    checkpoint.require()
    base = packed_checkpoints[checkpoint.name]
    config = SGRQConfig(task_type="CAUSAL_LM", init_weights=False)
    torch.manual_seed(1)
    chosen = get_peft_model(checkpoint.load(base), config).eval()
    torch.manual_seed(1)
    model = get_peft_model(load(checkpoint, base), config).eval()
    assert all(runs_on_trainable_kernel(module) for module in model.modules())
    tuned = logits(chosen, ids)
    assert torch.equal(logits(model, ids), tuned)
    model.save_pretrained(tmp_path / "adapter")
    for cls in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        loaded = cls.from_pretrained(tmp_path / "adapter", dtype=checkpoint.dtype).eval()
        assert torch.equal(logits(loaded, ids), tuned)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(checkpoint.load(tmp_path / "merged"), ids), tuned)


@each
def test_calibrating_and_splitting_take_such_a_model(checkpoint, packed_checkpoints):
    checkpoint.require()
    base = packed_checkpoints[checkpoint.name]
    data = [{"input_ids": list(range(3, 40))}]
    config = SGRQConfig(ratio=0.5)
    assert calibrate(load(checkpoint, base), config, data).layers
    assert all(runs_on_trainable_kernel(module) for module in split_groups(load(checkpoint, base), 32).modules())


@each
def test_commands_and_scripts_choose_the_kernel_at_once(checkpoint, packed_checkpoints):
    checkpoint.require()
    base = packed_checkpoints[checkpoint.name]
    model = AutoModelForCausalLM.from_pretrained(base, **loading_arguments(str(base)))
    assert all(runs_on_trainable_kernel(module) for module in model.modules())


@pytest.mark.parametrize("checkpoint", [found for found in CHECKPOINTS if found.name == "gptq-4bit"], ids=["gptq"])
def test_a_checkpoint_that_has_gone_is_refused_with_the_argument_that_loads_it(
    checkpoint, packed_checkpoints, tmp_path
):
    checkpoint.require()
    base = tmp_path / "base"
    shutil.copytree(packed_checkpoints[checkpoint.name], base)
    model = load(checkpoint, base)
    shutil.rmtree(base)
    if all(runs_on_trainable_kernel(module) for module in model.modules()):
        pytest.skip("GPTQModel chooses the kernel that can be trained through on this machine")
    with pytest.raises(ValueError, match="GPTQConfig"):
        get_peft_model(model, SGRQConfig(task_type="CAUSAL_LM"))
