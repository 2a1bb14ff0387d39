"""The command as a process: interrupted, its output closed, given names that are nowhere. No traceback, no waiting."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from support.saliencies import example

from peft_sgrq import cli
from peft_sgrq.cli import main
from peft_sgrq.files.hub import check_source
from peft_sgrq.files.output import written

COMMANDS: dict[str, list[str]] = {
    "allocate": ["allocate", "MODEL", "DATA", "-o", "OUT"],
    "calibrate": ["calibrate", "MODEL", "DATA", "-o", "OUT"],
    "inspect": ["inspect", "ADAPTER"],
    "merge": ["merge", "ADAPTER", "OUT", "--base", "MODEL"],
    "recover": ["recover", "MODEL", "--reference", "REFERENCE", "--data", "DATA", "-o", "OUT"],
    "rotate": ["rotate", "MODEL", "-o", "OUT"],
    "verify": ["verify", "ADAPTER", "MERGED", "--base", "MODEL"],
}
each = pytest.mark.parametrize("command", COMMANDS)


def test_these_are_all_commands():
    assert tuple(COMMANDS) == cli.COMMANDS


def process(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """The installed command's own two lines, under its name."""
    code = "import sys; sys.argv[0] = 'peft-sgrq'; from peft_sgrq.cli import main; sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


# interrupted


@each
@pytest.mark.parametrize("place", ["parsing", "importing", "running"])
def test_ctrl_c_ends_every_command_with_a_line(command, place, monkeypatch, capsys):
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    where = {"parsing": "build_parser", "importing": "import_module"}
    if place == "running":
        monkeypatch.setattr(f"peft_sgrq.cli.{command}.check", lambda args: None)
        monkeypatch.setattr(f"peft_sgrq.cli.{command}.run", interrupt)
    else:
        monkeypatch.setattr(cli, where[place], interrupt)
    monkeypatch.setattr(sys, "argv", ["peft-sgrq", *COMMANDS[command]])
    assert main() == 130
    assert capsys.readouterr().err == "peft-sgrq: interrupted\n"


