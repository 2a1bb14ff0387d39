"""The command of a script that makes tables of files of results and puts them into a page.

On a page the tables of a file stand between `<!-- NAME.json -->` and `<!-- end of NAME.json -->`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from markdown_tables import put_between
from results_file import replace_text


def print_or_update(text: str | None, describe: Callable[[Any], str]) -> None:
    """Runs the command.

    Args:
        text (`str` or `None`): The docstring of the script, for `--help`.
        describe (`Callable`): Makes Markdown of what a file holds.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--update", type=Path, help="a Markdown file to put the tables into, between their marks")
    arguments = parser.parse_args()
    tables = {path.name: describe(json.loads(path.read_text())) for path in arguments.results}
    if arguments.update is None:
        print("\n\n".join(tables.values()))
        return
    page = arguments.update.read_text(encoding="utf-8")
    for name, table in tables.items():
        page = put_between(page, f"<!-- {name} -->", f"<!-- end of {name} -->", table)
    replace_text(arguments.update, page)
