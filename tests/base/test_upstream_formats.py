"""Bugs and limits of the optional libraries: each is shown to be there, so that its workaround goes when it does."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from support.bases import TRAINING, logits, save_small_llama
from support.library_formats import FORMATS
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer
from trl import SFTConfig, SFTTrainer

from peft_sgrq import SGRQConfig
from peft_sgrq.base.workarounds.trainer_refusal import allow_quantized_training

pytestmark = pytest.mark.slow

INTX = next(format for format in FORMATS if format.name == "torchao-intx4")
INT8_DYNAMIC = next(format for format in FORMATS if format.name == "torchao-int8-dynamic")
INTX_DYNAMIC = next(format for format in FORMATS if format.name == "torchao-intx4-dynamic")


@pytest.fixture(scope="module")
def small_dir(tmp_path_factory):
    return save_small_llama(tmp_path_factory.mktemp("small"))


@pytest.fixture
def model(small_dir) -> Any:
    INTX.require()
    return INTX.load(small_dir, torch.bfloat16)


def examples(ids: torch.Tensor) -> Dataset:
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


def test_transformers_still_calls_torchao_intx_untrainable(model):
    assert not model.hf_quantizer.is_trainable


def test_an_allowance_ends_where_it_was_given(model):
    with allow_quantized_training(model):
        assert model.hf_quantizer.is_trainable
    assert not model.hf_quantizer.is_trainable


def test_a_trainer_trains_an_adapter_on_torchao_intx(model, ids, tmp_path):
    model = get_peft_model(model, SGRQConfig(task_type="CAUSAL_LM"))
    for copied in (copy.deepcopy(model.hf_quantizer), pickle.loads(pickle.dumps(model.hf_quantizer))):
        assert copied.is_trainable and isinstance(copied, TorchAoHfQuantizer)
    trainer = Trainer(model, TrainingArguments(tmp_path, max_steps=3, **TRAINING), train_dataset=examples(ids))
    before = logits(model.eval(), ids)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    trained = logits(model.eval(), ids)
    assert not torch.equal(trained, before)
    model.merge_adapter()
    assert torch.equal(logits(model, ids), trained)


def test_sfttrainer_makes_the_adapter_itself(model, tmp_path, llama_dir):
    from transformers import AutoTokenizer

    trainer = SFTTrainer(
        model,
        args=SFTConfig(tmp_path, max_steps=2, max_length=32, **TRAINING),
        train_dataset=Dataset.from_dict({"text": ["one two three four"] * 4}),
        processing_class=AutoTokenizer.from_pretrained(llama_dir),
        peft_config=SGRQConfig(task_type="CAUSAL_LM"),
    )
    trainer.train()
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters() if p.requires_grad)


def test_a_model_without_an_adapter_is_refused_all_the_same(model, ids, tmp_path):
    with allow_quantized_training(model), pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, TrainingArguments(tmp_path, **TRAINING), train_dataset=examples(ids))


def test_allowing_a_model_that_transformers_did_not_quantize_is_a_mistake():
    with pytest.raises(ValueError, match="hf_quantizer"), allow_quantized_training(nn.Linear(2, 2)):
        pass


@pytest.mark.parametrize("format", [INT8_DYNAMIC, INTX_DYNAMIC], ids=lambda format: format.name)
def test_torchao_still_loses_the_input_gradient_of_dynamic_activations(format):
    """Why the backward pass of these formats is ours: rounding the activations stops the gradient, and no error."""
    format.require()
    layer = format.layer(nn.Linear(256, 64)).requires_grad_(False)
    weight, x = format.weight(layer), torch.randn(5, 256, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    if y.requires_grad:
        (y * dy).sum().backward()
    gradient = torch.zeros_like(x) if x.grad is None else x.grad
    assert (gradient - dy @ weight).norm() > 0.5 * (dy @ weight).norm(), "torchao passes the gradient now"


@pytest.mark.parametrize("name", ["hqq-4bit-axis1", "quanto-int8"])
def test_save_pretrained_still_cannot_save_hqq_and_quanto_and_a_merge_says_what_can(
    name, small_dir, ids, caplog, tmp_path
):
    """It writes a file without an error, which transformers loads as random dense weights."""
    format = next(format for format in FORMATS if format.name == name)
    format.require()
    model = get_peft_model(format.load(small_dir, torch.bfloat16), SGRQConfig(init_weights=False)).eval()
    merged = model.merge_and_unload()
    assert "`save_pretrained` cannot save this merged model" in caplog.text
    assert {"hqq": "save_quantized", "optimum": "quantization_map"}[format.library] in caplog.text
    expected = logits(merged, ids)
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert not torch.allclose(logits(loaded, ids), expected, atol=0.1), "transformers loads it now"


_CRASH = """
import torch
raw = torch.empty(5 * 256 * 2 + 128, dtype=torch.uint8)
start = -raw.data_ptr() % 64 + 8
x = raw[start : start + 5 * 256 * 2].view(torch.bfloat16).view(5, 256).normal_()
torch._weight_int8pack_mm(x, torch.ones(64, 256, dtype=torch.int8), torch.ones(64, dtype=torch.bfloat16))
"""


@pytest.mark.skipif("AVX512" not in torch.backends.cpu.get_cpu_capability(), reason="the kernel of AVX512 CPUs")
def test_pytorchs_int8_kernel_still_crashes_on_unaligned_tensors():
    """Why quanto's tensors are cloned after they were mapped from a file (`library_formats.py`, `docs/formats.md`)."""
    done = subprocess.run([sys.executable, "-c", _CRASH], capture_output=True)
    assert done.returncode < 0, "PyTorch takes unaligned tensors now"
