"""Attention with hooks for queries and keys behind the position embeddings: compressed-tensors', made fit for R3.

compressed-tensors has one hooked attention for all models of a process. It goes on with the implementation and the
masks of the model that was hooked last, and knows no "eager"; it rounds queries by the arguments of the cache, which
are for keys and values. Here each implementation has a hooked one beside it, which does nothing but call it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn

_HOOKED: dict[str, str] = {}  # name of a hooked implementation -> of the one that it calls


def can_hook_attention(model: nn.Module) -> bool:
    """Whether the attention of a model is one that transformers can exchange."""
    can = getattr(model, "_can_set_attn_implementation", None)
    return can is not None and bool(can())


def hook_attention(model: Any) -> None:
    """Hooks all attention modules: the model is switched over, also where nothing is to be rotated."""
    from compressed_tensors.modeling import IMPL_ATTR, QuantizedAttentionImpl, initialize_hooked_kv_cache
    from compressed_tensors.modeling.attention import HOOKED_ATTENTION_NAME
    from compressed_tensors.quantization.lifecycle.initialize import is_cached_attention_module

    for module in model.modules():
        if is_cached_attention_module(module):
            if not hasattr(module, IMPL_ATTR):
                module.register_module(IMPL_ATTR, QuantizedAttentionImpl(model.config))
            attention = getattr(module, IMPL_ATTR)
            attention.forward = MethodType(_attend, attention)
            initialize_hooked_kv_cache(model, module)
    name = model.config._attn_implementation
    if name not in _HOOKED:
        model.set_attn_implementation(
            _register(QuantizedAttentionImpl._original_impl if name == HOOKED_ATTENTION_NAME else name)
        )


def rotate_queries_by(model: nn.Module, factory: Any, args: Any) -> None:
    """Adds a factory's rotation of queries to attention modules that are hooked, by name (`args.targets`)."""
    from compressed_tensors.modeling import register_query_hook
    from compressed_tensors.offload import register_offload_module

    for name in args.targets:
        module: Any = model.get_submodule(name)
        transform = factory.create_transform(module, args)
        register_offload_module(module, f"{factory.name}_{args.location}", transform)
        register_query_hook(module, lambda _, query, transform=transform: transform(query))
        module.register_forward_pre_hook(_refuse_unless_hooked)


@contextmanager
def hooked_attention(model: Any) -> Iterator[None]:
    """While this is open, within `untouched`, hooks can be put onto queries and keys; then attention is as it was."""
    implementation = model.config._attn_implementation
    try:
        hook_attention(model)
        yield
    finally:
        if model.config._attn_implementation != implementation:
            model.set_attn_implementation(implementation)


def _register(name: str) -> str:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    hooked = f"rotated_{name.replace('flash', 'fast')}"  # what is called flash is taken for a package to be installed
    _HOOKED[hooked] = name
    ALL_ATTENTION_FUNCTIONS.register(hooked, lambda module, *args, **kwargs: module.impl(module, *args, **kwargs))
    ALL_MASK_ATTENTION_FUNCTIONS.register(hooked, ALL_MASK_ATTENTION_FUNCTIONS[name])
    return hooked


def _attend(
    self: Any,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """What hooked attention computes behind its hooks, without rounding; the names are those that hooks bind."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    name = _HOOKED[module.config._attn_implementation]
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)(module, query, key, value, *args, **kwargs)


def _refuse_unless_hooked(module: Any, args: Any) -> None:
    implementation = module.config._attn_implementation
    if implementation not in _HOOKED:  # keys would be rotated and queries not
        raise ValueError(
            f"The attention implementation was set to {implementation!r} after queries and keys were rotated, "
            f"expected one that rotates them; give `attn_implementation={implementation!r}` when it is loaded."
        )
