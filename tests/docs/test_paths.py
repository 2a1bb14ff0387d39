"""Files that documents and docstrings name are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# A path from the root of the checkout, and a link of a document to another file.
_PATH = re.compile(r"\b(?:peft_sgrq|tests|examples|docs)/[\w./-]+\.(?:py|md|yaml|ipynb)\b")
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)(?:#[^)]*)?\)")


def documents() -> list[Path]:
    found = [ROOT / "README.md", ROOT / "Makefile", *(ROOT / "docs").rglob("*.md")]
    return [*found, *(ROOT / "peft_sgrq").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_files_it_names_are_there(path: Path):
    text = path.read_text(encoding="utf-8")
    named = {ROOT / name for name in _PATH.findall(text)}
    if path.suffix == ".md":
        named |= {(path.parent / name).resolve() for name in _LINK.findall(text)}
    missing = sorted(str(name.relative_to(ROOT)) for name in named if not name.exists())
    assert not missing, f"{path.relative_to(ROOT)} names {missing}"
