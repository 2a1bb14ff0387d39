"""How the base of an adapter is loaded: what its config records of that, and the Python code made of the record."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import transformers
from peft.utils.peft_types import TaskType
from torch import nn

from peft_sgrq.base.workarounds.dropped_rotations import has_online_rotations
from peft_sgrq.config import SGRQConfig
from peft_sgrq.formats.code import Code
from peft_sgrq.formats.loading import quantization_code

# Tried in this order; a model of none of them is loaded by its own class.
_AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForMaskedLM",
    "AutoModelForMultipleChoice",
    "AutoModelForImageTextToText",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForImageClassification",
    "AutoModelForAudioClassification",
    "AutoModelForCTC",
    "AutoModel",
)
AUTO_CLASS_OF_TASK: dict[str, str] = {  # for adapters that do not record a class
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
    TaskType.SEQ_2_SEQ_LM: "AutoModelForSeq2SeqLM",
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "AutoModel",
}


def describe_class(model: nn.Module) -> dict[str, Any] | None:
    """The class that loads a model, in the form of PEFT's `auto_mapping`.

    Returns:
        `base_model_class` and `parent_library`, and under `arguments` what `from_pretrained` needs besides; an auto
        class of transformers where one loads the model, else the model's own; `online_rotations` where a model has
        some, which `load_rotated` loads. `None` for a model that no class loads.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    cls = next(filter(_loads, type(model).__mro__), None)
    config: Any = getattr(model, "config", None)
    if cls is None or config is None:
        return None
    if has_online_rotations(model):
        return {**_described("AutoModelForCausalLM", "transformers", {}), "online_rotations": True}
    labels = getattr(config, "num_labels", 2)
    arguments = {"num_labels": labels} if "Classification" in cls.__name__ and labels != 2 else {}
    if cls.__module__.startswith("transformers_modules."):  # code that comes with the model
        known = (getattr(config, "auto_map", None) or {}).items()
        auto = next((key for key, value in known if str(value).rpartition(".")[2] == cls.__name__), "")
        return _described(auto, "transformers", arguments | {"trust_remote_code": True}) if auto else None
    if not (cls.__module__.startswith("transformers.") and getattr(transformers, cls.__name__, None) == cls):
        return _described(cls.__name__, cls.__module__, arguments)
    return _described(_auto_class(cls, model) or cls.__name__, "transformers", arguments)


def _described(name: str, library: str, arguments: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"base_model_class": name, "parent_library": library}
    return found | ({"arguments": arguments} if arguments else {})


def _loads(cls: type) -> bool:
    """Whether a class can be imported by its name, and loads models; classes made on the fly (FSDP's) cannot."""
    named = getattr(sys.modules.get(cls.__module__), cls.__name__, None)
    return named is cls and cls.__module__ != "__main__" and hasattr(cls, "from_pretrained")


def _auto_class(cls: type, model: Any) -> str | None:
    """The auto class that makes a model of this class of its checkpoint."""
    if _checkpoint_type(model) not in (None, model.config.model_type):
        return None  # a part of it, as the language model of a vision-language model is
    for name in _AUTO_CLASSES:
        found = getattr(transformers, name)._model_mapping.get(type(model.config), None)
        if found is cls:
            return name
    return None


def _checkpoint_type(model: Any) -> str | None:
    """The `model_type` in the checkpoint a model was loaded from; `None` if it cannot be told without the Hub."""
    name = getattr(model, "name_or_path", "")
    try:
        fields, _ = transformers.PretrainedConfig.get_config_dict(name, local_files_only=True) if name else ({}, {})
    except (OSError, ValueError):
        return None
    return fields.get("model_type")


def loading_code(config: SGRQConfig) -> Code:
    """The Python code that loads the base an adapter was trained on, as its config records it."""
    quantization = config.base_quantization or {}
    recorded: Mapping[str, Any] = config.auto_mapping or {}
    cls = recorded.get("base_model_class") or AUTO_CLASS_OF_TASK.get(
        config.task_type or TaskType.CAUSAL_LM, "AutoModel"
    )
    library = str(recorded.get("parent_library") or "transformers")
    if library.startswith("transformers.") and hasattr(transformers, cls):
        library = "transformers"  # PEFT records the file within it
    path = repr(config.base_model_name_or_path or "the base model")
    quantized = quantization_code(quantization)
    fields = {
        "dtype": quantization.get("dtype"),
        "gguf_file": quantization.get("gguf_file"),
        **(recorded.get("arguments") or {}),
        "revision": config.revision,
    }
    arguments = [f"{key}={value!r}" for key, value in fields.items() if value is not None]
    if quantized.expression:
        arguments.append(f"quantization_config={quantized.expression}")
    rotated = recorded.get("online_rotations")
    load = "load_rotated" if rotated else f"{cls}.from_pretrained"
    names: dict[str, set[str]] = {"peft_sgrq": {load}} if rotated else {library: {cls}}
    for source, imported in quantized.names.items():
        names.setdefault(source, set()).update(imported)
    return Code(names, f"{load}({', '.join([path, *arguments])})", quantized.statements)
