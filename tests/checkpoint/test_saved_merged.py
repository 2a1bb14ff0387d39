"""Merged models, saved, are read and give the same bits where peft_sgrq is not installed."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from support.bases import BASES, DENSE, NF4, Base, logits
from support.format_base import AUTO, NO_PACKING
from support.fresh import logits_where_not_installed
from transformers import AutoModelForCausalLM

from peft_sgrq import SGRQConfig

pytestmark = pytest.mark.slow

GPT2_BASES = [DENSE, Base("dense", False, torch.bfloat16), NF4]
QUANTIZED = [base for base in BASES if base.quant != "dense"]


@pytest.fixture(scope="module")
def saved_and_loaded(
    llama_dir, gpt2_dir, tmp_path_factory
) -> dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]]:
    """Logits of an adapted model, and of the merged one after saving it and loading it elsewhere, by kind and base."""
    scratch, ids = tmp_path_factory.mktemp("saved"), torch.randint(3, 256, (2, 12))
    models = {("llama", base.name): base.load(llama_dir) for base in BASES}
    models |= {("gpt2", base.name): base.load(gpt2_dir) for base in GPT2_BASES}
    for base in QUANTIZED:
        models["llama", base.name].save_pretrained(scratch / "base" / base.name)
        models["prequantized", base.name] = AutoModelForCausalLM.from_pretrained(scratch / "base" / base.name).eval()
    expected = {}
    for (kind, name), plain in models.items():
        model = get_peft_model(plain, SGRQConfig(ratio=0.5, init_weights=False)).eval()
        expected[kind, name] = logits(model, ids)
        model.merge_and_unload().save_pretrained(scratch / kind / name)
    plan = {f"{kind}/{name}": (AUTO + NO_PACKING, scratch / kind / name) for kind, name in expected}
    found = logits_where_not_installed(plan, ids, scratch)
    return {(kind, name): (value, found[f"{kind}/{name}"]) for (kind, name), value in expected.items()}


def check_same_bits(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    expected, found = pair
    assert isinstance(found, torch.Tensor), found
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_a_saved_merged_model_gives_the_same_bits_where_peft_sgrq_is_not_installed(saved_and_loaded, base):
    check_same_bits(saved_and_loaded["llama", base.name])


@pytest.mark.parametrize("base", GPT2_BASES, ids=lambda base: base.name)
def test_a_saved_merged_gpt2_gives_the_same_bits_where_peft_sgrq_is_not_installed(saved_and_loaded, base):
    check_same_bits(saved_and_loaded["gpt2", base.name])


@pytest.mark.parametrize("base", QUANTIZED, ids=lambda base: base.name)
def test_a_model_merged_from_a_prequantized_base_saves_and_loads(saved_and_loaded, base):
    check_same_bits(saved_and_loaded["prequantized", base.name])
