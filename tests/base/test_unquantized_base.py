"""A base that was to be quantized and is not: recovery refuses it, tuning says so once."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.bases import DENSE, NF4, Base
from support.packed_layers import packed_layer
from support.rounded_models import recovered
from torch import nn

from peft_sgrq import SGRQConfig, calibrate, split_groups
from peft_sgrq.cli import main


def said(make: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make()
    return [str(warning.message) for warning in caught if "not quantized" in str(warning.message)]


def test_tuning_a_dense_base_is_said_once_and_how_to_quantize(llama_dir: Path, tmp_path: Path):
    model: Any = None

    def adapt() -> None:
        nonlocal model
        model = get_peft_model(DENSE.load(llama_dir), SGRQConfig(task_type="CAUSAL_LM"))
        model.add_adapter("second", SGRQConfig(task_type="CAUSAL_LM"))

    (text,) = said(adapt)
    assert "BitsAndBytesConfig(load_in_4bit=True" in text and "--load_in_4bit" in text
    model.save_pretrained(tmp_path)
    assert said(lambda: PeftModel.from_pretrained(DENSE.load(llama_dir), tmp_path)) == []
    assert said(lambda: get_peft_model(NF4.load(llama_dir), SGRQConfig())) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("as_path", [True, False])
def test_recovering_a_model_that_is_not_quantized_is_refused(dtype, as_path, llama_dir: Path):
    model = Base("dense", False, dtype).load(llama_dir)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"The model is not quantized: .*BitsAndBytesConfig.*--quantize nf4"):
        recovered(llama_dir, model, str(llama_dir) if as_path else None)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_command_refuses_it_and_writes_nothing(llama_dir: Path, tmp_path: Path, capsys):
    data = tmp_path / "data.txt"
    data.write_text("Some text. " * 20)
    named = ["--reference", str(llama_dir), "--data", str(data), "-o", str(tmp_path / "out"), "--quiet"]
    assert main(["recover", str(llama_dir), *named]) == 2
    assert "not quantized" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["data.txt"]


def test_a_budget_that_the_smallest_ratios_exceed_is_refused_before_data_is_read(llama_dir: Path):
    def data() -> Any:
        raise AssertionError("data was read")
        yield

    config = SGRQConfig(ratio="layerwise", budget=3, task_type="CAUSAL_LM", group_size=16)
    with pytest.raises(ValueError, match="`budget` allows 3 scales"):
        calibrate(DENSE.load(llama_dir), config, data(), progress=False)
    for options in ({"criterion": "error"}, {"memory_limit": "4 apples"}):
        with pytest.raises(ValueError, match=r"original|memory_limit"):
            calibrate(DENSE.load(llama_dir), SGRQConfig(ratio=0.5), data(), progress=False, **options)


@pytest.mark.parametrize("kind", ["gptq", "autoround"])
def test_groups_that_no_server_takes_are_said_to_be_so(kind):
    model = nn.Sequential(packed_layer(kind, group_size=64).layer)
    with pytest.warns(UserWarning, match="no server takes them"):
        split_groups(model, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split_groups(nn.Sequential(packed_layer(kind, group_size=64).layer), 32)
