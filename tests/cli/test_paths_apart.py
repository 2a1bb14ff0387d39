"""What a command writes takes the place neither of what it reads nor of what else it writes; seen before the work."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.saliencies import example

from peft_sgrq import BitPlan, Rotations
from peft_sgrq.cli import main
from peft_sgrq.files.paths_apart import check_not_read
from peft_sgrq.recovery.progress import ProgressFile

RECOVER = ["recover", "model", "--reference", "reference", "--data", "data.txt"]
LOST = {  # what is read and would be written
    "calibrate: data": ["calibrate", "model", "data.txt", "-o", "data.txt"],
    "calibrate: model": ["calibrate", "model", "data.txt", "-o", "model/model.safetensors"],
    "calibrate: by a link": ["calibrate", "model", "data.txt", "-o", "link"],
    "allocate: model": ["allocate", "model", "data.txt", "-o", "model/config.json"],
    "rotate: data": ["rotate", "model", "--data", "data.txt", "-o", "new", "--report", "data.txt"],
    "recover: reference": [*RECOVER, "-o", "new", "--progress-file", "reference/config.json"],
    "calibrate: before the shards": ["calibrate", "model", "data.txt", "-o", "model/model.safetensors"],
    "allocate: tokenizer": ["allocate", "model", "data.txt", "-o", "model/tokenizer.json"],
    "calibrate: a file of the model": ["calibrate", "model", "data.txt", "-o", "model/notes.txt"],
    "inspect: itself": ["inspect", "saliency.png", "--plot", "saliency.png"],
    "inspect: saliency": ["inspect", "adapter", "--saliency", "saliency.png", "--plot", "saliency.png"],
}
IN_PLACE = {  # of another output
    "allocate": ["allocate", "model", "data.txt", "-o", "new", "--checkpoint", "new"],
    "allocate: below": ["allocate", "model", "data.txt", "-o", "new", "--checkpoint", "new/checkpoint"],
    "rotate": ["rotate", "model", "-o", "new", "--report", "new/"],
    "rotate: below": ["rotate", "model", "-o", "new/checkpoint", "--report", "new"],
    "rotate: a file of it": ["rotate", "model", "-o", "new", "--report", "new/config.json"],
    "allocate: a file of it": ["allocate", "model", "data.txt", "-o", "new/tokenizer.json", "--checkpoint", "new"],
    "recover": [*RECOVER, "-o", "new", "--progress-file", "new"],
    "recover: below": [*RECOVER, "-o", "new", "--progress-file", "new/progress"],
    "recover: by a link": [*RECOVER, "-o", "new", "--progress-file", "to-new"],
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch) -> Path:
    for folder in ("model", "reference", "adapter"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
    for name in ("model/model.safetensors", "model/notes.txt", "data.txt", "saliency.png"):
        (tmp_path / name).write_text("mine")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "adapter" / name).write_text("{}")
    (tmp_path / "link").symlink_to("data.txt")
    (tmp_path / "to-new").symlink_to("new")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("peft_sgrq.cli._quiet_libraries", None)  # comes next
    return tmp_path


def content(place: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in place.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", LOST)
def test_nothing_that_is_read_is_written_over(case, place, capsys):
    before = content(place)
    assert main(LOST[case]) == 2
    assert "would be lost" in capsys.readouterr().err
    assert content(place) == before


@pytest.mark.parametrize("case", IN_PLACE)
def test_two_outputs_are_not_to_be_in_one_place(case, place, capsys):
    before = content(place)
    assert main(IN_PLACE[case]) == 2
    error = capsys.readouterr().err
    assert "new" in error and "expected" in error
    assert content(place) == before and not (place / "new").exists()


def test_what_an_earlier_run_left_in_a_folder_is_written_over(place):
    example().save(place / "model" / "saliency.safetensors")
    ProgressFile(place / "model" / "recovery.progress", {}).save()
    Rotations(0, "W4A16", {}).save(place / "model" / "rotations.json")
    BitPlan({"a": 4}, 64, 4.5, 1, 1, "fisher").save(place / "model" / "plan.json")
    for name in ("saliency.safetensors", "recovery.progress", "rotations.json", "plan.json", "new.png", "new.json"):
        check_not_read(str(place / "model" / name), str(place / "model"))


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["inspect", "model.gguf", "--plot", "new.png"], "--plot"),
        (["inspect", "model.gguf", "--ratio", "0.5"], "--ratio"),
        (["inspect", "model.gguf", "--saliency", "saliency.png"], "--saliency"),
        (["calibrate", "model", "data.txt", "-o", "new", "--double-quant"], "--double-quant"),
        ([*RECOVER, "-o", "new", "--double-quant", "--quantize", "int8"], "--double-quant"),
    ],
)
def test_no_argument_is_passed_over(command, said, place, capsys):
    (place / "model.gguf").write_bytes(b"")
    assert main(command) == 2
    assert f"error: {said}" in capsys.readouterr().err
