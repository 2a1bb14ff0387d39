"""Fields of a model's JSON files: which ones say nothing of its weights, and may differ after training.

Trainers and tokenizers write into configs (`use_cache`, ids of special tokens, `problem_type`), and transformers
writes a config anew when it saves: with all fields its version knows. A field that is not known here counts as one
that matters.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any, NamedTuple

import transformers

from peft_sgrq.checkpoint.quantization_fields import reading_fields, without_empty

# What transformers writes anew whenever it saves.
_VOLATILE = {"transformers_version", "_name_or_path", "name_or_path", "_commit_hash"}
# What models are called with, trained with, or named: no weight is read by it.
_NOT_OF_WEIGHTS = {
    "_attn_implementation",
    "attn_implementation",
    "finetuning_task",
    "gradient_checkpointing",
    "id2label",
    "initializer_factor",
    "initializer_range",
    "keys_to_ignore_at_inference",
    "label2id",
    "local_files_only",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "problem_type",
    "return_dict",
    "router_aux_loss_coef",
    "task_specific_params",
    "tokenizer_class",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
    "use_return_dict",
}
_SPECIAL_TOKENS = {f"{kind}_token_id" for kind in ("bos", "eos", "pad", "sep", "cls", "unk", "mask", "decoder_start")}
# How a tokenizer was called last, and how it pads: the ids of a text are the same.
_OF_CALLS = {
    "backend",
    "clean_up_tokenization_spaces",
    "eos_token",
    "is_local",
    "local_files_only",
    "max_length",
    "model_max_length",
    "pad_to_multiple_of",
    "pad_token",
    "pad_token_type_id",
    "padding",
    "padding_side",
    "processor_class",
    "stride",
    "truncation",
    "truncation_side",
    "truncation_strategy",
}
_SUBMODELS = ("encoder", "decoder", "text_encoder", "audio_encoder")  # where composite models keep further configs
_OF_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


class Differences(NamedTuple):
    """How a JSON file differs: what matters, and what does not, a sentence each."""

    errors: list[str]
    notes: list[str]


def compare(file: str, expected: Any, found: Any, free: Collection[str] = ()) -> Differences:
    """Compares a file of a merged checkpoint with what it should be.

    Args:
        file (`str`): Its name.
        expected (`Any`): What it should hold: the file of the base, or a changed one.
        found (`Any`): What it holds.
        free (`Collection[str]`): Further fields in which a config may differ; the caller knows why.
    """
    differences = Differences([], [])
    if not isinstance(expected, dict) or not isinstance(found, dict):
        if expected != found:
            differences.errors.append(f"{file} differs from the file of the base.")
        return differences
    free_here = _OF_CALLS if file in _OF_TOKENIZERS else set()
    if file == "config.json":
        expected, found = _in_full(expected, found)
        free_here = _NOT_OF_WEIGHTS | _SPECIAL_TOKENS | {*free}
    elif file == "generation_config.json":
        free_here = {*expected, *found}
    _compare_fields(file, "", expected, found, free_here, differences)
    return differences


def _compare_fields(
    file: str, level: str, expected: dict[str, Any], found: dict[str, Any], free: set[str], differences: Differences
) -> None:
    expected, found = _with_dtype(expected), _with_dtype(found)
    for key in sorted({*expected, *found} - _VOLATILE):
        values = expected.get(key), found.get(key)
        if all(isinstance(value, dict) for value in values):
            if key == "quantization_config":
                fields, others = (reading_fields(value) for value in values)  # type: ignore[arg-type]
                _compare_fields(file, f"{level}{key}.", fields, others, set(), differences)
                continue
            if key in _SUBMODELS or key.endswith("_config"):
                # Where a part of a model names no dtype, it is that of the whole.
                part = {"dtype": expected.get("dtype"), **without_empty(values[0])}
                other = {"dtype": found.get("dtype"), **without_empty(values[1])}
                _compare_fields(file, f"{level}{key}.", part, other, free, differences)
                continue
        if without_empty(values[0]) == without_empty(values[1]):
            continue
        sentence = f"{file} has {level}{key} = {_short(values[1])}, expected {_short(values[0])}"
        is_free = key in free or key.endswith(("dropout", "_dropout_prob", "layerdrop"))
        if is_free and not level.startswith("quantization_config"):
            differences.notes.append(f"{sentence}; the weights are read alike.")
        else:
            differences.errors.append(f"{sentence}.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _in_full(*configs: dict[str, Any]) -> list[dict[str, Any]]:
    """Configs with all fields their class has, if transformers knows it: versions differ in which ones they save."""
    full = []
    for config in configs:
        # How codes are read is compared as it stands.
        fields = {key: copy.deepcopy(value) for key, value in config.items() if key != "quantization_config"}
        try:
            made = transformers.CONFIG_MAPPING[str(config.get("model_type"))].from_dict(fields).to_dict()
        except Exception:  # whatever a config's own code says of fields it does not take
            return list(configs)
        rope = made.get("rope_parameters")
        if isinstance(rope, dict) and config.get("rope_theta", rope.get("rope_theta")) != rope.get("rope_theta"):
            made["rope_theta"] = config["rope_theta"]  # transformers passes it by, and other readers do not
        if "quantization_config" in config:
            made["quantization_config"] = config["quantization_config"]
        full.append(made)
    return full


def _with_dtype(fields: dict[str, Any]) -> dict[str, Any]:
    """Says `dtype` where transformers 4 said `torch_dtype`, and some files say both."""
    old = fields.get("torch_dtype")
    if old is None or fields.get("dtype", old) != old:
        return fields
    return {**{key: value for key, value in fields.items() if key != "torch_dtype"}, "dtype": old}
