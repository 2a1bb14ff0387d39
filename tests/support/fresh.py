"""Code in interpreters that have not imported PEFT, or do not have peft_sgrq: forks of one that has imported torch."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

# What takes long in importing bitsandbytes and PEFT is PyTorch's compiler; that is imported before all forks.
# With "warm", transformers is imported before the fork too: it imports neither bitsandbytes nor PEFT.
_SERVER = """
import gc, json, os, sys, tempfile, traceback
import torch._inductor.compile_fx, accelerate
pieces = json.load(sys.stdin)
results = {}
for warm in (False, True):
    if warm:
        import transformers.modeling_utils, transformers.pipelines
    assert not {"peft", "bitsandbytes", "peft_sgrq", "trl"} & set(sys.modules)
    gc.freeze()  # what is imported stays: no collection in a fork need look through it
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


# An interpreter that has all packages but peft_sgrq; transformers is imported before all forks, which takes longest.
_ELSEWHERE = """
import gc, importlib.util, json, os, sys, tempfile, traceback
import torch, transformers.modeling_utils
assert importlib.util.find_spec("peft_sgrq") is None
os.dup2(2, 1)
gc.freeze()
for line in sys.stdin:
    piece = json.loads(line)
    with tempfile.TemporaryFile("w+") as report:
        pid = os.fork()
        if pid == 0:
            try:
                os.chdir(piece["directory"])
                sys.argv[1:] = piece["arguments"]
                exec(compile(piece["code"], "elsewhere", "exec"), {"__name__": "__main__"})
            except BaseException:
                traceback.print_exc(file=report)
            report.flush()
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        report.seek(0)
        error = report.read() or (f"the interpreter died: {status}" if status else "")
    answers.write(json.dumps(error) + chr(10))
    answers.flush()
"""


@functools.cache
def _elsewhere() -> subprocess.Popen[str]:
    """The one such interpreter of this process; it ends with it."""
    scratch = tempfile.TemporaryDirectory()
    atexit.register(scratch.cleanup)
    places = [Path(path) for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    sites = []  # one for each place: a namespace package such as optimum may have parts in several
    for index, place in enumerate(places):
        site = Path(scratch.name) / f"site-{index}" / "site-packages"
        site.mkdir(parents=True)
        for entry in place.iterdir():
            if "peft_sgrq" not in entry.name:
                (site / entry.name).symlink_to(entry)
        sites.append(str(site))
    code = "import os\nanswers = os.fdopen(os.dup(1), 'w')\n" + _ELSEWHERE
    return subprocess.Popen(
        [sys.executable, "-S", "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sites)},
        cwd=scratch.name,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def run_where_not_installed(code: str, directory: Path, *arguments: str) -> None:
    """Runs code in an interpreter that has all packages but peft_sgrq; raises with its error if it fails.

    Args:
        code (`str`): The code; `sys.argv[1:]` holds the arguments.
        directory (`Path`): Where it runs.
        arguments (`str`): For the code.
    """
    process = _elsewhere()
    piece = {"code": code, "directory": str(directory), "arguments": arguments}
    print(json.dumps(piece), file=process.stdin, flush=True)
    answer = process.stdout.readline()
    assert answer, f"the interpreter did not start, or died: {process.wait()}"
    error = json.loads(answer)
    assert not error, error[-3000:]


_RELOAD = """
import json, sys, traceback, torch
target, plan, ids = sys.argv[1:]
ids, found = torch.load(ids), {}
for name, (code, directory) in json.load(open(plan)).items():
    try:
        names = {"directory": directory, "torch": torch}
        exec(code, names)
        with torch.no_grad():
            found[name] = names["model"].eval()(input_ids=ids).logits
    except Exception:
        found[name] = traceback.format_exc()
torch.save(found, target)
"""


def logits_where_not_installed(
    plan: dict[str, tuple[str, Path]], ids: torch.Tensor, scratch: Path
) -> dict[str, torch.Tensor | str]:
    """Logits of saved models by an interpreter that has all packages but peft_sgrq, or the traceback of what failed.

    Args:
        plan (`dict`): For each name the code that sets `model` from `directory`, and that directory.
        ids (`torch.Tensor`): The tokens, int64 `[B, S]`.
        scratch (`Path`): A directory to work in.
    """
    (scratch / "plan.json").write_text(json.dumps({name: (code, str(path)) for name, (code, path) in plan.items()}))
    torch.save(ids, scratch / "ids.pt")
    names = ("reloaded.pt", "plan.json", "ids.pt")
    run_where_not_installed(_RELOAD, scratch, *(str(scratch / name) for name in names))
    return torch.load(scratch / "reloaded.pt")
