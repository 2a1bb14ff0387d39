"""llama.cpp in this process: logits of a GGUF file, with a LoRA adapter on it if wanted, and quantizing by ggml.

The wheel xllamacpp holds llama.cpp as a shared library that exports its C functions; they are called by ctypes. Struct
layouts are those of `llama.h` at the build the wheel holds, so known defaults are checked first.
"""

from __future__ import annotations

import ctypes as c
import functools
import importlib.util
import time
from pathlib import Path

import numpy as np

_FLOAT32 = 0
_LOG = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)
_QUIET = _LOG(lambda level, text, data: None)


class _ModelParams(c.Structure):
    _fields_ = [
        *((name, c.c_void_p) for name in ("devices", "buffer_types")),
        *((name, c.c_int32) for name in ("n_gpu_layers", "split_mode", "load_mode", "lazy", "main_gpu")),
        *((name, c.c_void_p) for name in ("tensor_split", "progress", "progress_data", "overrides")),
        *((name, c.c_bool) for name in ("vocab_only", "check_tensors", "repack", "no_host", "no_alloc", "load_mtp")),
        ("padding", c.c_char * 64),
    ]


class _ContextParams(c.Structure):
    _fields_ = [
        *(
            (name, c.c_uint32)
            for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq", "n_out", "n_out_seq")
        ),
        *((name, c.c_int32) for name in ("n_threads", "n_threads_batch", "ctx_type", "rope", "pooling", "attention")),
        ("flash_attention", c.c_int32),
        *((name, c.c_float) for name in ("rope_base", "rope_scale", "yarn0", "yarn1", "yarn2", "yarn3")),
        ("yarn_context", c.c_uint32),
        ("defragment", c.c_float),
        *((name, c.c_void_p) for name in ("callback", "callback_data")),
        *((name, c.c_int32) for name in ("type_k", "type_v")),
        *((name, c.c_void_p) for name in ("abort", "abort_data")),
        *((name, c.c_bool) for name in ("embeddings", "offload", "no_perf", "op_offload", "swa_full", "unified")),
        ("samplers", c.c_void_p),
        ("n_samplers", c.c_size_t),
        ("other", c.c_void_p),
        ("padding", c.c_char * 64),
    ]


