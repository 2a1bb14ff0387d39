"""Code in interpreters that have not imported PEFT yet: one process that imports torch, then a fork for each piece."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

# What takes long in importing bitsandbytes and PEFT is PyTorch's compiler; that is imported before all forks.
# With "warm", transformers is imported before the fork too: it imports neither bitsandbytes nor PEFT.
_SERVER = """
import json, os, sys, tempfile, traceback
import torch._inductor.compile_fx, accelerate
pieces = json.load(sys.stdin)
results = {}
for warm in (False, True):
    if warm:
        import transformers.modeling_utils, transformers.pipelines
    assert not {"peft", "bitsandbytes", "peft_sgrq", "trl"} & set(sys.modules)
    for name, piece in pieces.items():
        if piece["warm"] != warm:
            continue
        with tempfile.TemporaryFile("w+") as report:
            pid = os.fork()
            if pid == 0:
                try:
                    os.environ.update(piece["env"])
                    sys.path[:0] = piece["path"]
                    exec(compile(piece["code"], name, "exec"), {"__name__": "__main__"})
                    report.write("passed")
                except BaseException:
                    traceback.print_exc(file=report)
                report.flush()
                os._exit(0)
            os.waitpid(pid, 0)
            report.seek(0)
            results[name] = report.read() or "the interpreter died"
print("RESULTS" + json.dumps(results))
"""


def piece(code: str, warm: bool = True, path: tuple[str, ...] = (), **env: str) -> dict:
    """Code that raises if something is wrong, with environment variables and what to put in front of `sys.path`."""
    return {"code": code, "warm": warm, "path": list(path), "env": env}


def run_fresh(pieces: dict[str, dict]) -> dict[str, str]:
    """Runs each piece in its own interpreter; "passed" or the traceback for each."""
    done = subprocess.run(
        [sys.executable, "-c", _SERVER], input=json.dumps(pieces), capture_output=True, text=True, timeout=300
    )
    assert "RESULTS" in done.stdout, done.stderr
    return json.loads(done.stdout.rpartition("RESULTS")[2])


def run_where_not_installed(code: str, scratch: Path, *arguments: str) -> None:
    """Runs code in an interpreter that has all packages but peft_sgrq; raises with its error output if it fails.

    Args:
        code (`str`): The code; `sys.argv[1:]` holds the arguments.
        scratch (`Path`): A directory to work in.
        arguments (`str`): For the code.
    """
    places = [Path(path) for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    sites = []  # one for each place: a namespace package such as optimum may have parts in several
    for index, place in enumerate(places):
        site = scratch / f"site-{index}" / "site-packages"
        site.mkdir(parents=True)
        for entry in place.iterdir():
            if "peft_sgrq" not in entry.name:
                (site / entry.name).symlink_to(entry)
        sites.append(str(site))
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sites)},
        cwd=scratch,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
