"""An interrupted recovery leaves the model as it was, and goes on where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.bases import NF4, logits
from support.calibration import check_same, snapshot
from support.rounded_models import deltas, full, recovered, rounded, sequences

from peft_sgrq import SGRQConfig
from peft_sgrq.recovery import block_by_block
from peft_sgrq.recovery.progress import ProgressFile

pytestmark = pytest.mark.slow


class Stopped(Exception):
    """What interrupts."""


def interrupt_in_block(index: int, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    """The training of that block is interrupted half-way."""
    train, calls = block_by_block.train_block, []

    def interrupted(*args: Any) -> bool:
        *others, advance = args
        calls.append(args)
        steps = []

        def count() -> None:
            steps.append(1)
            if len(calls) > index and len(steps) == 4:
                raise error
            advance()

        return train(*others, count)

    monkeypatch.setattr(block_by_block, "train_block", interrupted)


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stopped])
@pytest.mark.parametrize("base", [None, NF4], ids=["rounded", "nf4"])
def test_an_interrupted_recovery_leaves_both_models_as_they_were(base, error, llama_dir: Path, monkeypatch, ids):
    model = rounded(llama_dir) if base is None else base.load(llama_dir)
    reference = full(llama_dir).train()
    model.config.use_cache = reference.config.use_cache = True
    before = snapshot(model), snapshot(reference)
    expected = logits(model, ids)
    with monkeypatch.context() as patch:
        interrupt_in_block(1, patch, error)
        with pytest.raises(error):
            recovered(llama_dir, model, reference)
    check_same(before[0], snapshot(model))
    check_same(before[1], snapshot(reference))
    assert torch.equal(logits(model, ids), expected)
    recovered(llama_dir, model, reference)  # as if nothing had been
    check_same(before[1], snapshot(reference))


@pytest.mark.parametrize("options", [{}, {"preservation": 0.1}, {"augmented": False, "distill_steps": 2}], ids=str)
def test_a_resumed_recovery_gives_the_bits_of_one_never_stopped(options, llama_dir: Path, tmp_path: Path, monkeypatch):
    file = tmp_path / "progress"
    whole = recovered(llama_dir, **options)
    with monkeypatch.context() as patch:
        interrupt_in_block(1, patch, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            recovered(llama_dir, progress_file=file, **options)
    assert file.exists()
    trained = []
    train = block_by_block.train_block
    monkeypatch.setattr(block_by_block, "train_block", lambda *args: trained.append(args) or train(*args))
    monkeypatch.setattr(block_by_block, "preservation_terms", None)  # kept in the file
    resumed = recovered(llama_dir, progress_file=file, **options)
    assert len(trained) == 1
    for name, delta in deltas(whole.model).items():
        assert torch.equal(delta, deltas(resumed.model)[name])
    assert [(b.name, b.before, b.after) for b in resumed.blocks] == [(b.name, b.before, b.after) for b in whole.blocks]
    assert resumed.distillation == whole.distillation
    assert list(tmp_path.iterdir()) == [file]
    again = recovered(llama_dir, progress_file=file, **options)  # nothing is left to do
    assert len(trained) == 1
    for name, delta in deltas(whole.model).items():
        assert torch.equal(delta, deltas(again.model)[name])


def test_a_missing_folder_is_made_before_the_work(llama_dir: Path, tmp_path: Path, monkeypatch):
    file = tmp_path / "new" / "progress"
    interrupt_in_block(0, monkeypatch, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        recovered(llama_dir, progress_file=file)
    assert list(file.parent.iterdir()) == []


@pytest.fixture
def interrupted(llama_dir: Path, tmp_path: Path, monkeypatch) -> Path:
    """The progress file of a recovery that was interrupted in its second block."""
    with monkeypatch.context() as patch:
        interrupt_in_block(1, patch, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            recovered(llama_dir, progress_file=tmp_path / "progress")
    return tmp_path / "progress"


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 4},
        {"seed": 1},
        {"data": sequences(seed=8)},
        {"data": [{**row, "labels": row["input_ids"]} for row in sequences()]},
        {"augmented": False},
        {"learning_rate": 1e-3},
        {"config": SGRQConfig(ratio=1.0, group_size=16, task_type="CAUSAL_LM", adapter_dtype="bfloat16")},
    ],
    ids=["epochs", "seed", "data", "labels", "augmented", "learning_rate", "adapter_dtype"],
)
def test_the_progress_of_another_recovery_is_refused(options, interrupted: Path, llama_dir: Path):
    before = interrupted.read_bytes()
    (changed,) = options
    changed = "adapter_dtype" if changed == "config" else changed
    with pytest.raises(ValueError, match=f"is of a recovery with {changed}="):
        recovered(llama_dir, progress_file=interrupted, **options)
    assert interrupted.read_bytes() == before


def test_the_progress_of_another_model_is_refused(interrupted: Path, llama_dir: Path):
    with pytest.raises(ValueError, match="is of a recovery with base="):
        recovered(llama_dir, rounded(llama_dir, bits=3), progress_file=interrupted)
    for change in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.norm"):
        other = full(llama_dir)
        other.get_submodule(change).weight.data += 1
        with pytest.raises(ValueError, match="is of a recovery with reference="):
            recovered(llama_dir, reference=other, progress_file=interrupted)
    with pytest.raises(ValueError, match="is of a recovery with reference="):
        recovered(llama_dir, reference=str(llama_dir), progress_file=interrupted)
    model = rounded(llama_dir)
    model.model.embed_tokens.weight.data += 1
    with pytest.raises(ValueError, match="is of a recovery with model="):
        recovered(llama_dir, model, progress_file=interrupted)


def test_progress_with_another_starting_point_is_refused(interrupted: Path, llama_dir: Path, tmp_path: Path):
    recovered(llama_dir, epochs=1).model.save_pretrained(tmp_path / "start")
    config = SGRQConfig(init_weights=tmp_path / "start", ratio=1.0, group_size=16, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="is of a recovery with model="):
        recovered(llama_dir, progress_file=interrupted, config=config)


def test_the_second_stage_may_change_between(interrupted: Path, llama_dir: Path):
    assert recovered(llama_dir, progress_file=interrupted, distill_steps=1).distillation


def test_a_file_that_is_no_progress_is_refused_and_kept(llama_dir: Path, tmp_path: Path):
    file = tmp_path / "progress"
    file.write_bytes(b"notes")
    with pytest.raises(ValueError, match="truncated or corrupt"):
        recovered(llama_dir, progress_file=file)
    assert file.read_bytes() == b"notes"
    with pytest.raises(ValueError, match="a folder, expected a file"):
        recovered(llama_dir, progress_file=tmp_path)
    with pytest.raises(ValueError, match="holds no progress of a recovery"):
        ProgressFile(llama_dir / "model.safetensors", {})
