"""Running a model block by block: all batches through one transformer block before the next one.

The model itself gives a block's arguments besides its hidden states (masks, position embeddings): it runs once with
blocks that pass their input on. That is right for models whose blocks are a chain and depend on each other through
their hidden states alone. One ordinary forward pass on one sequence checks this assumption.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from peft_sgrq.formats.own_forward import forward_replaced
from peft_sgrq.passes.data import Batch

_Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments


class NotAChainError(RuntimeError):
    """The blocks cannot be run one after another outside of the model."""


class _Stop(Exception):
    """Ends a forward pass from within; never seen outside of this file."""


def find_stack(model: nn.Module, names: Collection[str]) -> tuple[str, nn.ModuleList] | None:
    """The list of blocks that holds most of some layers, with its name; `None` if there is no such list."""
    found, most = None, 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            held = sum(layer.startswith(name + ".") for layer in names)
            if held > most:
                found, most = (name, module), held
    return found


def layers_by_block(names: Iterable[str], stack: str, count: int) -> list[list[str]]:
    """The layers in each of the `count` blocks of a stack, up to the last block that has some."""
    names = list(names)
    blocks = [[name for name in names if name.startswith(f"{stack}.{index}.")] for index in range(count)]
    while not blocks[-1]:
        blocks.pop()
    return blocks


class Chain:
    """The blocks of a model and what they are called with, ready to run one after another.

    Args:
        blocks (`Sequence[nn.Module]`): The blocks, in the order they are called.
        run (`Callable`): Runs the whole model on a batch.
        batches (`Sequence[Batch]`): The data. The hidden states of all of it are kept, of one block at a time.

    Raises:
        NotAChainError: If each block is not called exactly once, with the hidden states the one before it returned, or
            if the blocks give other hidden states of the first sequence than in the model.
    """

    def __init__(self, blocks: Sequence[nn.Module], run: Callable[[Batch], Any], batches: Sequence[Batch]) -> None:
        self._blocks = blocks
        first = batches[0].first()
        expected, widths = _trace(blocks, run, first)
        self._record(run, widths, [first])
        for index in range(len(blocks)):
            self.run_block(index, 0)
        _check_same(self._hidden[0], expected)
        self._record(run, widths, batches)

    def _record(self, run: Callable[[Batch], Any], widths: Sequence[int | None], batches: Sequence[Batch]) -> None:
        self._calls: list[list[_Call]] = []  # by batch, by block
        self._hidden: list[torch.Tensor] = []  # by batch
        with ExitStack() as stack:
            record: list[_Call] = []
            for index, block in enumerate(self._blocks):
                last = index == len(self._blocks) - 1
                stack.enter_context(forward_replaced(block, _pass_on(record, widths[index], last)))
            for batch in batches:
                record.clear()
                _run_until_stopped(run, batch)
                if len(record) != len(self._blocks):
                    raise NotAChainError(f"{len(record)} of {len(self._blocks)} blocks were called")
                self._hidden.append(_hidden_of(*record[0]))
                self._calls.append([_without_hidden(*call) for call in record])

    def hidden(self, batch: int) -> torch.Tensor:
        """The hidden states of a batch that the next block takes, `[B, T, D]`."""
        return self._hidden[batch]

    def call(self, index: int, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """Runs one block on given hidden states of a batch, `[B, T, D]`, and returns the new ones."""
        args, kwargs = self._calls[batch][index]
        return _first(self._blocks[index](hidden, *args, **kwargs))

    def run_block(self, index: int, batch: int) -> None:
        """Runs one block on the hidden states that the block before it left of a batch, and keeps the new ones."""
        self._hidden[batch] = self.call(index, batch, self._hidden[batch])
        self._calls[batch][index] = ((), {})  # needed no more


def _check_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    # Kernels may round in another way outside of the model; only the arguments must be the same.
    tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 5e-2
    expected = expected.float()
    difference = (found.float() - expected).norm(dim=-1).nan_to_num()  # by token
    if bool((difference > tolerance * expected.norm(dim=-1).nan_to_num()).any()):
        raise NotAChainError("outside of the model the blocks compute something else")


def _trace(
    blocks: Sequence[nn.Module], run: Callable[[Batch], Any], batch: Batch
) -> tuple[torch.Tensor, list[int | None]]:
    """Runs the model and checks that the blocks are a chain; the output of the last, and each output's form."""
    outputs: list[Any] = []
    problems: list[str] = []

    def before(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if index != len(outputs):
                problems.append(f"block {index} is called in place {len(outputs)}")
            elif outputs and _hidden_of(args, kwargs) is not outputs[-1][0]:
                problems.append(f"block {index} does not get the output of the block before it")

        return hook

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if outputs:
            outputs[-1] = (None, outputs[-1][1])  # its memory is the model's to free
        outputs.append((_first(output), len(output) if isinstance(output, tuple) else None))

    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.callback(block.register_forward_pre_hook(before(index), with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(after).remove)
        run(batch)
    if len(outputs) != len(blocks):
        problems.append(f"{len(outputs)} calls of {len(blocks)} blocks")
    if problems:
        raise NotAChainError(problems[0])
    return outputs[-1][0], [form for _, form in outputs]


def _pass_on(record: list[_Call], width: int | None, last: bool) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        record.append((args, kwargs))
        if last:
            raise _Stop
        hidden = _hidden_of(args, kwargs)
        return hidden if width is None else (hidden, *[None] * (width - 1))

    return forward


def _run_until_stopped(run: Callable[[Batch], Any], batch: Batch) -> None:
    try:
        run(batch)
    except _Stop:
        return
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise NotAChainError(f"the model needs more of its blocks than hidden states ({error})") from error


def _hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, torch.Tensor):
        raise NotAChainError("a block is not called with hidden states as its first argument")
    return hidden


def _without_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    return args[1:], {key: value for key, value in kwargs.items() if args or key != "hidden_states"}


def _first(output: Any) -> torch.Tensor:
    hidden = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(hidden, torch.Tensor):
        raise NotAChainError(f"a block returns a {type(output).__name__}")
    return hidden
