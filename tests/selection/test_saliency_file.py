"""A saliency survives saving; other files, and those of other models, are refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from support.bases import DENSE, NF4
from support.calibration import check_same, padded_batches, run_on
from support.saliencies import example

from peft_sgrq import Saliency, SGRQConfig


def test_a_saliency_survives_saving(tmp_path: Path):
    saliency, path = example(), tmp_path / "s.safetensors"
    saliency.save(path)
    loaded = Saliency.load(str(path))
    for name in ("criterion", "tokens", "seconds", "ratios"):
        assert getattr(loaded, name) == getattr(saliency, name)
    assert list(loaded.layers) == list(saliency.layers)
    for name, layer in saliency.layers.items():
        check_same(vars(layer), vars(loaded.layers[name]))
    assert loaded.select(0.5) == saliency.select(0.5)
    saliency.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["s.safetensors"]


def test_files_that_are_no_saliency_are_refused(tmp_path: Path):
    path = tmp_path / "s.safetensors"
    with pytest.raises(OSError):
        Saliency.load(path)
    example().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"truncated or corrupt"):
        Saliency.load(path)
    path.write_bytes(whole.replace(b'\\"version\\": 1', b'\\"version\\": 9'))
    with pytest.raises(ValueError, match=r"format version 9.*install a newer"):
        Saliency.load(path)
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"holds no saliency: found .* without 'peft_sgrq_saliency' .*, expected"):
        Saliency.load(path)
    for text in ("{", "3"):
        save_file({"a": torch.ones(2)}, path, metadata={"peft_sgrq_saliency": text})
        with pytest.raises(ValueError, match=r"s\.safetensors is corrupt: found .* no JSON object"):
            Saliency.load(path)
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))):
        Saliency.load(tmp_path)
    broken = example()
    broken.scores["a.b"][3] = torch.nan
    broken.save(path)
    with pytest.raises(ValueError, match=r"NaN, infinite or negative scores for layer 'a.b'"):
        Saliency.load(path)


def test_the_saliency_of_another_model_is_refused(llama_dir: Path, gpt2_dir: Path, tmp_path: Path):
    from peft import get_peft_model

    model = NF4.load(llama_dir)
    saliency = run_on(model, padded_batches())
    saliency.save(tmp_path / "s.safetensors")
    loaded = Saliency.load(tmp_path / "s.safetensors")
    loaded.check(model)
    other = DENSE.load(llama_dir)
    for parameter in other.parameters():
        parameter.data += 0.1
    for wrong in (other, DENSE.load(gpt2_dir), DENSE.load(llama_dir)):
        with pytest.raises(
            ValueError, match=r"saliency is that of another model: layer 'model.layers.0.self_attn.q_proj'"
        ):
            loaded.check(wrong)
        with pytest.raises(ValueError):
            get_peft_model(wrong, loaded.configure(SGRQConfig(group_size=64)))


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ({"criterion": "obs", "ratio": 0.5}, "criterion"),
        ({"criterion": "custom:f", "ratio": 0.5}, "criterion"),
        ({"ratio": "layerwise"}, "ratio"),
    ],
)
def test_what_needs_calibration_says_so_without(settings, asked, llama_dir: Path):
    from peft import get_peft_model

    with pytest.raises(ValueError, match=rf"`{asked}` is .*needs calibration.*call `peft_sgrq.calibrate"):
        get_peft_model(DENSE.load(llama_dir), SGRQConfig(**settings))
