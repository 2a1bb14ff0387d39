"""Pytest plugin that gives PEFT's own tests SGRQ to test; `run.py` beside it says how.

Each parametrized case of LoRA becomes one of SGRQ where SGRQ has the options; all other cases are deselected. Some
files write `LoraConfig` into the test bodies: there it is replaced. Models of the Hub become tiny local ones.
With the base nf4 the linear layers of the models are 4-bit. What SGRQ does otherwise on purpose is marked as xfail.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.machinery
import importlib.util
import inspect
import re
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from peft import LoraConfig
from suite_models import BASE, LOADERS, Loader, LocalModels, local_models, replace_custom_models

from peft_sgrq import SGRQConfig

LORA_FILES = ("test_low_level_api", "test_tuners_utils", "test_trainable_tokens", "test_initialization")

# The classes of test_initialization that are not about the methods of PEFT.
GENERIC_CLASSES = r"LowCpuMem|NamingConflict|OfflineMode|CustomModelConfig|InfiniteRecursion"

# LoRA's options without a counterpart, and without a meaning for the test; any other option drops the case.
IGNORED_OPTIONS = ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "inference_mode")
MODEL_IDS = {"dense": ("MLP", "MLP2", "MLP_LayerNorm", "EmbConv1D"), "nf4": ("MLP",)}[BASE]
UNSUPPORTED_LAYERS = {"emb", "^emb", "embed_tokens", "^embed_tokens", "conv2d", "mha", "gru"} | (
    {"conv1d"} if BASE == "nf4" else set()
)
# What a test that writes `LoraConfig` mentions if it is about LoRA itself, or about one model of the Hub.
ABOUT_LORA = (
    r"lora_[ABEm]|\"lora|Lora(Model|Layer|Linear|Parallel)|\.scaling|\.r\[|_pattern=|target_parameters|mixed=True|DoRA|Dora"
    r"|init_lora_weights=\"|_config=|use_\w+=True|combination_type|StableDiffusion|\.num_params|trainable_params =="
    r"|PeftMixedModel|model\.decoder\.layers|tiny-random-Bloom|embed_scale|model_weight_tied|was renamed from"
)

# Cases of options that only SGRQ has: (name, options) on the MLP, and options of the decoder models.
MLP_CASES = (
    ("all scales", {"target_modules": ["lin0", "lin1"], "ratio": 1.0}),
    ("one group a layer", {"target_modules": ["lin0", "lin1"], "ratio": 0.01}),
    ("small groups", {"target_modules": ["lin0", "lin1"], "group_size": 4}),
    ("bfloat16", {"target_modules": ["lin0", "lin1"], "adapter_dtype": "bfloat16"}),
    ("no targets", {}),
)
DECODER_CASES = ({"ratio": 1.0}, {"adapter_dtype": "bfloat16"})
QUANTIZATION_CASE = {"target_modules": ["q_proj", "v_proj"]}

# What SGRQ does otherwise on purpose, or nobody could do: test, options it concerns, reason.
DELIBERATE = (
    (
        "from_pretrained_config_construction",
        {},
        "injection completes a copy of the config, so the given one is reusable",
    ),
    ("adapter_dtype_autocast", {"autocast_adapter_dtype": False, "dtype": torch.float16}, "deltas stay float32"),
    ("adapter_dtype_autocast", {"autocast_adapter_dtype": False, "dtype": torch.bfloat16}, "deltas stay float32"),
    (
        r"save_pretrained(_selected_adapters)?(_pickle)?\[",
        {"adapter_dtype": "bfloat16"},
        "the file holds the bfloat16 deltas that the forward pass uses",
    ),
    ("parameters_after_loading", {"adapter_dtype": "bfloat16"}, "the file holds bfloat16 deltas"),
    ("mixed_adapter_batches.*tiny-0pt", {}, "OPT flattens the batch before fc1: no tuner can tell its rows, nor LoRA"),
    ("generate_half_prec.*nf4.tiny-0pt", {}, "the 4-bit OPT of another dtype than it was saved in fails by itself"),
    ("inject_from_state_dict_low_cpu_mem_usage", {}, "the selection is known from the config, so never on meta"),
    (
        "inject_from_state_dict_compiled_model.True",
        {},
        "injection compiles the layers in place, so names are those of the model that is not compiled",
    ),
    ("no_infinite_recursion.PeftMixedModel", {}, "the tuners of PeftMixedModel are a closed list"),
    ("TestDefaultTargetModules", {}, "without target_modules every supported layer is adapted, in any architecture"),
)

# Cases


class Untranslatable(Exception):
    """A case of LoRA that SGRQ has no counterpart of."""


def translate_options(options: dict[str, Any]) -> dict[str, Any]:
    translated = {key: value for key, value in options.items() if key not in IGNORED_OPTIONS}
    if isinstance(translated.get("init_lora_weights"), bool):
        translated["init_weights"] = translated.pop("init_lora_weights")
    targets = translated.get("target_modules") or ()
    unknown = translated.keys() - inspect.signature(SGRQConfig).parameters.keys()
    if unknown or UNSUPPORTED_LAYERS & ({targets} if isinstance(targets, str) else set(targets)):
        raise Untranslatable(options)
    return {"ratio": 0.4, **translated}  # leaves scales unselected


def stand_in(**options: Any) -> SGRQConfig:
    """`LoraConfig(...)` as an SGRQ config."""
    return SGRQConfig(**translate_options(options))


def translate(name: str, value: Any) -> Any:
    if value is LoraConfig:
        return SGRQConfig
    if type(value) is LoraConfig:
        plain = LoraConfig().to_dict()
        changed = {key: item for key, item in value.to_dict().items() if item != plain[key] and key != "peft_type"}
        return stand_in(**changed)
    if isinstance(value, dict) and "kwargs" in name:
        return translate_options(value)
    if name == "test_name":
        return value.replace("LoRA", "SGRQ")
    if (name, value) == ("tuner_method", "lora"):
        return "sgrq"
    if name == "model_id" and value not in MODEL_IDS:
        raise Untranslatable(value)
    return value


def translate_rows(names: list[str], rows: list[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    seen = []
    for row in rows:
        if any(value is LoraConfig or type(value) is LoraConfig for value in row):
            try:
                translated = tuple(map(translate, names, row))
            except Untranslatable:
                continue
            content = [value for name, value in zip(names, translated, strict=True) if name != "test_name"]
            if content not in seen:
                seen.append(content)
                yield translated


def cases(names: list[str], values: list[Any], test: str) -> list[Any] | None:
    """The values of a parametrization for SGRQ; None where it is not about tuners."""
    if names == ["quant"]:
        return list(LOADERS)
    if names == ["model_id"] and "test_decoder_models" in test:
        return [str(path) for path in local_models().values()]
    rows = [getattr(value, "values", value) if isinstance(value, type(pytest.param())) else value for value in values]
    rows = [row if len(names) > 1 else (row,) for row in rows]
    found = list(translate_rows(names, rows))
    if names == ["config_cls", "config_kwargs"]:
        if "test_quantization" in test:
            found = [(SGRQConfig, QUANTIZATION_CASE)]
        elif "test_decoder_models" in test and found:
            found += [(SGRQConfig, {"task_type": "CAUSAL_LM", **options}) for options in DECODER_CASES]
    if names == ["test_name", "model_id", "config_cls", "config_kwargs"]:
        found += [(f"SGRQ {name}", "MLP", SGRQConfig, options) for name, options in MLP_CASES]
    if found:
        return found if len(names) > 1 else [row[0] for row in found]
    return None


def is_about_sgrq(value: Any) -> bool:
    return value is SGRQConfig or isinstance(value, (SGRQConfig, Loader))


# Hooks


def stub(name: str, **attributes: Any) -> None:
    """A stand-in for a package that PEFT's tests import at the top and the selected ones do not use."""
    if importlib.util.find_spec(name) is None:
        module = types.ModuleType(name)
        module.__dict__.update(attributes, __spec__=importlib.machinery.ModuleSpec(name, None), __version__="0")
        sys.modules[name] = module


