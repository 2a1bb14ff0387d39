"""Files that a user names are written whole, and nothing that is no file, or not named, is lost."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.saliencies import example

from peft_sgrq import SGRQConfig, merge_checkpoint
from peft_sgrq.adapter.card import write_model_card
from peft_sgrq.cli import main
from peft_sgrq.files.output import check_output, written
from peft_sgrq.files.output_folder import check_output_folder, written_folder
from peft_sgrq.recovery.progress import ProgressFile
from peft_sgrq.selection.report.plot import plot_report
from peft_sgrq.selection.report.report import report_saliency

DATA = b"all of it"


def write(path: Any) -> None:
    with written(path) as file:
        Path(file).write_bytes(DATA)


def device(path: Path, number: int = 3) -> None:
    """A character device: /dev/null's unless another number is given."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, number))
        with open(path, "wb"):
            pass
    except PermissionError:
        pytest.skip("devices can only be made by root, and not in every container")


def save_saliency(path: Path) -> None:
    example().save(path)


def save_picture(path: Path) -> None:
    pytest.importorskip("matplotlib")
    saliency = example()
    saliency.layers = {f"layers.0.{name}": layer for name, layer in saliency.layers.items()}
    plot_report(report_saliency(saliency, 0.5), path)


def save_card(path: Path) -> None:
    folder = path.parent / "card"
    folder.mkdir()
    save_file({"a.weight": torch.ones(1)}, folder / "adapter_model.safetensors")
    (folder / "README.md").symlink_to(path)
    write_model_card(str(folder), SGRQConfig())
    assert (folder / "README.md").is_symlink()


writers = pytest.mark.parametrize("save", [write, save_saliency, save_picture])


@pytest.mark.parametrize("save", [write, save_saliency, save_picture, save_card])
@pytest.mark.parametrize("there", [True, False], ids=["link", "dangling link"])
def test_links_are_followed_and_stay(save: Callable[[Path], None], there, tmp_path: Path):
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "target", tmp_path / "link"
    before = b"---\n---\nbefore"  # a card, too
    if there:
        target.write_bytes(before)
    link.symlink_to(Path("real") / "target")
    save(link)
    assert link.is_symlink() and target.read_bytes() not in (b"", before)
    assert [path.name for path in target.parent.iterdir()] == ["target"]


@writers
def test_a_device_stays_a_device(save, tmp_path: Path):
    path = tmp_path / "null"
    device(path)
    check_output(path)
    save(path)
    assert stat.S_ISCHR(os.stat(path).st_mode)
    assert [found.name for found in tmp_path.iterdir()] == ["null"]
    link = tmp_path / "link"
    link.symlink_to(path)
    save(link)
    assert link.is_symlink() and stat.S_ISCHR(os.stat(path).st_mode)


@writers
def test_a_pipe_gets_what_the_file_would(save, tmp_path: Path):
    save(tmp_path / "file")
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    check_output(pipe)  # waits for nobody
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    reader.start()
    save(pipe)
    reader.join(20)
    assert found and len(found[0]) == (tmp_path / "file").stat().st_size
    assert stat.S_ISFIFO(os.stat(pipe).st_mode)


def test_a_pipe_that_is_closed_early_is_said_to_be(tmp_path: Path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: open(pipe, "rb").close())
    reader.start()
    with pytest.raises(ValueError, match="was closed by what reads it"), written(pipe) as file:
        Path(file).write_bytes(b"x" * (1 << 22))
    reader.join(20)


