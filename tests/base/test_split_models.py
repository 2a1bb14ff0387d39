"""Whole models with split groups: saved, they are bases, which load, train and merge like any other."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.asked_for import asked_for
from support.bases import Base, logits, save_small_llama
from support.format_base import AUTO, NO_PACKING
from support.fresh import logits_where_not_installed
from support.library_formats import FORMATS
from support.packed_checkpoints import CHECKPOINTS
from support.quantized_checkpoints import same_bytes, tensors_of

from peft_sgrq import SGRQConfig, merge_checkpoint, split_groups

pytestmark = pytest.mark.slow

IDS = torch.randint(3, 256, (2, 12), generator=torch.Generator().manual_seed(1))
PACKED = [
    checkpoint
    for checkpoint in CHECKPOINTS
    if checkpoint.name in ("gptq-4bit-act-order-ragged", "gptq-2bit-asym", "awq-4bit-float16", "autoround-4bit")
]


COMPILED = "gptq-4bit-act-order-ragged"


@dataclass(frozen=True)
class Kind:
    """A model to be split.

    Attributes:
        name (`str`): For test ids and `pytest -k`.
        load (`Callable`): Loads the base in its first groups, given what all start from.
        reload (`str`): Python code that sets `model` from `directory` by the format's own loader.
        size (`int`): The group size to have.
        require (`Callable`): Skips the test where a library is not installed.
        save (`Callable`): `(model, directory)`, the format's own saving.
        on_files (`bool`): Whether an adapter can be merged on files.
    """

    name: str
    load: Callable[[dict[str, Path]], Any]
    reload: str
    size: int
    require: Callable[[], None] = lambda: None
    save: Callable[[Any, Path], None] = lambda model, directory: model.save_pretrained(directory)
    on_files: bool = True

    def loaded(self, directory: Path) -> Any:
        names: dict[str, Any] = {"directory": str(directory), "torch": torch}
        exec(self.reload, names)
        return names["model"].eval()


def _bnb(base: Base) -> Kind:
    return Kind(base.name, lambda found: base.load(found["dense"]), AUTO + NO_PACKING, 32)


def _packed(checkpoint: Any) -> Kind:
    return Kind(
        checkpoint.name,
        lambda found: checkpoint.load(found[checkpoint.name]),
        checkpoint.reload,
        16,
        checkpoint.require,
    )


def _hqq(form: Any) -> Kind:
    return Kind(
        form.name,
        lambda found: form.load(found["dense"], form.dtype).eval(),
        form.reload,
        16,
        form.require,
        form.save,
        on_files=False,
    )


KINDS = [
    *(_bnb(Base("nf4", nested, torch.float32)) for nested in (False, True)),
    _bnb(Base("fp4", True, torch.bfloat16)),
    *map(_packed, PACKED),
    *(_hqq(form) for form in FORMATS if form.name in ("hqq-4bit-axis1", "hqq-3bit-axis1")),
]


@dataclass
class Run:
    """What came of a model that was split, saved, loaded and trained."""

    root: Path
    logits: dict[str, torch.Tensor] = field(default_factory=dict)
    scales: dict[str, int] = field(default_factory=dict)
    config: Any = None


def adapter_on(model: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(model, SGRQConfig(ratio=0.5, init_weights=False, task_type="CAUSAL_LM")).eval()


def count(model: Any) -> int:
    whole = get_peft_model(model, SGRQConfig(ratio=1.0, task_type="CAUSAL_LM"))
    trainable = whole.get_nb_trainable_parameters()[0]
    whole.unload()
    return trainable


def run(kind: Kind, split_bases: dict[str, Path], root: Path) -> Run:
    found = Run(root)
    model = kind.load(split_bases)
    found.logits["whole"] = logits(model, IDS)
    found.scales["whole"] = count(model)
    model = split_groups(model, kind.size)  # after forward passes, which compile and cache
    found.logits["split"] = logits(model, IDS)
    found.scales["split"] = count(model)
    model = split_groups(kind.load(split_bases), kind.size)  # that has not had an adapter
    kind.save(model, root / "base")
    found.logits["after saving"] = logits(model, IDS)
    model = adapter_on(split_groups(kind.load(split_bases), kind.size))
    found.logits["unmerged"] = logits(model, IDS)
    model.save_pretrained(root / "adapter")
    merged = model.merge_and_unload()
    found.logits["merged"] = logits(merged, IDS)
    kind.save(merged, root / "merged")
    again = PeftModel.from_pretrained(kind.loaded(root / "base"), root / "adapter").eval()
    found.logits["on the saved base"] = logits(again, IDS)
    if kind.on_files:
        again.merge_and_unload().save_pretrained(root / "merged again")
        merge_checkpoint(root / "base", root / "adapter", root / "files")
        config = json.loads((root / "base" / "config.json").read_text())
        found.config = config["quantization_config"]
    return found


@pytest.fixture(scope="module")
def split_bases(packed_checkpoints, tmp_path_factory) -> dict[str, Path]:
    """The checkpoints that splitting starts from, by name."""
    return {"dense": save_small_llama(tmp_path_factory.mktemp("small")), **packed_checkpoints}


@pytest.fixture(scope="module")
def split_runs(request, split_bases, tmp_path_factory) -> dict[str, Run]:
    """The runs of the selected kinds, with the logits of what they saved where peft_sgrq is not installed."""
    scratch = tmp_path_factory.mktemp("split")
    found, plan = {}, {}
    for kind in asked_for(request, "split_kind"):
        try:
            kind.require()
        except pytest.skip.Exception:
            continue
        # One kind is split after its kernel has been compiled; that takes seconds.
        with torch.compiler.set_stance("default" if kind.name == COMPILED else "force_eager"):
            found[kind.name] = run(kind, split_bases, scratch / kind.name)
        for what in ("base", "merged", *(["files"] if kind.on_files else [])):
            eagerly = f'torch.compiler.set_stance("force_eager")\n{kind.reload}'
            plan[f"{kind.name}/{what}"] = (eagerly, scratch / kind.name / what)
    for key, value in logits_where_not_installed(plan, IDS, scratch).items():
        assert isinstance(value, torch.Tensor), value
        name, what = key.split("/")
        found[name].logits[f"reloaded {what}"] = value
    return found


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def split_kind(request) -> Kind:
    request.param.require()
    return request.param


@pytest.fixture
def found(split_kind, split_runs) -> Run:
    return split_runs[split_kind.name]


def check_equal(found: Run, *names: str) -> None:
    first, *rest = (found.logits[name] for name in names)
    assert all(other.dtype == first.dtype and torch.equal(other, first) for other in rest)


def test_a_split_model_gives_the_same_bits_and_has_more_scales(found, split_kind):
    check_equal(found, "whole", "split", "after saving")
    # Of a ragged last group of 32 columns there are 2 parts of 16 instead of 4.
    assert found.scales["split"] == 64 // split_kind.size * found.scales["whole"] or (
        "ragged" in split_kind.name and 3.8 < found.scales["split"] / found.scales["whole"] < 4
    )


def test_a_saved_split_model_gives_the_same_bits_where_peft_sgrq_is_not_installed(found):
    check_equal(found, "whole", "reloaded base")


def test_an_adapter_on_a_split_model_is_merged_exactly(found):
    assert not torch.allclose(found.logits["unmerged"], found.logits["whole"], atol=1e-2)
    check_equal(found, "unmerged", "merged")


def test_a_split_and_merged_model_gives_the_same_bits_where_peft_sgrq_is_not_installed(found):
    check_equal(found, "unmerged", "reloaded merged")


def test_an_adapter_fits_the_split_model_that_was_saved(found):
    check_equal(found, "unmerged", "on the saved base")


def test_merging_on_the_files_of_a_split_model_writes_the_merge_in_memory(found, split_kind):
    if not split_kind.on_files:
        pytest.skip("HQQ's files cannot be merged")
    check_equal(found, "unmerged", "reloaded files")
    base, files, memory = (tensors_of(found.root / name) for name in ("base", "files", "merged again"))
    assert base.keys() == files.keys() == memory.keys()
    assert [name for name in files if not same_bytes(files[name], memory[name])] == []
    changed = {name for name in base if not same_bytes(base[name], files[name])}
    assert changed and all(name.endswith((".absmax", ".scales")) for name in changed)


def test_the_config_of_a_split_model_says_its_group_size(found, split_kind):
    if found.config is None:
        pytest.skip("HQQ writes group sizes with the layers")
    if "group_size" in found.config:
        assert found.config["group_size"] == split_kind.size
        assert found.config.get("backend") in (None, "auto")  # not the one it was split on
    else:
        assert found.config["bnb_4bit_use_double_quant"] is False


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("split_kind", [kind for kind in KINDS if kind.name == COMPILED], indirect=True)
def test_a_split_model_of_gptqmodels_own_loader_is_saved_and_loads(split_kind, split_bases, tmp_path):
    from gptqmodel import BACKEND, GPTQModel

    options = {"backend": BACKEND.GPTQ_TORCH, "device": "cpu", "dtype": torch.bfloat16}
    loaded = GPTQModel.load(str(split_bases[split_kind.name]), **options)
    before = logits(loaded.model.eval(), IDS)
    split_groups(loaded.model, split_kind.size).save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    again = GPTQModel.load(str(tmp_path), **options)
    assert torch.equal(logits(again.model.eval(), IDS), before)
    assert next(module for module in again.model.modules() if hasattr(module, "qweight")).group_size == split_kind.size
