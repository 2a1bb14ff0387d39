"""Runs PEFT's own tests on SGRQ, on models that are not quantized (dense) and on 4-bit ones (nf4).

    python tests/peft_suite/run.py --peft-tests PATH [--base nf4] [--file test_config ...] [-- PYTEST ARGUMENTS]

PATH is the `tests` directory of a checkout of PEFT at the tag of the installed version; nothing of it is kept here.
Prints the failures and a table of counts, and exits with 1 if a test failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
BASES = ("dense", "nf4")
FILES = (
    "test_custom_models",
    "test_decoder_models",
    "test_quantization",
    "test_config",
    "test_low_level_api",
    "test_tuners_utils",
    "test_trainable_tokens",
    "test_initialization",
)
WITHOUT_BASE = ("test_quantization", "test_config")  # quantizes its models itself, and has none
PLUGINS = ("-p", "plugin", "-p", "no:cacheprovider")
OPTIONS = ("-q", "--tb=short", *PLUGINS, "-o", "addopts=", "-o", "filterwarnings=ignore")
OUTCOMES = ("passed", "failed", "skipped", "xfailed")


def run(tests: Path, base: str, name: str, workdir: Path, extra: list[str]) -> Counter[str]:
    """Runs one file of PEFT's tests on one base in a process of its own; how many tests had which outcome."""
    report = workdir / f"{name}-{base}.xml"
    environment = {
        "HF_HUB_OFFLINE": "1",
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "SGRQ_SUITE_BASE": base,
        "SGRQ_SUITE_MODELS": str(workdir),
    }
    command = [sys.executable, "-m", "pytest", *OPTIONS, f"--junitxml={report}", str(tests / f"{name}.py"), *extra]
    subprocess.run(command, cwd=tests.parent, env=environment)
    return count(report) if report.is_file() else Counter(failed=1)


def count(report: Path) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            outcomes["failed"] += 1
        elif skipped is not None:
            outcomes["xfailed" if skipped.get("type") == "pytest.xfail" else "skipped"] += 1
        else:
            outcomes["passed"] += 1
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs PEFT's own tests on SGRQ.")
    parser.add_argument("--peft-tests", type=Path, required=True, help="the `tests` directory of a checkout of PEFT")
    parser.add_argument("--base", action="append", choices=BASES, help="only this base")
    parser.add_argument("--file", action="append", help="only this file, such as test_config")
    parser.add_argument("pytest_arguments", nargs="*", help="passed on, after --")
    arguments = parser.parse_args()
    tests = arguments.peft_tests.resolve()
    if not (tests / "testing_common.py").is_file():
        parser.error(f"{tests} holds no testing_common.py, expected the `tests` directory of a checkout of PEFT")
    counts = {}
    with tempfile.TemporaryDirectory() as workdir:
        for name in arguments.file or FILES:
            for base in BASES[:1] if name in WITHOUT_BASE else arguments.base or BASES:
                counts[name, base] = run(tests, base, name, Path(workdir), arguments.pytest_arguments)
    print(f"\n{'file':<24}{'base':<8}" + "".join(f"{outcome:>10}" for outcome in OUTCOMES))
    for (name, base), outcomes in counts.items():
        print(f"{name:<24}{base:<8}" + "".join(f"{outcomes[outcome]:>10}" for outcome in OUTCOMES))
    return int(any(outcomes["failed"] for outcomes in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