def pytest_configure(config: pytest.Config) -> None:
    expand: Callable[..., Any] = lambda *args, **kwargs: lambda test: None  # noqa: E731
    stub("diffusers", StableDiffusionPipeline=type("StableDiffusionPipeline", (), {}), AutoModel=None)
    stub("parameterized", parameterized=types.SimpleNamespace(expand=expand))
    stub("scipy", stats=None)
    stub("attr", dataclass=dataclasses.dataclass)
    # The base outputs are computed before there is an adapter: without the CPU layout that SGRQ switches off.
    bnb.nn.modules.has_avx512bf16 = lambda: False


def deliberate(item: Any) -> Iterator[str]:
    """Why a test expects something that SGRQ does otherwise."""
    params = getattr(item, "callspec", types.SimpleNamespace(params={})).params
    options = {**params, **params.get("config_kwargs", {})}
    for test, concerned, reason in DELIBERATE:
        if re.search(test, item.nodeid) and concerned.items() <= options.items():
            yield reason


def causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def skip_reason(error: BaseException) -> str | None:
    """Why a failure says nothing about SGRQ; None if it may."""
    if isinstance(error, Untranslatable):
        return f"SGRQ has no counterpart of {error}"
    if isinstance(error, OSError) and re.search(r"offline|huggingface\.co|Hub", str(error)):
        return "needs the Hub"
    if isinstance(error, ValueError) and "cannot be trained whole" in str(error):
        return "SGRQ refuses quantized modules in `modules_to_save`"
    if isinstance(error, ValueError) and "Cannot flatten integer dtype" in str(error):
        return "FSDP 1 cannot flatten 4-bit weights stored as uint8"
    return None


