"""What the README and the pages of docs print runs as it is printed, in order; and what they say is checked here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from support.printed_blocks import ROOT, blocks_of, make_hub, run_blocks
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_sgrq.base.workarounds.bnb_cpu_packing import disable_cpu_packing

pytestmark = pytest.mark.slow

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = ["README.md", "docs/howto.md", "docs/quickstart.ipynb"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    make_hub(folder)
    return folder


@pytest.mark.parametrize("page", RUN)
def test_a_page_runs_from_top_to_bottom(page, hub: Path, tmp_path: Path, monkeypatch):
    for folder in hub.iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    names = run_blocks(blocks_of(ROOT / page))
    if page == "docs/howto.md":
        return
    # What a server would get: the merged model with its tokenizer, and the outputs of the adapter.
    tokenizer = AutoTokenizer.from_pretrained("smollm2-merged")
    served = AutoModelForCausalLM.from_pretrained("smollm2-merged").eval()
    for model in (served, names["merged"].eval()):
        disable_cpu_packing(model)
    ids = tokenizer("Why is the sky blue?", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(served(ids).logits, names["merged"](ids).logits)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page: Path):
    for target in re.findall(r"\]\((?!https?://)([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_readme_is_one_screen_with_one_result_table():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 900
    assert len(re.findall(r"^\|-", text, flags=re.MULTILINE)) == 2  # what was measured, and what can be tuned


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert not [page.name for page in PAGES[1:] if page.name != "README.md" and f"({page.name})" not in index]


def test_no_text_says_that_the_package_is_in_an_index():
    pattern = re.compile(r"pip install[^\n`]*\bpeft[-_]sgrq\b(?!/)")
    files = [*PAGES, *(path for room in ("peft_sgrq", "examples") for path in (ROOT / room).rglob("*.py"))]
    assert not [path.name for path in files if pattern.search(path.read_text(encoding="utf-8"))]


def test_the_constraints_differ_in_what_gptqmodel_asks_for_alone():
    plain, gptq = (
        {line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")}
        for name in ("constraints.txt", "constraints-gptq.txt")
    )
    assert {line.partition("==")[0] for line in plain ^ gptq} == {"torch", "triton"}
