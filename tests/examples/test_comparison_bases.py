"""Bases of the comparison: groups that are split, and groups that fit nothing."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from comparison import bases
from comparison.bases import load_base, targets_of
from comparison.methods import adapt, parse_method

pytestmark = pytest.mark.slow


@pytest.mark.skipif(find_spec("hqq") is None, reason="hqq is not installed")
def test_groups_that_divide_no_layer_are_refused(llama_dir):
    with pytest.raises(ValueError, match=r"Groups of 100 columns divide none of the layers, which have \[64, 128\]"):
        load_base(str(llama_dir), "hqq-4-100", torch.float32, [])


hqq = pytest.mark.skipif(find_spec("hqq") is None, reason="hqq is not installed")
SPLIT = [pytest.param(f"hqq-{bits}-64", 16, marks=hqq) for bits in (2, 3, 4, 8)] + [("nf4", 32)]


@pytest.mark.parametrize(("base", "size"), SPLIT)
def test_split_groups_give_more_scales_and_the_same_bits(base, size, llama_dir, ids):
    whole, split = (load_base(str(llama_dir), name, torch.float32, []) for name in (base, f"{base}-{size}"))
    with torch.no_grad():
        assert torch.equal(split(input_ids=ids).logits, whole(input_ids=ids).logits)
    counts = [
        adapt(model, parse_method("peqa"), targets_of(model), None).get_nb_trainable_parameters()[0]
        for model in (whole, split)
    ]
    assert counts[1] == 64 // size * counts[0]


def test_groups_are_split_into_divisors_of_them(llama_dir):
    for base, sizes in (("hqq-4-64-48", "64 into 48"), ("gptq-4-64-16", "64 into 16")):
        with pytest.raises(ValueError, match=f"splits groups of {sizes}, expected HQQ and a divisor"):
            load_base(str(llama_dir), base, torch.float32, [])


@pytest.mark.parametrize(
    ("base", "library"),
    [("nf4", "bitsandbytes"), ("hqq-3-64", "hqq"), ("gptq-4-64", "gptqmodel"), ("quanto-int4", "optimum")],
)
def test_a_base_whose_library_is_missing_says_so(base, library, llama_dir, monkeypatch):
    monkeypatch.setattr(bases, "find_spec", lambda name: None if name == library else find_spec(name))
    with pytest.raises(ValueError, match=rf"The base '{base}' is made by .*{library}.* is not installed"):
        load_base(str(llama_dir), base, torch.float32, [])
