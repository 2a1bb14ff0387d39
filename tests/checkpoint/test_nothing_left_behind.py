"""What a run leaves of the process it runs in, and what it reads: files are read once and closed."""

from __future__ import annotations

import gc
import os
import shutil
import stat
from pathlib import Path

import pytest
from peft import PeftModel, get_peft_model
from support.bases import NF4, NF4_NESTED, adapted

from peft_sgrq import SGRQConfig, merge_checkpoint, verify_checkpoint
from peft_sgrq.adapter import stored as adapter_file


def _open_files(folder: Path) -> list[str]:
    """Files below a folder that this process has open or mapped."""
    maps = [line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink() and path.exists()]
    return sorted({name for name in maps + links if name.startswith(str(folder))})


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_no_file_of_a_checkpoint_stays_open(nested, tmp_path):
    base, adapter = (Path(shutil.copytree(path, tmp_path / name)) for path, name in zip(nested, "ab", strict=True))
    merge_checkpoint(base, adapter, tmp_path / "out")
    verify_checkpoint(base, adapter, tmp_path / "out")
    with pytest.raises(ValueError, match="has the codes but not the scales"):
        merge_checkpoint(tmp_path / "out", adapter, tmp_path / "twice")
    gc.collect()  # the refusal holds what it was made from
    assert _open_files(tmp_path) == []


def test_a_merge_has_the_permissions_of_a_new_folder_and_never_sets_those_of_the_process(
    nested, tmp_path, monkeypatch
):
    def refuse(mask: int) -> int:
        raise AssertionError(f"umask({mask}) changes every thread of the process")

    monkeypatch.setattr(os, "umask", refuse)
    (tmp_path / "new").mkdir()
    merge_checkpoint(*nested, tmp_path / "out")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new", "out")]
    assert modes[0] == modes[1]


def test_a_starting_adapter_is_read_once(llama_dir, tmp_path, monkeypatch):
    adapted(NF4, llama_dir).save_pretrained(tmp_path / "source")
    read = []
    load_file = adapter_file.load_file
    monkeypatch.setattr(adapter_file, "load_file", lambda path: read.append(path) or load_file(path))
    get_peft_model(NF4.load(llama_dir), SGRQConfig(init_weights=tmp_path / "source"))
    assert len(read) == 1


@pytest.mark.parametrize(("trained_on", "found"), [(NF4, NF4_NESTED), (NF4_NESTED, NF4)], ids=lambda base: base.name)
def test_a_base_with_scales_quantized_otherwise_is_told_by_name(trained_on, found, llama_dir, tmp_path):
    adapted(trained_on, llama_dir).save_pretrained(tmp_path / "adapter")
    expected = r"double-quantized (here|ones) \(bnb_4bit_use_double_quant=True\)"
    with pytest.raises(ValueError, match=expected) as refusal:
        PeftModel.from_pretrained(found.load(llama_dir), tmp_path / "adapter")
    assert "another device" not in str(refusal.value)
    found.load(llama_dir).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=expected):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
