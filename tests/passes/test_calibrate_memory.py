"""Calibration holds the statistics of one block at a time, whatever the depth of the model; its progress bar."""

from __future__ import annotations

import pytest
import torch

# At the end: modules of the tests have names that occur there, too.
from calibration_memory import PeakMemory
from support.bases import DENSE
from support.calibration import padded_batches
from transformers import LlamaConfig, LlamaForCausalLM

from peft_sgrq import SGRQConfig, calibrate

WIDTH, INNER = 128, 384


def peak_of(criterion: str, layers: int) -> int:
    """Bytes that calibration makes at most at once, beside the model."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=layers, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    data = [{"input_ids": torch.randint(0, 64, (1, 16))} for _ in range(2)]
    with PeakMemory(model) as memory:
        calibrate(model, SGRQConfig(task_type="CAUSAL_LM"), data, criterion=criterion, progress=False)
    return memory.peak


@pytest.mark.slow
def test_the_hessians_of_one_block_are_there_at_a_time():
    hessians = 4 * (3 * WIDTH**2 + INNER**2)  # of one block: q, k and v; o; gate and up; down
    few, many = peak_of("obs", 2), peak_of("obs", 8)
    assert few > hessians
    assert many - few < hessians  # six blocks more: their scores, and no Hessian


def test_the_progress_bar_counts_and_can_be_left_out(llama_dir, capfd):
    for progress in (True, False):
        config = SGRQConfig(group_size=16, task_type="CAUSAL_LM")
        calibrate(DENSE.load(llama_dir), config, padded_batches(), criterion="diag", progress=progress)
        shown = capfd.readouterr().err
        assert ("Calibrating: 100%" in shown) == progress
