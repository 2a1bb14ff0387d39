"""The tables of the pages are those that their own commands make of the results in this repository."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

import pytest
from comparison.commonsense_table import accuracy_table

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from examples.benchmarks import report  # noqa: E402

RESULTS = ROOT / "docs" / "results"
COMMAND = re.compile(r"^\s*python examples/benchmarks/(\w+)\.py (.+ --update .+)$", re.MULTILINE)
COMMANDS = {
    script: arguments
    for page in sorted((ROOT / "docs").rglob("*.md"))
    for script, arguments in COMMAND.findall(page.read_text(encoding="utf-8").replace("\\\n", " "))
}


def expanded(argument: str) -> list[str]:
    """What a shell makes of an argument with `{a,b}` and `*`."""
    braces = re.search(r"\{(.*)\}", argument)
    options = [argument.replace(braces[0], option) for option in braces[1].split(",")] if braces else [argument]
    return [found for option in options for found in (sorted(map(str, Path().glob(option))) or [option])]


def test_every_page_of_results_has_its_command():
    assert set(COMMANDS) == {
        "gguf_report", "methods_report", "rates_report", "recovery_table", "rotation_table", "selection_table",
    }  # fmt: skip


@pytest.mark.parametrize("script", COMMANDS)
def test_the_command_of_a_page_leaves_it_as_it_is(script, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    before, pages = COMMANDS[script].split(" --update ")
    arguments = [part for argument in shlex.split(before.split(" --plots ")[0]) for part in expanded(argument)]
    copies = {page: tmp_path / Path(page).name for page in shlex.split(pages)}
    for page, copy in copies.items():
        copy.write_bytes(Path(page).read_bytes())
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments, "--update", *map(str, copies.values())])
    importlib.import_module(script).main()
    for page, copy in copies.items():
        assert copy.read_text(encoding="utf-8") == Path(page).read_text(encoding="utf-8"), page


def test_the_tables_of_speed_are_those_of_the_results(tmp_path):
    page = ROOT / "docs" / "speed.md"
    copy = tmp_path / page.name
    copy.write_bytes(page.read_bytes())
    report.update(copy, json.loads((RESULTS / "speed-cpu.json").read_text()))
    assert copy.read_text(encoding="utf-8") == page.read_text(encoding="utf-8")


def test_the_table_of_multiple_choice_tasks_is_that_of_the_results():
    (setting,) = json.loads((RESULTS / "commonsense-smollm2.json").read_text())
    assert accuracy_table(setting) in (ROOT / "docs" / "real-model.md").read_text(encoding="utf-8")


# Which runs a row of the README has.
ROWS = {
    "SGRQ": "peqa",
    "SGRQ, `ratio=0.4`": "sgrq-0.4:diag",
    "LoRA r=16": "lora-16",
    "LoRA r=16, merged before quantization": "lora-16:original",
}


def test_the_table_of_the_readme_has_the_numbers_of_the_results():
    settings = json.loads((RESULTS / "real-smollm2.json").read_text())
    (setting,) = [s for s in settings if s["shared"]["base"] == "nf4" and "recover" not in s["shared"]]
    found: dict[tuple[str, float], list[tuple[float, float, float]]] = defaultdict(list)
    for run in setting["runs"]:
        losses = run["tuned"]["test"], run["merged"]["test"], run["merged"]["other"]
        found[run["method"], run["learning_rate"]].append(losses)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## What it learns")[2].partition("## ")[0].replace("**", "")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:2] == "| "]
    head, before, *tuned = rows
    untrained = setting["untrained"]
    assert before == ["before", "", "", f"{untrained['test']:.2f}", f"{untrained['other']:.2f}"]
    assert len(head) == 5 and len(tuned) == 7
    for name, rate, *cells in tuned:
        runs = found[ROWS[name], float(rate)]
        assert cells == [f"{mean(losses):.2f}" for losses in zip(*runs, strict=True)], (name, rate)
