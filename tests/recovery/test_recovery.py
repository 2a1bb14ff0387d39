"""Recovery brings a quantized model nearer to what it was, by an adapter like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.bases import INT8, NF4, NF4_NESTED, Base, logits, train_steps
from support.rounded_models import deltas, full, recovered, rounded, sequences
from torch.nn import functional as F
from transformers.masking_utils import create_causal_mask

from peft_sgrq import SGRQConfig
from peft_sgrq.layer.linear import SGRQLinear
from peft_sgrq.passes.data import load_batches
from peft_sgrq.recovery import block_by_block
from peft_sgrq.recovery.block_training import squared_error, train_block
from peft_sgrq.recovery.descent import LEAST_DELTA
from peft_sgrq.recovery.distillation import Distilling

pytestmark = pytest.mark.slow


@torch.no_grad()
def hidden_states(model: Any, batch: Any) -> tuple[torch.Tensor, ...]:
    return model(**batch.inputs, output_hidden_states=True).hidden_states


def relative_error(found: torch.Tensor, expected: torch.Tensor, counted: torch.Tensor) -> float:
    return float((found - expected)[counted].square().sum() / expected[counted].square().sum())


def test_the_error_of_every_block_and_of_the_logits_falls(llama_dir: Path):
    ids = torch.tensor([row["input_ids"][:20] for row in sequences()])
    before = (logits(rounded(llama_dir), ids) - logits(full(llama_dir), ids)).norm()
    found = recovered(llama_dir, epochs=10)
    assert len(found.blocks) == 2
    assert all(block.after < 0.8 * block.before for block in found.blocks)
    assert (logits(found.model.eval(), ids) - logits(full(llama_dir), ids)).norm() < 0.9 * before


@pytest.mark.parametrize("base", [NF4, NF4_NESTED, INT8], ids=lambda base: base.name)
def test_every_kind_of_base_is_recovered(base, llama_dir: Path):
    found = recovered(llama_dir, base.load(llama_dir), learning_rate=5e-3)
    assert all(block.after < block.before for block in found.blocks)


def test_conv1d_blocks_are_recovered(gpt2_dir: Path):
    from transformers.pytorch_utils import Conv1D

    model = full(gpt2_dir)
    for module in model.modules():
        if isinstance(module, Conv1D):
            module.weight.data = (module.weight * 4).round() / 4
    (block,) = recovered(gpt2_dir, model).blocks
    assert block.after < block.before


def test_errors_are_those_of_plain_forward_passes(llama_dir: Path):
    """The block's inputs are those of the recovered blocks before it; only counted tokens are in the errors."""
    found = recovered(llama_dir)
    (batch,) = load_batches(sequences(), batch_size=12)
    ours = hidden_states(found.model.eval(), batch)
    with found.model.disable_adapter():
        plain = hidden_states(found.model, batch)
    theirs = hidden_states(full(llama_dir), batch)
    assert found.blocks[0].before == pytest.approx(relative_error(plain[1], theirs[1], batch.counted), rel=1e-4)
    assert found.blocks[0].after == pytest.approx(relative_error(ours[1], theirs[1], batch.counted), rel=1e-4)
    for name, module in found.model.named_modules():  # what block 1 gave before it was trained
        if isinstance(module, SGRQLinear) and ".layers.1." in name:
            module.sgrq_delta["default"].weight.data.zero_()
    captured: list[torch.Tensor] = []
    block = found.model.base_model.model.model.layers[1]
    handle = block.register_forward_hook(lambda module, args, output: captured.append(output))
    hidden_states(full(llama_dir), batch)
    hidden_states(found.model, batch)
    handle.remove()
    expected = full(llama_dir)
    reference: list[torch.Tensor] = []
    expected.model.layers[1].register_forward_hook(lambda module, args, output: reference.append(output))
    hidden_states(expected, batch)
    assert found.blocks[1].before == pytest.approx(relative_error(captured[0], reference[0], batch.counted), rel=1e-4)