@pytest.fixture
def handled():
    """Puts handlers of signals back that a test sets; `nohup` has a process and what it starts ignore one."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_told_to_end_leaves_nothing_half_written(number, handled, monkeypatch, tmp_path: Path):
    signal.signal(number, signal.SIG_DFL)

    def end(args: Any) -> int:
        with written(tmp_path / "new" / "file") as scratch:
            Path(scratch).write_bytes(b"half")
            os.kill(os.getpid(), number)
            time.sleep(10)
        return 0

    monkeypatch.setattr("peft_sgrq.cli.merge.check", lambda args: None)
    monkeypatch.setattr("peft_sgrq.cli.merge.run", end)
    monkeypatch.setattr(sys, "argv", ["peft-sgrq", *COMMANDS["merge"]])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 128 + number and not list(tmp_path.iterdir())
    assert signal.getsignal(number) is signal.SIG_DFL


def test_a_command_goes_on_where_a_signal_is_to_be_ignored(handled, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr("peft_sgrq.cli.merge.check", lambda args: None)
    monkeypatch.setattr("peft_sgrq.cli.merge.run", lambda args: os.kill(os.getpid(), signal.SIGHUP) or 0)
    monkeypatch.setattr(sys, "argv", ["peft-sgrq", *COMMANDS["merge"]])
    assert main() == 0
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@pytest.mark.slow
def test_ctrl_c_while_libraries_are_imported_prints_no_traceback(tmp_path: Path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
    running = process("inspect", str(tmp_path))
    time.sleep(2)  # of the ten or so that PEFT and transformers take
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=120)
    assert "Traceback" not in errors
    assert running.returncode in (130, 2)  # 2: it was faster


# closed


@pytest.mark.parametrize("size", [10, 1 << 20])
@each
def test_a_closed_pipe_ends_every_command_without_a_word(command, size, monkeypatch, capfd):
    def show(args: Any) -> int:
        print("x" * size)
        return 0

    monkeypatch.setattr(f"peft_sgrq.cli.{command}.check", lambda args: None)
    monkeypatch.setattr(f"peft_sgrq.cli.{command}.run", show)
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", buffering=1 << 16) as stream, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", stream)
        assert main(COMMANDS[command]) == 141
        stream.flush()  # nothing is left that could fail at the end
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_head_gets_its_lines_and_nothing_is_said(tmp_path: Path):
    example().save(tmp_path / "s.safetensors")
    for arguments in (["--help"], ["inspect", str(tmp_path / "s.safetensors"), "--json"]):
        running = process(*arguments)
        assert running.stdout is not None and running.stderr is not None
        running.stdout.close()
        errors = running.stderr.read()
        # argparse passes over what it cannot print.
        assert running.wait(120) in ((0, 141) if arguments == ["--help"] else (141,))
        assert "Broken pipe" not in errors and "Traceback" not in errors and "Exception" not in errors


def test_help_is_at_once():
    started = time.process_time()
    code = "import sys; sys.argv[0] = 'peft-sgrq'; import peft_sgrq.cli; print([m for m in sys.modules if m in "
    code += "('torch', 'peft', 'transformers')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    assert time.process_time() - started < 5


@pytest.mark.slow
def test_what_is_written_to_the_standard_output_is_not_mixed_with_what_is_said(tmp_path: Path):
    example().save(tmp_path / "s.safetensors")
    code = (
        "import sys; from peft_sgrq.selection.saliency import Saliency; Saliency.load(sys.argv[1]).save('/dev/stdout')"
    )
    with open(tmp_path / "led", "wb") as file:
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "s.safetensors")], stdout=file, check=True)
    assert (tmp_path / "led").read_bytes() == (tmp_path / "s.safetensors").read_bytes()


# names that are nowhere


PATHS = ["./x", "../x", "/x/y", "x/y/z", "~/x", "x y", "x.safetensors", "./x.gguf", "x/"]


@pytest.fixture
def no_hub(monkeypatch) -> None:
    """A Hub that must not be asked."""

    def ask(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", ask)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", ask)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_the_hub_is_not_asked_for_what_can_only_be_a_path(name, kind, no_hub):
    of_file = name.endswith((".safetensors", ".gguf"))
    expected = "file" if of_file else "folder" if kind == "model" else "file or folder"
    with pytest.raises(ValueError, match=f"is no {expected} here, expected its path"):
        check_source(name, "thing", kind=kind)


@pytest.mark.parametrize(
    ("command", "wrong"), [(c, w) for c, a in COMMANDS.items() for w in a if w.isupper() and w != "OUT"]
)
@pytest.mark.parametrize("offline", [True, False])
def test_every_command_says_at_once_which_path_is_nowhere(
    command, wrong, offline, nested, tmp_path, capsys, no_hub, monkeypatch
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    (tmp_path / "data.txt").write_text("Some text.")
    there = {"MODEL": nested[0], "ADAPTER": nested[1], "REFERENCE": nested[0], "MERGED": nested[0]}
    there |= {"DATA": tmp_path / "data.txt", "OUT": tmp_path / "out"}
    names = {key: str(path) for key, path in there.items()} | {wrong: str(tmp_path / "nowhere")}
    started = time.perf_counter()
    assert main([names.get(argument, argument) for argument in COMMANDS[command]]) == 2
    assert time.perf_counter() - started < 10
    error = capsys.readouterr().err
    assert f"{names[wrong]!r} is no f" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_hub_is_asked_once_for_what_may_be_a_name(monkeypatch):
    asked = []

    def fail(self: Any, name: str, **kwargs: Any) -> None:
        asked.append(name)
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", fail)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("peft_sgrq.files.hub.time.sleep", lambda seconds: None)
    for name in ("org/nothing", "nothing"):
        with pytest.raises(ValueError, match=r"could not be had from the Hub \(which cannot be reached: no route\)"):
            check_source(name, "model")
    assert asked == ["org/nothing"] * 2 + ["nothing"] * 2
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        check_source("org/nothing", "model")


def test_what_is_here_or_in_the_cache_or_on_the_hub_is_taken(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    (tmp_path / "models--org--cached" / "snapshots").mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", None)
    check_source("org/cached", "model")
    check_source(tmp_path, "model")
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda self, name, **kwargs: None)
    check_source("org/there", "model")


# at once


_ROTATE, _ALLOCATE = ["rotate", "base", "-o", "out"], ["allocate", "base", "text.txt", "-o", "out"]
USAGE = [
    ([], 0, "COMMAND"),
    (["--help"], 0, "verify"),
    (["--version"], 0, "peft-sgrq "),
    *(([name, "--help"], 0, "usage: peft-sgrq") for name in COMMANDS),
    (["nothing"], 2, "invalid choice: 'nothing'"),
    (["merge", "adapter"], 2, "MERGED"),
    (["inspect", "x", "--ratio", "kne"], 2, '\'kne\', expected a number in (0, 1] or one of "knee", "global"'),
    (["inspect", "x", "--budget", "none"], 2, "expected a share of all scales"),
    (["calibrate", "m", "d", "-o", "o", "--criterion", "best"], 2, "one of obs, billm, diag, error, fisher, gradient"),
    (["recover", "m", "--reference", "r", "--data", "d", "-o", "o", "--ratio", "2"], 2, "a share of the scales"),
    # of files; base, an adapter and text.py are there
    (["merge", "base", "out"], 2, "base holds no adapter, expected adapter_config.json"),
    (["verify", "base", "base"], 2, "base holds no adapter"),
    (["inspect", "base"], 2, "base holds no adapter"),
    (["merge", "adapter", "base"], 2, "base exists already, expected a folder to be made"),
    (["merge", "adapter", "out", "--base", "./nowhere"], 2, "'./nowhere' is no folder here"),
    (["calibrate", "base", "text.py", "-o", "out"], 2, "text.py ends in '.py', expected a text file"),
    (["recover", "base", "--reference", "./nowhere", "--data", "text.py", "-o", "out"], 2, "'./nowhere' is no folder"),
    (["rotate", "base", "-o", "adapter"], 2, "'adapter' exists already, expected a new folder"),
    (["allocate", "base", "text.py", "-o", "base"], 2, "'base' is a folder, expected a file"),
    *(([*_ROTATE, *words], 2, told) for words, told in (
        (["--rotations", "R5"], "'R5' (choose from"), (["--scheme", "W4"], "expected weights, activations and KV"),
        (["--select", "measured"], "--select measured needs data"), (["--dtype", "int"], "choice: 'int'"),
        (["--group-size", "0"], "`group_size` is 0"),
    )),
    *(([*_ALLOCATE, *words], 2, told) for words, told in (
        (["--bits", "few"], "'few', expected a number of bits a weight"), (["--bits", "nan"], "'nan', expected"),
        (["--widths", "1"], "choice: 1"), (["--criterion", "best"], "choice: 'best'"),
        (["--pairs"], "--pairs needs --criterion measured"), (["--group-size", "0"], "`group_size` is 0"),
    )),
]  # fmt: skip


def test_help_and_mistakes_are_answered_without_the_libraries(tmp_path: Path):
    for name in ("base/config.json", "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "text.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    code = (
        "import json, sys; sys.argv[0] = 'peft-sgrq'; from peft_sgrq.cli import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    status = main(words); print('STATUS', status); print('STATUS', status, file=sys.stderr)\n"
        "print([name for name in ('torch', 'peft', 'accelerate', 'numpy') if name in sys.modules])"
    )
    given = json.dumps([words for words, _, _ in USAGE])
    run = subprocess.run([sys.executable, "-c", code, given], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.endswith("[]\n")
    told = zip(run.stdout.split("STATUS ")[:-1], run.stderr.split("STATUS ")[:-1], USAGE, strict=True)
    for number, (out, error, (words, status, text)) in enumerate(told):
        assert text in (error if status else out), (number, words)


def test_the_merged_model_has_the_same_place_in_both_commands():
    parser = cli.build_parser()
    for words in (["merge", "ADAPTER", "MERGED"], ["verify", "ADAPTER", "MERGED"]):
        assert parser.parse_args(words).adapter == "ADAPTER" and parser.parse_args(words).base is None
        assert parser.parse_args([*words, "--base", "BASE"]).base == "BASE"
