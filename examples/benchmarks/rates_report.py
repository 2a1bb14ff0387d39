"""The table of `compare_methods.py` by learning rate: what was learnt, what the merge left of it, what was forgotten.

python examples/benchmarks/rates_report.py docs/results/real-smollm2.json --update docs/real-model.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from comparison.rates import rates_table
from markdown_tables import put_between
from results_file import replace_text

_MARK = "<!-- rates: made by examples/benchmarks/rates_report.py -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a JSON file of compare_methods.py")
    parser.add_argument("--update", type=Path, help="a Markdown file to put the table into, between its marks")
    arguments = parser.parse_args()
    settings = json.loads(arguments.results.read_text())
    shared, versions = settings[0]["shared"], settings[0]["versions"]
    text = (
        f"{rates_table(settings)}\n\n{shared['model']}, {shared['steps']} steps of {shared['batch_size']} x "
        f"{shared['length']} tokens at most, {shared['dtype']}; tuned on {shared['train']}, out of domain is "
        f"{shared['other']}. {', '.join(f'{name} {number}' for name, number in versions.items())}. "
        f"{settings[0]['machine']}."
    )
    if arguments.update is None:
        print(text)
    else:
        page = arguments.update.read_text(encoding="utf-8")
        replace_text(arguments.update, put_between(page, _MARK, "<!-- end of rates -->", text))


if __name__ == "__main__":
    main()