def common_of(module: Any) -> Any:
    """The module of PEFT's tests that most of them call."""
    return sys.modules.get(f"{module.__package__}.testing_common")


def stands_in(name: str) -> bool:
    return any(file in name for file in LORA_FILES)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """Imports a test module with the stand-in in place, and replaces its models afterwards."""
    if not isinstance(collector, pytest.Module):
        return (yield)
    original = peft.LoraConfig
    peft.LoraConfig = stand_in if stands_in(collector.path.stem) else original
    try:
        report: Any = yield
    finally:
        peft.LoraConfig = original
    if report.passed:
        for module in (collector.obj, common_of(collector.obj)):
            if hasattr(module, "hub_online_once"):
                module.hub_online_once = lambda model_id: contextlib.nullcontext()  # or it waits for the network
        if stands_in(collector.path.stem) and hasattr(collector.obj, "AutoModelForCausalLM"):
            collector.obj.AutoModelForCausalLM = LocalModels
        if hasattr(collector.obj, "MockTransformerWrapper"):
            replace_custom_models(collector.obj)
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    markers = metafunc.definition.own_markers
    for index, marker in enumerate(markers):
        if marker.name != "parametrize" or len(marker.args) < 2:
            continue
        names, values, *_ = marker.args
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
        ours = cases(names, list(values), metafunc.definition.nodeid)
        if ours is not None:
            kwargs = {key: value for key, value in marker.kwargs.items() if key != "ids" or callable(value)}
            markers[index] = pytest.mark.parametrize(marker.args[0], ours, **kwargs).mark


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: Any) -> Iterator[None]:
    """Mixed batches are tested for a list of classes only, which LoRA's place in is given to SGRQ."""
    lends = [module for module in (item.module, common_of(item.module)) if "mixed_adapter_batches" in item.name]
    originals = [(module, module.LoraConfig) for module in lends if hasattr(module, "LoraConfig")]
    for module, _ in originals:
        module.LoraConfig = SGRQConfig
    try:
        return (yield)
    finally:
        for module, original in originals:
            module.LoraConfig = original


def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    def wanted(item: Any) -> bool:
        if stands_in(item.nodeid):
            source = inspect.getsource(item.function)
            named = "LoraConfig" in source or "peft_config" in item.fixturenames
            generic = "test_initialization" not in item.nodeid or re.search(GENERIC_CLASSES, item.nodeid)
            return named and generic and not re.search(ABOUT_LORA, source)
        return any(map(is_about_sgrq, getattr(item, "callspec", types.SimpleNamespace(params={})).params.values()))

    for item in filter(wanted, items):
        for reason in deliberate(item):
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = [item for item in items if wanted(item)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Skips what needs the Hub, options of LoRA, and training a quantized module whole."""
    report: Any = yield
    error = call.excinfo.value if call.excinfo else None
    reason = next((reason for reason in map(skip_reason, causes(error)) if reason), None)
    if report.failed and reason:
        report.outcome, report.longrepr = "skipped", (str(item.path), item.reportinfo()[1] or 0, f"Skipped: {reason}")
    return report
