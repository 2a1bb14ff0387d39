"""Scripts find what they import when they are run as their docstrings say, where no test has set a path."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Runs every script up to its `main`, each with the path that `python SCRIPT` or `python -m MODULE` gives it.
IMPORT_ALL = """
import json, runpy, sys
before = set(sys.modules)
for script, first in json.loads(sys.argv[1]):
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(sys.argv[2]):
            del sys.modules[name]
    sys.path[0] = first
    runpy.run_path(script, run_name="script")
"""


@pytest.mark.slow
def test_every_script_finds_what_it_imports():
    scripts = [path for path in sorted(ROOT.glob("examples/**/*.py")) if "__main__" in path.read_text()]
    paths = [
        (str(path), str(ROOT if f"python -m examples.benchmarks.{path.stem}" in text else path.parent))
        for path in scripts
        if path.stem != "__main__"
        for text in [path.read_text()]
    ]
    assert len(paths) > 20
    command = [sys.executable, "-c", IMPORT_ALL, json.dumps(paths), str(ROOT / "examples")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
