"""Trains, saves, merges and verifies with the peft_sgrq that is installed; run it where no checkout is on the path."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import peft_sgrq
from peft_sgrq.cli import main

assert "installed" in Path(peft_sgrq.__file__).parts, peft_sgrq.__file__
assert Path(peft_sgrq.__file__).with_name("py.typed").exists()

with tempfile.TemporaryDirectory() as name:
    dense, base, adapter, merged = (str(Path(name, part)) for part in ("dense", "base", "adapter", "merged"))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes)).save_pretrained(dense)
    AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    ).save_pretrained(base)
    config = peft_sgrq.SGRQConfig(task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=2e-2)
    ids = torch.randint(0, 128, (2, 16))
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(adapter)
    AutoPeftModelForCausalLM.from_pretrained(adapter)
    assert main(["merge", adapter, merged]) == 0
    assert main(["verify", adapter, merged]) == 0
print(f"peft_sgrq {peft_sgrq.__version__} works from {Path(peft_sgrq.__file__).parent}")