@pytest.mark.parametrize("check", [check_output, write, save_saliency])
def test_folders_sockets_and_places_without_a_folder_are_refused(check, tmp_path: Path, monkeypatch):
    with socket.socket(socket.AF_UNIX) as listening:
        monkeypatch.chdir(tmp_path)  # names of sockets are short
        listening.bind("socket")
        (tmp_path / "file").write_bytes(b"mine")
        (tmp_path / "folder").mkdir()
        (tmp_path / "loop").symlink_to("loop")
        before = sorted(path.name for path in tmp_path.iterdir())
        for name in ("folder", "socket", "file/s", "loop", "new/", "folder/"):
            with pytest.raises((ValueError, OSError)):
                check(f"{tmp_path}/{name}")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_checking_leaves_nothing_and_takes_nothing(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"mine")
    for path in (tmp_path / "file", tmp_path / "new", tmp_path / "a" / "b" / "c"):
        check_output(path)
    check_output_folder(tmp_path / "x" / "y")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    write(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").read_bytes() == DATA


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError])
def test_what_fails_leaves_what_was_there(error, tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(error), written(path) as file:
        Path(file).write_bytes(b"half")
        raise error("stop")
    assert path.read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1


def test_permissions_stay_and_new_files_get_the_usual_ones(tmp_path: Path):
    path, usual = tmp_path / "file", tmp_path / "usual"
    usual.write_bytes(b"")
    write(path)
    assert path.stat().st_mode == usual.stat().st_mode
    path.chmod(0o640)
    write(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


_UNPRIVILEGED = """
import os, sys
from pathlib import Path
from peft_sgrq.files.output import check_output, written
if os.geteuid() == 0:
    os.setegid(65534), os.seteuid(65534)
def outcome(path):
    try:
        check_output(path)
    except ValueError as error:
        assert "cannot be written (Permission denied)" in str(error), error
        return "refused"
    with written(path) as file:
        Path(file).write_bytes(b"new")
    return Path(path).read_bytes()
"""


@pytest.fixture
def place_for_all() -> Iterator[Path]:
    """A folder that every user may use, which pytest's own are not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_files_and_folders_that_may_not_be_written_to_are_left_alone(place_for_all: Path):
    protected, closed = place_for_all / "protected", place_for_all / "closed"
    protected.write_bytes(b"mine")
    protected.chmod(0o444)
    closed.mkdir()
    (closed / "open").write_bytes(b"mine")
    (closed / "open").chmod(0o666)
    closed.chmod(0o555)
    process = os.fork()
    if not process:  # the user nobody, where the tests are run by root
        status = 1
        try:
            names: dict[str, Any] = {}
            exec(_UNPRIVILEGED, names)
            outcome = names["outcome"]
            assert outcome(str(protected)) == outcome(str(closed / "new")) == "refused"
            assert outcome(str(closed / "open")) == b"new"  # into the file itself, as no other can be made
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(process, 0)[1] == 0
    closed.chmod(0o755)
    assert protected.read_bytes() == b"mine" and [path.name for path in closed.iterdir()] == ["open"]


def test_a_full_disk_is_said_with_the_name_of_the_file_or_of_what_is_printed(tmp_path: Path, monkeypatch, capsys):
    device(tmp_path / "full", 7)
    with pytest.raises(OSError, match="No space left") as found:
        write(tmp_path / "full")
    assert found.value.filename == str(tmp_path / "full")
    with pytest.raises(OSError, match="No space left") as found, written(tmp_path / "file"):
        (tmp_path / "full").write_bytes(DATA)
    assert found.value.filename == str(tmp_path / "file") and not (tmp_path / "file").exists()
    example().save(tmp_path / "saliency.safetensors")
    with open(tmp_path / "full", "w") as printed:
        monkeypatch.setattr("sys.stdout", printed)
        assert main(["inspect", str(tmp_path / "saliency.safetensors")]) == 2
    assert "what is printed could not be written: No space left" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["new", "x/y", "there", "link"])
def test_a_folder_is_written_whole_or_not_at_all(place, tmp_path: Path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("real")
    before = sorted(tmp_path.rglob("*"))
    for error in (KeyboardInterrupt, RuntimeError, Exception("No space left on device (os error 28)")):
        expected = OSError if isinstance(error, Exception) else error
        with pytest.raises(expected), written_folder(tmp_path / place) as folder:
            (Path(folder) / "model.safetensors").write_bytes(DATA)
            (Path(folder) / "part").mkdir()
            raise error
        assert sorted(tmp_path.rglob("*")) == before
    with written_folder(tmp_path / place) as folder:
        (Path(folder) / "part").mkdir()
        (Path(folder) / "part" / "config.json").write_bytes(DATA)
        (Path(folder) / "model.safetensors").write_bytes(DATA)
    assert (tmp_path / place / "part" / "config.json").read_bytes() == DATA
    assert not list(tmp_path.rglob(".sgrq*")) and (tmp_path / "link").is_symlink()


def test_progress_is_kept_in_files_alone(tmp_path: Path):
    device(tmp_path / "null")
    os.mkfifo(tmp_path / "pipe")
    for name in ("null", "pipe"):
        with pytest.raises(ValueError, match="a device or a pipe, expected a file"):
            ProgressFile(tmp_path / name, {})
    (tmp_path / "link").symlink_to("progress")
    ProgressFile(tmp_path / "link", {}).save()
    assert (tmp_path / "link").is_symlink() and (tmp_path / "progress").is_file()


def test_a_merge_replaces_folders_alone_and_follows_links(nested, tmp_path: Path):
    base, adapter = nested
    device(tmp_path / "null")
    (tmp_path / "file").write_bytes(b"mine")
    for name in ("null", "file"):
        with pytest.raises(ValueError, match="is no folder"):
            merge_checkpoint(base, adapter, tmp_path / name, overwrite=True)
    assert stat.S_ISCHR(os.stat(tmp_path / "null").st_mode) and (tmp_path / "file").read_bytes() == b"mine"
    (tmp_path / "link").symlink_to("real")
    for overwrite in (False, True):
        report = merge_checkpoint(base, adapter, tmp_path / "link", overwrite=overwrite)
        assert report.out == tmp_path / "link" and (tmp_path / "link").is_symlink()
        assert (tmp_path / "real" / "config.json").is_file()


@pytest.mark.parametrize("output", ["folder", "file/s"])
def test_every_command_looks_at_its_output_first(output, nested, tmp_path: Path, capsys, monkeypatch):
    (tmp_path / "folder" / "full").mkdir(parents=True)
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr("peft_sgrq.files.hub.check_source", None)  # and would come next
    monkeypatch.setattr("peft_sgrq.checkpoint.merge.find_base", None)
    path = str(tmp_path / output)
    commands = [
        ["calibrate", "model", "data", "-o", path],
        ["recover", "model", "--reference", "full", "--data", "data", "-o", path],
        ["merge", str(nested[1]), path],
        ["rotate", "model", "-o", path],
        ["allocate", "model", "data", "-o", path],
        ["allocate", "model", "data", "-o", str(tmp_path / "plan.json"), "--checkpoint", path],
    ]
    for command in commands:
        assert main(command) == 2
        assert path in capsys.readouterr().err
        assert sorted(found.name for found in tmp_path.iterdir()) == ["file", "folder"]
