"""Running the code that errors and model cards print."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from peft import PeftModel
from torch import nn

_NAME = re.compile(r"\b(?:Auto\w+|\w+Config|\w+Model|\w+For\w+)(?=[.(])")
PLACEHOLDER = "path or Hub name of this adapter"


def blocks(adapter: Path) -> list[str]:
    """The Python blocks of an adapter's card, with the adapter in the place that is left for it."""
    text = (adapter / "README.md").read_text()
    return [
        block.replace(PLACEHOLDER, str(adapter))
        for block in re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    ]


def run_card(adapter: Path, scratch: Path) -> dict[str, Any]:
    """Runs the blocks of a card one after the other, as a reader would, in a folder of their own."""
    names: dict[str, Any] = {}
    load, *others = blocks(adapter)
    exec(load, names)
    names["loaded"] = names["model"]
    here = os.getcwd()
    scratch.mkdir()
    os.chdir(scratch)
    try:
        for block in others:
            exec(block, names)
    finally:
        os.chdir(here)
    return names


def refusal(adapter: Path, wrong: nn.Module) -> str:
    """What is said when an adapter is loaded onto a model that is not its base."""
    with pytest.raises(ValueError, match="load") as caught:
        PeftModel.from_pretrained(wrong, adapter)
    return str(caught.value)


def run_refusal(text: str) -> Any:
    """The base that the code in a refusal loads; names of transformers are taken for granted in it."""
    code = re.search(
        r"load the base with (\w+\.from_pretrained\(.*\))(?: as `base`, and then run `|[.,] To use)", text
    )
    code = code or re.search(r"load it on the base it was trained on: (\w+\.from_pretrained\(.*\))", text)
    code = code or re.search(r"load the base with (\w+\.from_pretrained\(.*?\)) and, if its groups were split", text)
    assert code, text
    names: dict[str, Any] = {name: getattr(transformers, name) for name in _NAME.findall(code[1])}
    names["base"] = eval(code[1], names)
    statements = re.search(r" as `base`, and then run `(.*?)`", text)
    if statements:
        exec(statements[1], names)
    return names["base"]