class _Batch(c.Structure):
    _fields_ = [
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embeddings", c.c_void_p),
        ("position", c.POINTER(c.c_int32)),
        ("n_sequences", c.POINTER(c.c_int32)),
        ("sequences", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
        ("padding", c.c_char * 64),
    ]


@functools.cache
def library() -> c.CDLL:
    """llama.cpp's functions.

    Raises:
        RuntimeError: If the wheel is missing, or holds another llama.cpp than the layouts here are of.
    """
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise RuntimeError("xllamacpp is not installed; install it with `pip install xllamacpp`.")
    (file,) = Path(spec.origin).parent.glob("xllamacpp*.so")
    found = c.CDLL(str(file))
    pointer = c.c_void_p
    for name, result, arguments in (
        ("llama_model_default_params", _ModelParams, []),
        ("llama_context_default_params", _ContextParams, []),
        ("llama_model_load_from_file", pointer, [c.c_char_p, _ModelParams]),
        ("llama_init_from_model", pointer, [pointer, _ContextParams]),
        ("llama_model_get_vocab", pointer, [pointer]),
        ("llama_vocab_n_tokens", c.c_int32, [pointer]),
        ("llama_batch_init", _Batch, [c.c_int32, c.c_int32, c.c_int32]),
        ("llama_batch_free", None, [_Batch]),
        ("llama_decode", c.c_int32, [pointer, _Batch]),
        ("llama_get_logits", c.POINTER(c.c_float), [pointer]),
        ("llama_get_memory", pointer, [pointer]),
        ("llama_memory_clear", None, [pointer, c.c_bool]),
        ("llama_adapter_lora_init", pointer, [pointer, c.c_char_p]),
        ("llama_set_adapters_lora", c.c_int32, [pointer, c.POINTER(pointer), c.c_size_t, c.POINTER(c.c_float)]),
        ("llama_free", None, [pointer]),
        ("llama_model_free", None, [pointer]),
        ("ggml_quantize_chunk", c.c_size_t, [c.c_int, pointer, pointer, c.c_int64, c.c_int64, c.c_int64, pointer]),
    ):
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    defaults = found.llama_context_default_params()
    if (defaults.n_ctx, defaults.n_batch, defaults.n_ubatch) != (512, 2048, 512):
        raise RuntimeError("this xllamacpp holds another llama.cpp than the struct layouts here are of")
    found.llama_log_set(_QUIET, None)
    found.llama_backend_init()
    return found


class Llama:
    """A GGUF file loaded by llama.cpp, on the CPU.

    Args:
        path (`Path`): The file.
        lora (`Path` or `None`): A LoRA adapter in GGUF, as `--lora` takes it.
        context (`int`): The longest sequence.
        threads (`int`): How many threads compute.
    """

    def __init__(self, path: Path, lora: Path | None = None, context: int = 512, threads: int = 1) -> None:
        lib = self._lib = library()
        settings = lib.llama_model_default_params()
        settings.n_gpu_layers = 0
        self._model = lib.llama_model_load_from_file(str(path).encode(), settings)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        options = lib.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = context
        options.n_threads = options.n_threads_batch = threads
        options.type_k = options.type_v = _FLOAT32
        options.flash_attention = 0
        self._context = lib.llama_init_from_model(self._model, options)
        self._vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        if lora is not None:
            adapter = lib.llama_adapter_lora_init(self._model, str(lora).encode())
            if not adapter or lib.llama_set_adapters_lora(
                self._context, (c.c_void_p * 1)(adapter), 1, (c.c_float * 1)(1.0)
            ):
                raise RuntimeError(f"llama.cpp cannot use the adapter {lora}")

    def _decode(self, ids: list[int], start: int) -> np.ndarray:
        lib, batch = self._lib, self._lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.position[place] = token, start + place
            batch.n_sequences[place], batch.logits[place] = 1, 1
            batch.sequences[place][0] = 0
        status = lib.llama_decode(self._context, batch)
        lib.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        return np.ctypeslib.as_array(lib.llama_get_logits(self._context), (len(ids), self._vocabulary)).copy()

    def logits(self, ids: list[int]) -> np.ndarray:
        """The logits after each token of a sequence, float32 `[tokens, vocabulary]`."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        return self._decode(ids, 0)

    def loss(self, sequences: list[list[int]]) -> float:
        """The mean negative log-likelihood of the next token, in nats."""
        total, count = 0.0, 0
        for ids in sequences:
            logits = self.logits(ids)[:-1].astype(np.float64)
            top = logits.max(1, keepdims=True)
            log_sum = np.log(np.exp(logits - top).sum(1)) + top[:, 0]
            total += float((log_sum - logits[np.arange(len(logits)), ids[1:]]).sum())
            count += len(logits)
        return total / count

    def tokens_per_second(self, ids: list[int]) -> float:
        """How fast single tokens are decoded, one after the other, by CPU time."""
        self.logits(ids[:1])
        start = time.process_time()
        for place, token in enumerate(ids[1:], 1):
            self._decode([token], place)
        return (len(ids) - 1) / (time.process_time() - start)

    def close(self) -> None:
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)


def quantize(ggml_type: int, weight: np.ndarray, row_bytes: int) -> np.ndarray:
    """A float32 matrix `[N, K]` quantized by ggml without an importance matrix, uint8 `[N, row_bytes]`."""
    weight = np.ascontiguousarray(weight, np.float32)
    packed = np.zeros((len(weight), row_bytes), np.uint8)
    written = library().ggml_quantize_chunk(ggml_type, weight.ctypes.data, packed.ctypes.data, 0, *weight.shape, None)
    if written != packed.nbytes:
        raise RuntimeError(f"ggml wrote {written} bytes, expected {packed.nbytes}")
    return packed
