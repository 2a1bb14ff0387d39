r"""Tables and plots of what `compare_methods.py` found.

python examples/benchmarks/methods_report.py docs/results/methods-*.json
python examples/benchmarks/methods_report.py docs/results/methods-*.json --plots docs/results \
    --update docs/results.md docs/results/methods.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from comparison.cross import BROAD, cross_table
from comparison.tables import cost_table, describe, exactness, methods_of, summary_table
from markdown_tables import put_between
from results_file import replace_text

PARTS = ("cross", "summary", "cost", "settings")
MARK = "<!-- {}: made by examples/benchmarks/methods_report.py -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument(
        "--update", nargs="+", type=Path, help="Markdown files to put the tables into, each where it has its marks"
    )
    parser.add_argument("--plots", type=Path, help="a directory to write a picture for each file of results into")
    arguments = parser.parse_args()
    by_file = {path: json.loads(path.read_text()) for path in arguments.results}
    settings = [setting for found in by_file.values() for setting in found]
    texts = {
        "cross": cross_table(settings),
        "summary": f"{summary_table(settings)}\n\n{exactness(settings)}",
        "cost": cost_table(settings),
        "settings": "\n\n".join(map(describe, settings)),
    }
    if arguments.update is None:
        print("\n\n".join(texts.values()))
    else:
        pages = {path: path.read_text(encoding="utf-8") for path in arguments.update}
        for part in PARTS:
            mark = MARK.format(part)
            path = next((path for path, page in pages.items() if mark in page), arguments.update[0])
            pages[path] = put_between(pages[path], mark, f"<!-- end of {part} -->", texts[part])
        for path, page in pages.items():
            replace_text(path, page)
    if arguments.plots is not None:
        from comparison.plots import plot_forgetting

        for path, found in by_file.items():
            broad = [setting for setting in found if len(methods_of(setting["runs"])) >= BROAD]
            plot_forgetting(broad or found, arguments.plots / f"{path.stem}.png")


if __name__ == "__main__":
    main()
