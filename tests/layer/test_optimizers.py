"""The optimizers of bitsandbytes train the deltas, and hold state for the selected scales alone."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from datasets import Dataset
from support.bases import INT8, NF4, NF4_NESTED, TRAINING, adapted, byte_tokenizer
from support.single_layers import adapt, delta_of, linear_4bit
from trl import SFTConfig, SFTTrainer

pytestmark = pytest.mark.slow


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(
    ("optimizer", "width"),
    [(bnb.optim.AdamW8bit, 1), (bnb.optim.PagedAdamW8bit, 1), (bnb.optim.PagedAdamW, 4), (torch.optim.AdamW, 4)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_an_optimizer_lowers_the_loss_with_state_for_the_selected_scales(optimizer, width):
    model = adapt(linear_4bit(64, 1024, nested=True), [1, 4, 9], init_weights=True)
    options = {"min_8bit_size": 1} if width == 1 else {}
    steps = optimizer([p for p in model.parameters() if p.requires_grad], lr=1e-2, **options)
    x, wanted = torch.randn(30, 1024), torch.randn(30, 64)
    losses = []
    for _ in range(5):
        loss = (model(x) - wanted).square().mean()
        loss.backward()
        steps.step()
        steps.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    (state,) = steps.state.values()
    moments = [v for v in state.values() if isinstance(v, torch.Tensor) and v.shape == (64, 3)]
    assert [moment.element_size() for moment in moments] == [width, width]
    assert delta_of(model).dtype == torch.float32


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("base", [NF4, NF4_NESTED, INT8], ids=lambda base: base.name)
def test_sft_trainer_trains_with_8_bit_optimizers(llama_dir, tmp_path, base, name):
    model = adapted(base, llama_dir, random=False)
    settings = SFTConfig(output_dir=str(tmp_path), optim=name, max_steps=4, max_length=32, **TRAINING)
    data = Dataset.from_dict({"text": ["four words stand here"] * 8})
    trainer = SFTTrainer(model, settings, train_dataset=data, processing_class=byte_tokenizer())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    deltas = [p for p in trainer.model.parameters() if p.requires_grad]
    assert deltas and all(p.dtype == torch.float32 and p.abs().max() > 0 for p in deltas)
