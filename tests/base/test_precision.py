"""The dtype of a machine: bfloat16 only where the CPU has instructions for it; the base is the same in any."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from support.bases import NF4, NF4_NESTED, Base
from transformers import AutoModelForCausalLM

from peft_sgrq import SGRQConfig, compute_in, fast_dtype
from peft_sgrq.base import precision
from peft_sgrq.base.loading_arguments import loading_arguments


@pytest.fixture
def slow_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_cpu_has_bfloat16", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_cpu_without_bfloat16_computes_in_float32_and_says_so(slow_bfloat16):
    assert fast_dtype() == fast_dtype("cpu") == torch.float32
    assert precision.describe_dtype(torch.float32) == "float32 (this CPU has no instructions for bfloat16)"


def test_a_cpu_with_bfloat16_computes_in_it(monkeypatch):
    monkeypatch.setattr(precision, "_cpu_has_bfloat16", lambda: True)
    assert fast_dtype("cpu") == torch.bfloat16
    assert precision.describe_dtype(torch.bfloat16) == "bfloat16"
    assert precision.describe_dtype(torch.float32) == "float32"  # chosen by somebody


@pytest.mark.slow
def test_what_onednn_may_use_decides():
    code = "import torch; from peft_sgrq.base.precision import fast_dtype; print(fast_dtype('cpu'))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "DNNL_MAX_CPU_ISA": "AVX2"},
    )
    assert run.stdout.strip().endswith("torch.float32")


@pytest.mark.parametrize("base", [NF4, NF4_NESTED], ids=lambda base: base.name)
def test_a_checkpoint_in_16_bits_is_the_same_base_in_float32(base: Base, slow_bfloat16, llama_dir, tmp_path: Path):
    half = Base(base.quant, base.nested, torch.bfloat16)
    half.load(llama_dir).save_pretrained(tmp_path)
    arguments = loading_arguments(str(tmp_path))
    assert arguments["dtype"] == torch.float32
    model = compute_in(AutoModelForCausalLM.from_pretrained(tmp_path, **arguments), torch.float32)
    assert {module.compute_dtype for module in model.modules() if hasattr(module, "compute_dtype")} == {torch.float32}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    fingerprints = [
        get_peft_model(loaded, SGRQConfig()).peft_config["default"].base_fingerprint for loaded in (model, plain)
    ]
    assert fingerprints[0] == fingerprints[1]


def test_a_fast_machine_loads_a_checkpoint_as_it_is(monkeypatch, llama_dir):
    monkeypatch.setattr(precision, "_cpu_has_bfloat16", lambda: True)
    assert loading_arguments(str(llama_dir)) == {"dtype": "auto"}
