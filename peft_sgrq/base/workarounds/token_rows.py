"""PEFT computes with trained rows (`trainable_token_indices`) by a formula of its own, which is not every layer's.

`peft/tuners/trainable_tokens/layer.py` calls `F.linear(input=x, weight=W)` for a head: a bias, as BERT's heads have
one, is left out in training and used again once merged. It fails in the first forward pass on what is neither an
`nn.Embedding` nor an `nn.Linear`: a head that `modules_to_save` trains whole, a layer with an adapter. Hooks of the
layer are not called. All of these are refused before anything is changed, hooks if they change what it computes.
`tests/base/test_token_rows.py::test_peft_still_leaves_a_bias_out` fails once the bias is used, and its refusal is not
needed any more.
"""

from __future__ import annotations

from collections.abc import Container

import torch
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import (
    TrainableTokensWrapper,
    _get_input_embeddings_name,
    _get_module_names_tied_with_embedding,
)
from torch import nn

from peft_sgrq.config import SGRQConfig
from peft_sgrq.formats.own_forward import forward_obstacle, has_hooks
from peft_sgrq.formats.registry import is_quantized


def check_token_rows(model: nn.Module, config: SGRQConfig, adapted: Container[str]) -> None:
    """Refuses rows of layers that PEFT would not compute with as the layers do themselves.

    Args:
        model (`nn.Module`): The model, not changed yet by this adapter.
        config (`SGRQConfig`): The config of the adapter.
        adapted (`Container[str]`): Names of the layers whose scales it trains.

    Raises:
        ValueError: If there is such a layer; the sentence names it.
    """
    rows = config.trainable_token_indices
    if rows is None:
        return
    asked = list(rows) if isinstance(rows, dict) else [_get_input_embeddings_name(model, "embed_tokens")]
    named = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    found = {name: "" for name in named if name.endswith(tuple(asked))}
    for name in _tied(model, [named[name] for name in found]):
        found.setdefault(name, ", being tied to the input embedding")
    for name, why in found.items():
        obstacle = _obstacle(name, named.get(name), config, adapted)
        if obstacle is not None:
            raise ValueError(
                f"`trainable_token_indices` trains rows of {name!r}{why}, and {obstacle}. The model was not changed."
            )


def _tied(model: nn.Module, modules: list[nn.Module]) -> list[str]:
    """The layers whose rows PEFT trains along with those of the input embedding."""
    if not BaseTuner.get_model_config(model).get("tie_word_embeddings", False):
        return []
    get_embedding = getattr(model, "get_input_embeddings", None)
    embedding = get_embedding() if callable(get_embedding) else None
    if embedding is None or isinstance(embedding, TrainableTokensWrapper):
        return []
    return _get_module_names_tied_with_embedding(model) if any(one is embedding for one in modules) else []


def _obstacle(name: str, module: nn.Module | None, config: SGRQConfig, adapted: Container[str]) -> str | None:
    if module is None or isinstance(module, TrainableTokensWrapper):
        return None  # PEFT says what is missing; what is wrapped already was looked at then
    if any(name.endswith(whole) for whole in config.modules_to_save or ()):  # as PEFT matches them
        return (
            "`modules_to_save` trains it whole, expected one or the other; take it out of `modules_to_save`, or train "
            "both the input embedding and the head whole"
        )
    if name in adapted or is_quantized(module) or any(not p.is_floating_point() for p in module.parameters()):
        return "its scales are trained or quantized, expected a dense layer without an adapter; leave the rows out"
    if has_hooks(module) and not _computes_alike(module):
        return (
            "it has hooks that change what it computes, which PEFT does not call while the rows are trained, so that "
            "the merged model would compute otherwise, expected none; add them to the wrapper once the adapter is "
            "there, or train the layer whole (`modules_to_save`)"
        )
    if isinstance(module, nn.Embedding):
        if forward_obstacle(module, nn.Embedding) is None or _computes_alike(module):
            return None
        return (
            f"its class {type(module).__name__} computes otherwise than PEFT does with rows of it, expected an "
            "nn.Embedding; train it whole (`modules_to_save`)"
        )
    if not isinstance(module, nn.Linear) or forward_obstacle(module, nn.Linear) is not None:
        return (
            f"it is a {type(module).__name__}, expected an nn.Embedding or an nn.Linear, of which PEFT can train "
            "rows; train it whole (`modules_to_save`)"
        )
    if module.bias is not None:
        return (
            "it has a bias, which PEFT leaves out while the rows are trained, so that the merged model would compute "
            "otherwise; train the input embedding and the head whole (`modules_to_save`), or untie them "
            "(`tie_word_embeddings=False`) and train rows of the input embedding alone"
        )
    return None


@torch.no_grad()
def _computes_alike(module: nn.Module) -> bool:
    """Whether PEFT's rows, as they are at first, give what a layer itself gives, its hooks called."""
    weight = module._parameters.get("weight")
    if weight is None or weight.is_meta or weight.dim() != 2:  # no weight yet, or it is an engine's
        return True
    ids = torch.arange(min(2, weight.shape[0]), device=weight.device)
    layer = TrainableTokensLayer(module, "tried")
    layer.update_layer("tried", token_indices=ids.tolist())
    given = ids if isinstance(module, nn.Embedding) else torch.ones(2, weight.shape[1]).to(weight)
    return torch.equal(layer(given), module(given))
