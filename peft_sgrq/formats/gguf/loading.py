"""Loading a GGUF file: the model, with its weights packed, and its tokenizer."""

from __future__ import annotations

import copy
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from peft_sgrq.files.hub import downloading
from peft_sgrq.formats.gguf.file import GGUFFile


def load_gguf(
    path: str | os.PathLike[str],
    gguf_file: str | None = None,
    *,
    adapter: str | os.PathLike[str] | None = None,
    is_trainable: bool = False,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    sub_blocks: bool = True,
    revision: str | None = None,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Loads a GGUF file with its weights packed, so that their scales can be tuned, and its tokenizer.

    Linear layers, the embedding and the output head stay as the file has them, in about the file's memory. What else
    is quantized is dequantized, and said.

    Args:
        path (`str` or path): The file; or a folder or a repository of the Hub, with `gguf_file`.
        gguf_file (`str` or `None`): The file's name in the folder or the repository.
        adapter (`str`, path or `None`): An SGRQ adapter to put on the model.
        is_trainable (`bool`): Whether the adapter is to be trained on.
        dtype (`torch.dtype`, `str` or `None`): What the model computes in; bfloat16 on a GPU and float32 on a CPU if
            not given.
        device_map: As in `from_pretrained`.
        sub_blocks (`bool`): Whether the sub-blocks of K-quants and IQ4_XS (16 or 32 columns) have scales of their own
            to train; `False` trains one scale for each 256 columns.
        revision (`str` or `None`): Revision of the repository on the Hub.
        **kwargs: Passed to `from_pretrained`; a `config` takes the place of the one that transformers makes of the
            header.

    Returns:
        The model in eval mode, a `PeftModel` if an adapter is given, and the tokenizer.

    Raises:
        TypeError: If a `quantization_config` is given, or a `config` by its name.
        ValueError: If the file is truncated, or its weights cannot stay packed; the sentence says why.
        ImportError: If the package gguf, which transformers reads the config with, is missing.

    Example:
        ```py
        >>> import peft_sgrq
        >>> model, tokenizer = peft_sgrq.load_gguf("SmolLM2-135M-Instruct.Q4_1.gguf")
        ```
    """
    from transformers import AutoModelForCausalLM

    from peft_sgrq.formats.gguf.quantizer import SGRQGgufConfig

    if "quantization_config" in kwargs:
        raise TypeError(
            "`quantization_config` is given, expected `sub_blocks` alone, which it is made of; leave it out."
        )
    file_path = find_gguf(path, gguf_file, revision)
    file = GGUFFile(file_path)
    # Local files are given as folder and name. From the Hub, the name is what an adapter finds its base by.
    folder, name = (
        (str(file_path.absolute().parent), file_path.name) if Path(path).exists() else (str(path), str(gguf_file))
    )
    dtype = kwargs.pop("torch_dtype", None) if dtype is None else dtype  # its name in transformers 4
    if dtype is None:
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    hub = {} if revision is None else {"revision": revision}
    config = kwargs.pop("config", None)
    if config is None:
        config = read_config(file, folder, name, **hub)  # the vocabulary is walked once for it
    else:
        if isinstance(config, (str, os.PathLike)):
            raise TypeError(f"`config` is {config!r}, expected what `AutoConfig.from_pretrained({config!r})` returns.")
        config = copy.deepcopy(config)
        vars(config).pop("quantization_config", None)  # of another checkpoint of the model
    empty_model(file, config)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        gguf_file=name,
        dtype=dtype,
        device_map=device_map,
        quantization_config=SGRQGgufConfig(sub_blocks=sub_blocks),
        **hub,
        **kwargs,
    )
    tokenizer = _read_tokenizer(file, folder, name, **hub)
    _drop_tokens_beyond(tokenizer, model.get_input_embeddings().weight.shape[0])
    _warn_of_tokenizer(file)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, os.fspath(adapter), is_trainable=is_trainable)
    return model, tokenizer


def read_config(file: GGUFFile, folder: str | None = None, name: str | None = None, **hub: Any) -> Any:
    """The config that transformers makes of a file's header.

    Args:
        file (`GGUFFile`): The file.
        folder, name (`str` or `None`): What transformers is to know it by; where it is if not given.
        **hub: Further arguments of `from_pretrained`.

    Raises:
        ValueError: If transformers does not know such models.
        ImportError: If the package gguf is missing.
    """
    from transformers import AutoConfig
    from transformers.utils.import_utils import is_gguf_available

    if not is_gguf_available():
        raise ImportError("Reading GGUF files needs the package gguf; install it with `pip install gguf`.")
    try:
        return AutoConfig.from_pretrained(
            folder or str(file.path.absolute().parent), gguf_file=name or file.path.name, **hub
        )
    except OSError:
        raise
    except Exception as error:  # what a field of the header may raise depends on the architecture
        raise ValueError(
            f"transformers makes no config of {file.path} ({_first_line(error)}), expected a whole header of an "
            "architecture it knows; upgrade it with `pip install -U transformers`, download the file again, or use "
            "another model."
        ) from error


def empty_model(file: GGUFFile, config: Any = None) -> Any:
    """The model of a file on the meta device, for the names and shapes of its parameters.

    Args:
        file (`GGUFFile`): The file.
        config: As `read_config` returns it; read if not given.

    Raises:
        ValueError: If there is none of the sizes that the header states.
    """
    from transformers import AutoModelForCausalLM

    config = read_config(file) if config is None else config
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a number that is zero, or no number
        raise ValueError(
            f"transformers makes no model of the sizes that {file.path} states ({_first_line(error)}), expected those "
            "of a language model; download the file again, or use another model."
        ) from error


def _read_tokenizer(file: GGUFFile, folder: str, name: str, **hub: Any) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, gguf_file=name, **hub)
    except OSError:
        raise
    except Exception as error:  # what a vocabulary may raise depends on its kind
        raise ValueError(
            f"transformers makes no tokenizer of {file.path} ({_first_line(error)}), expected a vocabulary it knows; "
            "load the model alone by `AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, "
            "quantization_config=SGRQGgufConfig())`, and its tokenizer from the original model."
        ) from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *lines[:2]])


def find_gguf(path: str | os.PathLike[str], gguf_file: str | None = None, revision: str | None = None) -> Path:
    """The local path of a file: given itself, in a folder, or in a repository of the Hub (downloaded, or cached).

    Raises:
        ValueError: If there is no such file.
    """
    local = Path(path)
    if local.is_file():
        if gguf_file is not None and gguf_file != local.name:
            raise ValueError(
                f"{local} is a file and `gguf_file` is {gguf_file!r}, expected a folder or a repository with it; "
                "leave `gguf_file` out, or give the folder."
            )
        return local
    if gguf_file is None:
        found = sorted(file.name for file in local.glob("*.gguf")) if local.is_dir() else []
        here = f" (there are {', '.join(found[:4])})" if found else ""
        raise ValueError(
            f"{local} is no .gguf file{here}, expected the path of one, or a folder or a repository of the Hub with "
            "the name of the file in it; give `gguf_file`."
        )
    if local.is_dir():
        if not (local / gguf_file).is_file():
            raise ValueError(f"{local} holds no file {gguf_file!r}, expected a .gguf file in it; check the name.")
        return local / gguf_file
    from huggingface_hub import hf_hub_download

    with downloading(f"{str(path)!r} is no file or folder here, and {gguf_file!r}", "the file"):
        return Path(hf_hub_download(str(path), gguf_file, revision=revision))


def _drop_tokens_beyond(tokenizer: Any, rows: int) -> None:
    """Takes tokens off a tokenizer that the embedding has no row for.

    transformers 5.23 gives every vocabulary of GPT-2's kind a token `<|endoftext|>`, behind the last one if the file
    has none (`AutoTokenizer.from_pretrained(folder, gguf_file=...)`, then `len(tokenizer)`). With such a tokenizer
    beside an adapter, `AutoPeftModelForCausalLM` wants to add a row to the embedding, which is packed.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): Changed in place.
        rows (`int`): Of the embedding.
    """
    from tokenizers import Tokenizer

    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = [token for token in backend["added_tokens"] if token["id"] < rows]
    if len(kept) < len(backend["added_tokens"]):
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps({**backend, "added_tokens": kept}))


def _warn_of_tokenizer(file: GGUFFile) -> None:
    """Warns if transformers rebuilds another tokenizer than llama.cpp has: an adapter learns on other ids then."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    kind = file.metadata.get("tokenizer.ggml.pre")
    if file.metadata.get("tokenizer.ggml.model") == "gpt2" and kind not in (*GGUF_PRE_TOKENIZER_SPLITS, "gpt-2"):
        warnings.warn(
            f"transformers does not know how llama.cpp splits text for this vocabulary (tokenizer.ggml.pre is {kind!r}"
            ") and splits it as GPT-2 does: some texts get other token ids than llama.cpp gives them. Train with the "
            "tokenizer of the original model, `AutoTokenizer.from_pretrained(ORIGINAL)`."
        )
