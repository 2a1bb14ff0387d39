"""Rotated models, few bits and bits by layer are tuned, recovered and calibrated as any other model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from support.bases import logits
from support.rotated_models import assert_same, state
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_sgrq import SGRQConfig, allocate_bits, calibrate, load_rotated, quantize, recover, rotate

pytest.importorskip("compressed_tensors")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The model has online rotations")]


def dense(directory: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def rotated(directory: Any) -> Any:
    model = dense(directory)
    rotate(model, rotations=("R1", "R2", "R3", "R4"))
    return model


@pytest.fixture(scope="module", params=["rotated, W4A4KV4", "planned"])
def case(request, llama_dir, tmp_path_factory) -> tuple[Any, Any]:
    """A quantized checkpoint, and what makes the dense model it was quantized from."""
    folder = tmp_path_factory.mktemp("quantized")
    make = rotated if request.param != "planned" else dense
    model, scheme = make(llama_dir), "W4A4KV4"
    if request.param == "planned":
        data = [torch.randint(3, 256, (8, 20), generator=torch.Generator().manual_seed(2))]
        scheme = allocate_bits(model, data, bits=3.2, progress=False)
        scheme.layers = {name: 2 + at % 3 for at, name in enumerate(scheme.layers)}  # all widths
    quantize(model, scheme).save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama_dir).save_pretrained(folder)
    return folder, lambda: make(llama_dir)


def test_a_trainer_tunes_them_and_what_is_merged_is_what_was_trained(case, ids, tmp_path):
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        load_rotated(case[0]),
        args=SFTConfig(
            tmp_path, max_steps=8, max_length=32, bf16=False, use_cpu=True, report_to="none", learning_rate=3e-2,
            per_device_train_batch_size=4, logging_steps=1, seed=0,
        ),
        train_dataset=Dataset.from_dict({"text": ["one two three four"] * 16}),
        processing_class=AutoTokenizer.from_pretrained(case[0]),
        peft_config=SGRQConfig(task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    tuned = trainer.model.eval()
    assert all(delta.abs().max() > 0 for delta in tuned.parameters() if delta.requires_grad)
    unmerged = logits(tuned, ids)
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load_rotated(tmp_path / "merged").eval(), ids), unmerged)


def test_recovery_brings_them_nearer_to_what_they_were(case, ids):
    reference = case[1]()
    data = [torch.randint(3, 256, (16, 20), generator=torch.Generator().manual_seed(3))]
    found = recover(load_rotated(case[0]), reference, data, epochs=5, batch_size=4, progress=False)
    assert all(block.after < 0.9 * block.before for block in found.blocks)


@pytest.mark.parametrize("criterion", ["obs", "fisher"])
def test_their_scales_are_calibrated_and_the_selection_is_trained(criterion, case, ids):
    config, model = SGRQConfig(ratio=0.5, task_type="CAUSAL_LM"), load_rotated(case[0])
    names, before = [name for name, _ in model.named_modules()], state(model)
    saliency = calibrate(model, config, [ids % 256], criterion=criterion, progress=False)
    assert_same(model, before)
    assert [name for name, _ in model.named_modules()] == names
    assert all(layer.scores.sum() > 0 for layer in saliency.layers.values())
    adapted = get_peft_model(model, config).eval()
    assert torch.equal(logits(adapted, ids), logits(load_rotated(case[0]).eval(), ids))
    adapted(input_ids=ids, labels=ids).loss.backward()
    gradients = [delta.grad for delta in adapted.parameters() if delta.requires_grad]
    assert gradients and all(gradient.abs().sum() > 0 for gradient in gradients)