def test_padding_does_not_count(llama_dir: Path):
    data = sequences()
    longest = max(len(row["input_ids"]) for row in data)
    padded = [
        {
            "input_ids": row["input_ids"] + [9] * (longest + 3 - len(row["input_ids"])),
            "attention_mask": [1] * len(row["input_ids"]) + [0] * (longest + 3 - len(row["input_ids"])),
        }
        for row in data
    ]
    # The order of equally long rows is that of the data, so sort as recovery does.
    order = sorted(range(len(data)), key=lambda index: -len(data[index]["input_ids"]))
    found = deltas(recovered(llama_dir, data=data).model)
    other = deltas(recovered(llama_dir, data=[padded[index] for index in order]).model)
    for name, delta in found.items():
        torch.testing.assert_close(delta, other[name], atol=2e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("base", [NF4, INT8], ids=lambda base: base.name)
def test_the_adapter_merges_exactly_and_is_saved_and_loaded(base, llama_dir: Path, tmp_path: Path, ids):
    found = recovered(llama_dir, base.load(llama_dir), distill_steps=2)
    expected = logits(found.model.eval(), ids)
    found.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base.load(llama_dir), str(tmp_path))
    assert torch.equal(logits(loaded, ids), expected)
    assert torch.equal(logits(loaded.merge_and_unload(), ids), expected)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["blocks", "distillation"])
def test_no_scale_loses_its_sign_however_large_the_steps(how, llama_dir: Path, monkeypatch):
    if how == "blocks":
        found = recovered(llama_dir, learning_rate=0.5, epochs=10)
    else:
        measured = iter([2.0, 1.0])  # so that such steps are not undone
        monkeypatch.setattr(Distilling, "measure", lambda self: next(measured))
        found = recovered(llama_dir, epochs=0, distill_steps=3, distill_learning_rate=5.0)
    smallest = min(float(delta.min()) for delta in deltas(found.model).values())
    assert smallest > -1
    assert smallest == pytest.approx(LEAST_DELTA)


def test_a_block_that_got_worse_stays_as_it_was(llama_dir: Path):
    found = recovered(llama_dir, learning_rate=50.0)
    assert all(block.after == block.before for block in found.blocks)
    assert not any(delta.any() for delta in deltas(found.model).values())


def test_only_selected_scales_change(llama_dir: Path):
    config = SGRQConfig(ratio=0.3, group_size=16, task_type="CAUSAL_LM")
    found = recovered(llama_dir, config=config)
    trained = found.model.base_model.model.model.layers[0].mlp.down_proj
    groups = trained.sgrq_delta["default"].units
    assert len(groups) == 2
    assert trained.sgrq_delta["default"].weight.all()
    assert all(block.after < block.before for block in found.blocks)


@pytest.mark.slow
def test_recovery_is_repeatable(llama_dir: Path):
    first, second = (deltas(recovered(llama_dir, distill_steps=2).model) for _ in range(2))
    for name, delta in first.items():
        assert torch.equal(delta, second[name])


def test_distillation_lowers_the_divergence(llama_dir: Path):
    data = sequences(count=4)
    found = recovered(llama_dir, data=data, epochs=0, distill_steps=15, distill_learning_rate=2e-2)
    assert not found.blocks
    (batch,) = load_batches(data, batch_size=4)
    with torch.no_grad():
        ours = F.log_softmax(rounded(llama_dir)(**batch.inputs).logits.double(), -1)[batch.counted]
        theirs = F.log_softmax(full(llama_dir)(**batch.inputs).logits.double(), -1)[batch.counted]
    divergence = float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    assert found.distillation.before == pytest.approx(divergence, rel=1e-4)
    assert found.distillation.steps[0] == pytest.approx(divergence, rel=1e-4)
    with torch.no_grad():
        ours = F.log_softmax(found.model(**batch.inputs).logits.double(), -1)[batch.counted]
    divergence = float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    assert found.distillation.after == pytest.approx(divergence, rel=1e-4)
    assert found.distillation.after < 0.8 * found.distillation.before


def test_distillation_that_went_wrong_is_undone(llama_dir: Path, caplog):
    found = recovered(llama_dir, epochs=1, distill_steps=2, distill_learning_rate=3.0)
    assert "was undone" in caplog.text
    for name, delta in deltas(recovered(llama_dir, epochs=1).model).items():
        assert torch.equal(delta, deltas(found.model)[name])


