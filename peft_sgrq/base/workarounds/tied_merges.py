"""PEFT merges into tied weights as if they were not, and saves as if they still were.

* Rows that were trained for one of several tied weights alone (`trainable_token_indices={"lm_head": ...}`) are merged
  into the one tensor all of them are, so that the others change with it.
* Once input and output embedding differ PEFT says `tie_word_embeddings=False`. Further weights that are tied to either
  (BART's and T5's `encoder.embed_tokens`, BERT's `decoder.bias`) are left out when the model is saved, being the same
  as another, and are random when it is loaded, being tied no more.
* A head whose `weight` is made of the packed embedding anew each time is taken for one that differs.

Weights that differ after merging get tensors of their own. `tests/base/test_upstream.py` has tests that fail once
this is not needed any more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from torch import nn

from peft_sgrq.layer.base_layers import makes_weight


def separate_rows(model: nn.Module) -> None:
    """Before merging: gives a weight whose rows alone were trained a tensor of its own, if it is tied to others."""
    layers = [module for module in model.modules() if isinstance(module, TrainableTokensLayer)]
    for layer in layers:
        tied_adapter = getattr(layer, "tied_adapter", None)
        base: Any = layer.get_base_layer()
        weight = getattr(base, "weight", None)
        if tied_adapter is not None or weight is None or not layer.token_indices:
            continue
        alike = [base, *(other.get_base_layer() for other in layers if getattr(other, "tied_adapter", None) is layer)]
        holders = [module for module in model.modules() if module._parameters.get("weight") is weight]
        if any(all(holder is not module for module in alike) for holder in holders):
            own = _copy(weight)
            for module in alike:
                module.weight = own


@contextmanager
def merging_ties(model: nn.Module) -> Iterator[None]:
    """While this is open an adapter is merged; weights that differ then get tensors of their own, and are saved."""
    groups: dict[str, set[str]] = {}  # one of some tied weights -> all of them
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        groups.setdefault(source, {source}).add(target)
    config: Any = getattr(model, "config", None)
    tied_before = bool(getattr(config, "tie_word_embeddings", False))
    packed = tied_before and _shows_another(model)
    if packed:
        config.tie_word_embeddings = tied_before = False  # so that PEFT does not look
    separate_rows(model)
    try:
        yield
    finally:
        if packed:
            config.tie_word_embeddings = True
    all_untied = tied_before and not getattr(config, "tie_word_embeddings", False)
    for group in groups.values():
        weights = {name: model.get_parameter(name) for name in sorted(group)}
        if not all_untied and len({id(weight) for weight in weights.values()}) == 1:
            continue
        seen: set[int] = set()
        for name, weight in weights.items():
            if id(weight) in seen:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, _copy(weight))
            seen.add(id(weight))
            getattr(model, "all_tied_weights_keys", {}).pop(name, None)


def _shows_another(model: Any) -> bool:
    """Whether the output head has no weight of its own."""
    get_head = getattr(model, "get_output_embeddings", None)
    head: Any = get_head() if callable(get_head) else None
    return makes_weight(head) and not any(True for _ in head.parameters())


def _copy(weight: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
