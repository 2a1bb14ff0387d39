"""Adapters of models that were compiled before, or whose layers have other names since."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.bases import DENSE, NF4, adapted, logits
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from peft_sgrq import SGRQConfig, merge_checkpoint


class Compiler:
    """A scaled weight of `torch.compile` that runs what it is given, and counts it."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


def _whole(model: Any, compiler: Compiler) -> Any:
    return torch.compile(model, backend=compiler)


def _blocks(model: Any, compiler: Compiler) -> Any:
    for index, block in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(block, backend=compiler)
    return model


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [_whole, _blocks], ids=["whole", "blocks"])
def test_an_adapter_of_a_compiled_model_fits_the_plain_one(compiled, llama_dir, tmp_path, ids):
    compiler = Compiler()
    settings: dict[str, Any] = {"task_type": "CAUSAL_LM", "init_weights": False, "modules_to_save": ["lm_head"]}
    model = get_peft_model(compiled(DENSE.load(llama_dir), compiler), SGRQConfig(**settings))
    computed = logits(model.eval(), ids)
    assert compiler.graphs  # it still is compiled
    model.save_pretrained(tmp_path / "adapter")
    assert "_orig_mod" not in (tmp_path / "adapter" / "adapter_config.json").read_text()
    assert not any("_orig_mod" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(DENSE.load(llama_dir), tmp_path / "adapter")
    expected = logits(loaded, ids)
    assert torch.allclose(computed, expected, atol=1e-4)
    again = PeftModel.from_pretrained(compiled(DENSE.load(llama_dir), compiler), tmp_path / "adapter")
    assert torch.allclose(logits(again, ids), expected, atol=1e-4)
    DENSE.load(llama_dir).save_pretrained(tmp_path / "base")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "files")
    model.merge_and_unload().save_pretrained(tmp_path / "memory")
    files, memory = (load_file(tmp_path / name / "model.safetensors") for name in ("files", "memory"))
    assert files.keys() == memory.keys()


def _checkpointed(model: Any) -> Any:
    for index, block in enumerate(model.model.layers):
        model.model.layers[index] = checkpoint_wrapper(block)
    return model


def test_an_adapter_of_a_model_in_wrappers_fits_the_plain_one(llama_dir, tmp_path, ids):
    settings: dict[str, Any] = {"task_type": "CAUSAL_LM", "init_weights": False, "ratio": 0.5}
    model = get_peft_model(_checkpointed(NF4.load(llama_dir)), SGRQConfig(**settings))
    model.train()(input_ids=ids, labels=ids).loss.backward()
    expected = logits(model.eval(), ids)
    model.save_pretrained(tmp_path / "adapter")
    assert "wrapped" not in (tmp_path / "adapter" / "adapter_config.json").read_text()
    assert not any("wrapped" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert torch.equal(logits(PeftModel.from_pretrained(NF4.load(llama_dir), tmp_path / "adapter"), ids), expected)
    for low_cpu_mem_usage in (False, True):
        base = _checkpointed(NF4.load(llama_dir))
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(loaded, ids), expected)
    base = _checkpointed(NF4.load(llama_dir))
    base.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(base.eval(), ids), expected)


def test_blocks_that_are_compiled_after_the_adapter_was_added_are_saved(llama_dir, tmp_path, ids):
    model = adapted(NF4, llama_dir)
    expected = logits(model, ids)
    _blocks(model.base_model.model, Compiler())
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(NF4.load(llama_dir), tmp_path / "adapter"), ids), expected)


def test_a_model_that_an_engine_wraps_already_is_refused(llama_dir):
    model = NF4.load(llama_dir)
    for wrapped in (torch.nn.DataParallel(model), torch.nn.Sequential(torch.nn.DataParallel(model))):
        with pytest.raises(ValueError, match="wrapped in DataParallel already"):
            get_peft_model(wrapped, SGRQConfig())
    assert get_peft_model(model, SGRQConfig())


def test_a_compiled_base_is_named(llama_dir, tmp_path):
    model = get_peft_model(_whole(NF4.load(llama_dir), Compiler()), SGRQConfig(task_type="CAUSAL_LM"))
    assert model.peft_config["default"].base_model_name_or_path == str(llama_dir)


def test_torch_compile_still_changes_names():
    compiled: Any = torch.compile(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    assert "_orig_mod.0.weight" in compiled.state_dict()


def renamed(adapter: Path, out: Path, old: str, new: str) -> Path:
    """The adapter of a model whose layers had other names."""
    shutil.copytree(adapter, out)
    tensors = load_file(adapter / "adapter_model.safetensors")
    begin = "base_model.model."
    save_file({k.replace(begin + old, begin + new): v for k, v in tensors.items()}, out / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    for field in ("selection", "base_fingerprint"):
        config[field] = {key.replace(old, new, 1): value for key, value in config[field].items()}
    config["target_modules"] = sorted(config["selection"])
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out


@pytest.fixture
def saved(llama_dir, tmp_path, ids) -> tuple[Path, torch.Tensor]:
    model = adapted(NF4, llama_dir)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits(model, ids)


@pytest.mark.parametrize("how", ["digest", "key_mapping", "class", "compiled"])
def test_layers_that_were_renamed_since_are_found(how, saved, llama_dir, tmp_path, ids):
    adapter, expected = saved
    new = "_orig_mod.model." if how == "compiled" else "backbone."
    old_adapter = renamed(adapter, tmp_path / "old", "model.", new)
    model = NF4.load(llama_dir)
    arguments: dict[str, Any] = {"key_mapping": {"^backbone": "model"}} if how == "key_mapping" else {}
    if how == "class":
        model._checkpoint_conversion_mapping = {"^backbone": "model"}
    loaded = PeftModel.from_pretrained(model, old_adapter, **arguments)
    assert torch.equal(logits(loaded, ids), expected)
    loaded.save_pretrained(tmp_path / "again")  # under the names they have now
    again = PeftModel.from_pretrained(NF4.load(llama_dir), tmp_path / "again")
    assert torch.equal(logits(again, ids), expected)


def test_layers_of_another_base_are_not_taken_for_renamed_ones(saved, llama_dir, tmp_path):
    old_adapter = renamed(saved[0], tmp_path / "old", "model.", "backbone.")
    model = NF4.load(llama_dir)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data.bitwise_xor_(17)
    with pytest.raises(ValueError, match="backbone"):
        PeftModel.from_pretrained(model, old_adapter)
