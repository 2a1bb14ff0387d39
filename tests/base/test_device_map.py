"""Models that accelerate has put on devices by a map compute through its hooks; here the devices are one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from peft import get_peft_model
from support.bases import DENSE, INT8, NF4, NF4_NESTED, logits, train_steps

from peft_sgrq import SGRQConfig

MODULES = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")


@pytest.mark.parametrize("base", [NF4, NF4_NESTED, INT8, DENSE], ids=lambda base: base.name)
def test_a_dispatched_model_trains_and_merges_as_one_that_is_not(base, llama_dir: Path, ids):
    found = []
    for dispatched in (True, False):
        model = base.load(llama_dir)
        if dispatched:
            model = dispatch_model(model, dict.fromkeys(MODULES, "cpu"), main_device="cpu", force_hooks=True)
            assert all(hasattr(block.self_attn.q_proj, "_hf_hook") for block in model.model.layers)
        adapted = get_peft_model(model, SGRQConfig(task_type="CAUSAL_LM"))
        losses = train_steps(adapted, ids)
        trained = logits(adapted.eval(), ids)
        assert torch.equal(logits(adapted.merge_and_unload(), ids), trained)
        found.append((losses, trained))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])