def test_logits_a_model_masks_do_not_count_and_others_must_be_finite(llama_dir: Path):
    def masked(model: Any, value: float) -> Any:
        def fill(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            return output.index_fill(-1, torch.tensor([3, 4]), value)

        model.lm_head.register_forward_hook(fill)
        return model

    options = {"epochs": 0, "distill_steps": 3, "data": sequences(4)}
    found = recovered(
        llama_dir, masked(rounded(llama_dir), -torch.inf), masked(full(llama_dir), -torch.inf), **options
    )
    assert found.distillation.after < found.distillation.before
    model = masked(rounded(llama_dir), torch.inf)
    with pytest.raises(ValueError, match="divergence of next-token probabilities is nan"):
        recovered(llama_dir, model, **options)


def test_the_augmented_loss_has_the_gradient_of_its_formula(llama_dir: Path, monkeypatch):
    """`|f_q(X_q) - f(X)|^2 + |f_q(X_q) - f(X_q)|^2`: the second target is the reference's block on the same input."""
    seen = []

    def spy(run: Any, targets: Any, counted: Any, deltas: Any, *args: Any) -> bool:
        weights = [delta.weight for delta in deltas]
        with torch.enable_grad():
            loss = squared_error(run(0), targets[0], counted[0])
        seen.append((weights, torch.autograd.grad(loss, weights)))
        return train_block(run, targets, counted, deltas, *args)

    monkeypatch.setattr(block_by_block, "train_block", spy)
    data = sequences(count=4)
    found = recovered(llama_dir, data=data, augmented=True)
    (batch,) = load_batches(data, batch_size=4)
    model, reference = found.model.base_model.model, full(llama_dir)
    inputs: list[torch.Tensor] = []
    for one in (model, reference):
        one.model.layers[1].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    weights, gradients = seen[1]
    with torch.no_grad():
        for weight in weights:
            weight.zero_()  # as when the training of this block began
        for one in (model, reference):
            one(**batch.inputs)
    rotary = model.model.rotary_emb(inputs[0], torch.arange(inputs[0].shape[1])[None])
    mask = create_causal_mask(model.config, inputs[0], batch.inputs["attention_mask"], past_key_values=None)

    def block(one: Any, hidden: torch.Tensor) -> torch.Tensor:
        return one.model.layers[1](hidden, attention_mask=mask, position_embeddings=rotary)

    with torch.no_grad():
        targets = [block(reference, inputs[1]), block(reference, inputs[0])]
    output = block(model, inputs[0])[batch.counted]
    loss = sum((output - target[batch.counted]).square().sum() for target in targets)
    for expected, gradient in zip(torch.autograd.grad(loss, weights), gradients, strict=True):
        torch.testing.assert_close(2 * gradient, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_int8_layers_with_outliers_are_recovered(dtype, llama_dir: Path):
    """bitsandbytes touches the inputs of int8 layers in eval mode, which autograd minds."""
    base = Base("int8", False, dtype)
    model = base.load(llama_dir)
    for block in model.model.layers:
        block.input_layernorm.weight.data.mul_(8)
    reference = full(llama_dir)
    for block in reference.model.layers:
        block.input_layernorm.weight.data.mul_(8)
    found = recovered(llama_dir, model, reference, learning_rate=1e-3)
    assert all(block.after <= block.before for block in found.blocks)
    assert any(block.after < block.before for block in found.blocks)


def test_blocks_that_are_not_finite_are_named(llama_dir: Path):
    model = rounded(llama_dir)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="Outputs are not finite"):
        recovered(llama_dir, model)


def test_blocks_that_did_not_get_better_are_reported(llama_dir: Path, caplog):
    recovered(llama_dir, learning_rate=50.0)
    assert "2 blocks did not get better" in caplog.text


def test_layers_that_are_never_called_are_left_alone(llama_dir: Path):
    def with_unused(model: Any) -> Any:
        model.model.layers[0].unused_proj = torch.nn.Linear(64, 64)
        return model

    config = SGRQConfig(ratio=1.0, group_size=16, target_modules=["unused_proj"])
    found = recovered(llama_dir, with_unused(rounded(llama_dir)), with_unused(full(llama_dir)), config=config)
    assert not any(delta.any() for delta in deltas(found.model).values())


def test_inference_mode_is_refused(llama_dir: Path):
    with torch.inference_mode(), pytest.raises(ValueError, match="needs gradients"):
        recovered(llama_dir)


def test_a_task_adapter_goes_on_top(llama_dir: Path, ids):
    found = recovered(llama_dir, adapter_name="recovery")
    model = found.model
    model.add_adapter("task", SGRQConfig(ratio=0.5, group_size=16, task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["recovery", "task"])
    model.set_requires_grad("recovery", False)
    before = deltas(model, "recovery")
    losses = train_steps(model, ids, steps=5)
    assert losses[-1] < losses[0]
    assert all(torch.equal(delta, before[name]) for name, delta in deltas(model, "recovery").items())
    expected = logits(model.eval(), ids)
    assert torch.equal(logits(model.merge_and_unload(), ids), expected)


def test_the_merged_base_is_one_to_tune(llama_dir: Path, ids):
    base = recovered(llama_dir, NF4.load(llama_dir)).model.merge_and_unload()
    expected = logits(base, ids)
    model = get_peft_model(base, SGRQConfig(ratio=0.5, task_type="CAUSAL_LM"))
    assert torch.equal(logits(model, ids), expected)
    losses = train_steps(model, ids)
    assert losses[-1] < losses[0]
