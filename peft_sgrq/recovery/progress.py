"""The file from which a stopped recovery goes on: the finished blocks, and what they were recovered with."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from peft_sgrq.config import SGRQConfig
from peft_sgrq.files.output import check_output
from peft_sgrq.files.tensors import read_tensors, write_tensors
from peft_sgrq.layer.delta import Delta
from peft_sgrq.passes.processes import from_first, gather, process_index, together
from peft_sgrq.recovery.job import Job
from peft_sgrq.recovery.preservation import Pull

_KIND = "recovery"
_SAMPLES = 64  # of a parameter, in a digest


@dataclass(frozen=True)
class BlockError:
    """How far the outputs of a block are from those of the model before quantization.

    Attributes:
        name (`str`): Name of the block.
        before, after (`float`): `|f_q(X_q) - f(X)|^2 / |f(X)|^2` over all counted tokens, before and after training.
        seconds (`float`): The wall time of the block.
    """

    name: str
    before: float
    after: float
    seconds: float


def identity(job: Job, config: SGRQConfig) -> dict[str, Any]:
    """What the result of the first stage depends on, as JSON values; `config` is that of the adapter, completed."""
    settings = {key: value for key, value in asdict(job.settings).items() if not key.startswith("distill_")}
    data = (
        item for batch in job.batches for item in sorted({**batch.inputs, "counted": batch.counted}.items())
    )  # name, tensor
    reference, model = (_digest(one.named_parameters(), _SAMPLES) for one in (job.reference.model, job.model))
    found = {
        **settings,
        "data": "".join(gather(_digest(data))),
        "reference": {"source": job.reference.source, "parameters": reference},
        "base": config.base_fingerprint,
        "model": model,
        "selection": config.selection,
        "adapter_dtype": config.adapter_dtype,
    }
    return json.loads(json.dumps(found, default=int))  # of numpy's integers


def _digest(tensors: Iterable[tuple[str, torch.Tensor]], samples: int | None = None) -> str:
    """A digest of names, shapes, dtypes and values, or of samples of the values that are in memory."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors:
        values = tensor.data
        digest.update(f"{name} {tuple(values.shape)} {values.dtype} ".encode())
        if type(values) is torch.Tensor and not values.is_meta:  # fingerprints of layers tell the others apart
            flat = values.reshape(-1)
            step = 1 if samples is None else max(1, flat.numel() // samples)
            digest.update(flat[::step].double().cpu().numpy().tobytes())
    return digest.hexdigest()


def check_progress_file(path: str | os.PathLike[str]) -> None:
    """Refuses a path that the progress of a recovery cannot be kept in, or read from again.

    Raises:
        ValueError: If it is a folder, a device or a pipe, or cannot be written.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        raise ValueError(f"`progress_file` is {path!r}, a folder, expected a file in it; name one.")
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"`progress_file` is {path!r}, a device or a pipe, expected a file that can be read again.")
    check_output(path, "The progress file")


class ProgressFile:
    """The progress of one recovery, in a safetensors file that is written anew after each block.

    Of several processes the first reads and writes the file, and the others take over what it has read.

    Args:
        path (`str`, path or `None`): The file; `None` keeps nothing.
        made_with (`Mapping[str, Any]`): JSON values that decide the result. A file made with others is refused.

    Attributes:
        blocks (`list[BlockError]`): The finished blocks.
        deltas (`dict[str, torch.Tensor]`): Layer name -> its deltas, of the finished blocks.
        pulls (`dict[str, Pull]`): Layer name -> its preservation term, if there is one.

    Raises:
        ValueError: If the file is of a recovery with other arguments, or is not one.
    """

    def __init__(self, path: str | os.PathLike[str] | None, made_with: Mapping[str, Any]) -> None:
        self.blocks: list[BlockError] = []
        self.deltas: dict[str, torch.Tensor] = {}
        self.pulls: dict[str, Pull] = {}
        self._path = None if path is None else os.fspath(path)
        self._made_with = made_with
        with together():
            if self._path is not None and process_index() == 0:
                check_progress_file(self._path)
                os.makedirs(os.path.dirname(os.path.realpath(self._path)), exist_ok=True)
                if os.path.exists(self._path):
                    self._read(self._path)
        self.blocks, self.deltas, self.pulls = from_first((self.blocks, self.deltas, self.pulls))

    def _read(self, path: str) -> None:
        tensors, stored = read_tensors(path, _KIND, "progress of a recovery", "delete it to start again")
        for key, value in self._made_with.items():
            found = stored["made_with"].get(key)
            if found != value:
                raise ValueError(
                    f"{path} is of a recovery with {key}={found!r}, expected {value!r}: its blocks would not fit; "
                    "give the same arguments, or delete the file to start again."
                )
        self.blocks = [BlockError(**block) for block in stored["blocks"]]
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            part, _, name = key.partition(".")
            parts.setdefault(part, {})[name] = tensor
        self.deltas = parts.pop("delta", {})
        self.pulls = {
            name: Pull(**{part: tensors[name] for part, tensors in parts.items()}) for name in parts.get("slope", {})
        }

    def add(self, block: BlockError, deltas: Mapping[str, Delta]) -> None:
        """Adds a finished block and its deltas, by layer name, and writes the file."""
        self.blocks.append(block)
        self.deltas |= {name: delta.weight.detach().cpu().clone() for name, delta in deltas.items()}
        self.save()

    def save(self) -> None:
        """Writes the file, the whole of it or nothing."""
        if self._path is None or process_index() > 0:
            return
        tensors = {f"delta.{name}": delta for name, delta in self.deltas.items()}
        for name, pull in self.pulls.items():
            tensors |= {f"{part}.{name}": tensor.cpu() for part, tensor in pull._asdict().items()}
        described = {"made_with": self._made_with, "blocks": [asdict(block) for block in self.blocks]}
        write_tensors(self._path, _KIND, tensors, described)
