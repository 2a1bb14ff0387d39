"""Results: one JSON file, a list of settings (what all runs in it share), each with its runs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from results_file import ResultsFile, named

STATES = ("tuned", "merged")
_NOT_SHARED = ("methods", "seeds", "results", "limit", "rates", "factor", "refine", "centre", "at", "cost")
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "hqq", "gptqmodel")

Run = dict[str, Any]


class Results(ResultsFile):
    """The setting of some arguments in a file of results."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        given = {key: value for key, value in vars(arguments).items() if key not in _NOT_SHARED}
        if not given.get("chat"):  # as in results from before there were chats
            given = {key: value for key, value in given.items() if key not in ("chat", "rows")}
        shared = {key: named(value) for key, value in given.items() if (key, value) != ("recover", None)}
        versions = {name: number for name in _PACKAGES if (number := version_of(name)) is not None}
        super().__init__(arguments.results, shared, versions, {"unavailable": {}, "same": {}})

    def runs(self, method: str, seed: int | None = None) -> list[Run]:
        """The runs of a method, of one seed or of all."""
        return [run for run in self.setting["runs"] if run["method"] == method and seed in (None, run["seed"])]

    def find(self, method: str, seed: int, rate: float) -> Run | None:
        return next((run for run in self.runs(method, seed) if run["learning_rate"] == rate), None)


def best_rate(runs: list[Run], state: str) -> float | None:
    """The learning rate with the lowest validation loss at the first seed; `None` where the state does not exist.

    Args:
        runs (`list[Run]`): Of one method.
        state (`str`): "tuned" or "merged".
    """
    first = min((run["seed"] for run in runs), default=None)
    found = [run for run in runs if run["seed"] == first and run[state] is not None]
    return min(found, key=lambda run: loss_of(run, state))["learning_rate"] if found else None


def loss_of(run: Mapping[str, Any], state: str) -> float:
    """The validation loss; infinite where training diverged."""
    value = run[state]["validation"]
    return float("inf") if value is None else value


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
