"""SGRQ is a real member of PEFT's enum, and is registered without an import whatever is imported first."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from support.bases import NF4, adapted
from support.fresh import piece, run_fresh

import peft_sgrq
from peft_sgrq import SGRQConfig, SGRQModel, register

REGISTERED = """
from peft import PeftType, PeftConfig
assert PeftType("SGRQ") is PeftType.SGRQ and PeftType.SGRQ in list(PeftType)
config = PeftConfig.from_pretrained({adapter!r})
assert type(config).__module__ == "peft_sgrq.config", type(config)
"""
NOT_REGISTERED = """
from peft import PeftType, PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
assert "SGRQ" not in PEFT_TYPE_TO_CONFIG_MAPPING and "SGRQ" not in PeftType.__members__
try:
    PeftConfig.from_pretrained({adapter!r})
except KeyError:
    pass
else:
    raise AssertionError("an adapter loaded although SGRQ is not registered")
"""
EXPLICIT = "import peft_sgrq; assert peft_sgrq.SGRQConfig().peft_type is PeftType.SGRQ\n"
ONE_REGISTRATION = """
import sys, peft_sgrq
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
assert PEFT_TYPE_TO_CONFIG_MAPPING["SGRQ"] is peft_sgrq.SGRQConfig is sys.modules["peft_sgrq.config"].SGRQConfig
assert list(PeftType).count(PeftType.SGRQ) == 1
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("peft_sgrq")]
"""
PEFT_HAS_ITS_OWN = """
import sys, types
import peft
from peft.utils import peft_types
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from their_enum import insert
insert(peft_types.PeftType, "SGRQ")
class Theirs: __module__ = "peft.tuners.sgrq.config"
PEFT_TYPE_TO_CONFIG_MAPPING["SGRQ"] = Theirs
try:
    import peft_sgrq
except ImportError as error:
    assert "of its own" in str(error) and "uninstall peft-sgrq" in str(error), error
else:
    raise AssertionError("peft_sgrq hides PEFT's own SGRQ")
assert PEFT_TYPE_TO_CONFIG_MAPPING["SGRQ"] is Theirs
"""
# What a PEFT that ships SGRQ would look like: a member, made as Python makes it.
INSERT = """
def insert(enum, name):
    member = str.__new__(enum, name)
    member._name_ = member._value_ = name
    enum._member_names_.append(name)
    enum._member_map_[name] = enum._value2member_map_[name] = member
    type.__setattr__(enum, name, member)
"""
BROKEN = """
import {first}
import peft, bitsandbytes
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
assert bitsandbytes.nn.Linear4bit and "SGRQ" not in PEFT_TYPE_TO_CONFIG_MAPPING
try:
    import peft_sgrq
except RuntimeError as error:
    assert str(error) == "broken on purpose"
else:
    raise AssertionError("the error is hidden from whoever asks for the package")
"""
# A package that is called peft and has no tuners: registering fails, quietly, and only the import is looked at.
FINDERS = """
import importlib.util, sys
sys.argv[0] = "peft-sgrq"  # else the package registers at once
from peft_sgrq.plugin.autoload import hook

class AsksAllFinders:  # as wrapt's
    asking = False
    def find_spec(self, name, path=None, target=None):
        if name != "peft" or self.asking:
            return None
        self.asking = True
        try:
            return importlib.util.find_spec(name)
        finally:
            self.asking = False

for finders in ({order}):
    finders() if finders is hook else sys.meta_path.insert(0, AsksAllFinders())
