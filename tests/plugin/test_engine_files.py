"""The configurations of accelerate say what their page says, and the page's tables are those of the results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from examples.benchmarks import distributed, engine_memory  # noqa: E402

FOLDER = ROOT / "examples" / "accelerate"
PAGE = (ROOT / "docs" / "distributed.md").read_text()
ENGINES = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}


@pytest.mark.parametrize("name", ENGINES)
def test_accelerate_reads_each_configuration(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.distributed_type == ENGINES[name] and config.mixed_precision == "no"
    assert f"examples/accelerate/{name}.yaml" in PAGE


def test_there_is_no_other_configuration():
    assert {path.stem for path in FOLDER.iterdir()} == set(ENGINES)


def test_the_engines_are_set_as_the_page_says():
    fsdp = yaml.safe_load((FOLDER / "fsdp2.yaml").read_text())["fsdp_config"]
    assert fsdp["fsdp_version"] == 2 and fsdp["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    assert not fsdp["fsdp_cpu_ram_efficient_loading"]
    for stage in (2, 3):
        zero = yaml.safe_load((FOLDER / f"zero{stage}.yaml").read_text())["deepspeed_config"]
        assert zero["zero_stage"] == stage


def test_the_page_has_the_numbers_of_the_results():
    known = json.loads((ROOT / "docs" / "results" / "distributed-cpu.json").read_text())
    assert distributed.tables(known) in PAGE
    found = [entry for entry in known["entries"] if entry["method"] == "sgrq" and "error" not in entry]
    assert {entry["engine"] for entry in found} == set(ENGINES)
    assert all(entry["difference"]["all"] < 1e-6 and entry["processes_equal"] for entry in found)


def test_the_page_has_the_calculated_memory():
    assert engine_memory.memory_table() in PAGE


def test_engines_split_what_they_say_they_split():
    for model in engine_memory.MODELS:
        few, many = (engine_memory.bytes_by_engine(model, devices) for devices in (2, 8))
        assert few["DDP"] == many["DDP"]
        assert many["DDP"] > many["DeepSpeed ZeRO-2"] > many["FSDP2, codes in bytes"] > many["DeepSpeed ZeRO-3"]
        assert engine_memory.bytes_by_engine(model, 1, ratio=0.4)["DDP"] < few["DDP"]
    assert sum(model.quantized + model.embeddings for model in engine_memory.MODELS) / 1e9 == pytest.approx(
        78.6, abs=0.1
    )