assert importlib.util.find_spec("peft") is not None and "peft" not in sys.modules
import peft
assert peft.executed and "peft_sgrq" not in sys.modules, "registering was not tried"
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("peft_sgrq")]
"""
LIGHT = """
import sys, bitsandbytes
assert "peft" not in sys.modules
loaded = {name for name in sys.modules if name == "peft_sgrq" or name.startswith("peft_sgrq.")}
assert loaded <= {"peft_sgrq", "peft_sgrq.plugin", "peft_sgrq.plugin.autoload"}, loaded
"""
AUTO = """
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, pipeline
quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
for model in (
    AutoModelForCausalLM.from_pretrained({trained!r}, quantization_config=quantization),
    pipeline("text-generation", model={trained!r}, model_kwargs=dict(quantization_config=quantization)).model,
):
    assert model.peft_config["default"].peft_type.value == "SGRQ"
    assert any(type(module).__name__ == "SGRQLinear" for module in model.modules())
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, llama_dir: Path) -> dict[str, str]:
    adapter = str(tmp_path_factory.mktemp("adapter"))
    SGRQConfig(ratio=0.25).save_pretrained(adapter)
    trained = str(tmp_path_factory.mktemp("trained"))
    adapted(NF4, llama_dir).save_pretrained(trained)
    broken = tmp_path_factory.mktemp("broken")
    shutil.copytree(Path(peft_sgrq.__file__).parent, broken / "peft_sgrq")
    (broken / "peft_sgrq" / "config.py").write_text("raise RuntimeError('broken on purpose')\n")
    other = tmp_path_factory.mktemp("other")
    (other / "their_enum.py").write_text(INSERT)

    registered, not_registered = (text.format(adapter=adapter) for text in (REGISTERED, NOT_REGISTERED))
    return run_fresh(
        {
            "peft first": piece("import peft\n" + registered + EXPLICIT + ONE_REGISTRATION, warm=False),
            "bitsandbytes first": piece("import bitsandbytes\n" + registered + ONE_REGISTRATION, warm=False),
            "transformers first": piece("from transformers import Trainer\n" + registered + ONE_REGISTRATION),
            "trl first": piece("import trl; from trl import SFTTrainer\n" + registered + ONE_REGISTRATION),
            "peft_sgrq first": piece("import peft_sgrq\n" + registered + EXPLICIT + ONE_REGISTRATION),
            "peft_sgrq's config first": piece(
                "from peft_sgrq.config import SGRQConfig\n" + registered + EXPLICIT + ONE_REGISTRATION
            ),
            "bitsandbytes, then peft_sgrq": piece(
                "import bitsandbytes, peft_sgrq\n" + registered + EXPLICIT + ONE_REGISTRATION
            ),
            "only bitsandbytes": piece(LIGHT),
            "switched off": piece(
                "import bitsandbytes\n" + not_registered + EXPLICIT + registered, PEFT_SGRQ_AUTOLOAD="0"
            ),
            "broken, bitsandbytes first": piece(BROKEN.format(first="bitsandbytes"), path=(str(broken),)),
            "broken, peft first": piece(BROKEN.format(first="peft"), path=(str(broken),)),
            "peft has its own": piece(PEFT_HAS_ITS_OWN, path=(str(other),), PEFT_SGRQ_AUTOLOAD="0"),
            "transformers loads": piece(AUTO.format(trained=trained)),
        }
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "order",
    [
        "peft first",
        "bitsandbytes first",
        "transformers first",
        "trl first",
        "peft_sgrq first",
        "peft_sgrq's config first",
        "bitsandbytes, then peft_sgrq",
    ],
)
def test_registered_whatever_is_imported_first(results, order):
    assert results[order] == "passed", results[order]


@pytest.mark.slow
def test_transformers_loads_an_adapter_without_an_import(results):
    assert results["transformers loads"] == "passed", results["transformers loads"]


@pytest.mark.slow
def test_the_switch_turns_autoloading_off_and_an_import_still_works(results):
    assert results["switched off"] == "passed", results["switched off"]


@pytest.mark.slow
@pytest.mark.parametrize("order", ["broken, bitsandbytes first", "broken, peft first"])
def test_a_broken_installation_breaks_only_itself(results, order):
    assert results[order] == "passed", results[order]


@pytest.mark.slow
def test_importing_bitsandbytes_alone_imports_nothing_heavy(results):
    assert results["only bitsandbytes"] == "passed", results["only bitsandbytes"]


@pytest.mark.slow
def test_a_peft_with_its_own_sgrq_is_not_hidden(results):
    assert results["peft has its own"] == "passed", results["peft has its own"]


@pytest.mark.parametrize(
    "order", ["hook,", "hook, hook", "AsksAllFinders, hook", "hook, AsksAllFinders", "hook, AsksAllFinders, hook"]
)
def test_peft_is_imported_among_other_finders_that_ask_all(order, tmp_path):
    (tmp_path / "peft.py").write_text("executed = True\n")
    path = os.pathsep.join([str(tmp_path), str(Path(peft_sgrq.__file__).parent.parent)])
    code = FINDERS.format(order=order)
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_member_is_a_real_one():
    member = PeftType.SGRQ
    assert isinstance(member, PeftType) and member == "SGRQ" and hash(member) == hash("SGRQ")
    assert (member.value, member.name, str(member)) == ("SGRQ", "SGRQ", "PeftType.SGRQ")
    assert repr(member) == repr(PeftType.LORA).replace("LORA", "SGRQ")
    assert PeftType("SGRQ") is PeftType["SGRQ"] is member
    assert list(PeftType)[-1] is member and list(PeftType).count(member) == 1
    assert len(list(PeftType)) == len(PeftType) == len(PeftType.__members__)
    assert copy.copy(member) is copy.deepcopy(member) is member
    assert all(
        pickle.loads(pickle.dumps(member, protocol)) is member for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    )


def test_a_config_survives_pickle_and_deepcopy():
    config = SGRQConfig(ratio=0.25, target_modules=["q_proj"])
    for other in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert other == config and other.peft_type is PeftType.SGRQ


def test_register_is_idempotent():
    members = list(PeftType)
    register()
    register()
    assert list(PeftType) == members
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SGRQ] is PEFT_TYPE_TO_CONFIG_MAPPING["SGRQ"] is SGRQConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.SGRQ] is SGRQModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.SGRQ] == SGRQModel.prefix == "sgrq_"


def test_peft_makes_the_config_from_the_type():
    assert type(PeftConfig.from_peft_type(peft_type="SGRQ", ratio=0.3)) is SGRQConfig
