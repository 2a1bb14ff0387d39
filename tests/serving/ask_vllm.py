"""Run in vLLM's own environment: log-probabilities of prompts by several models, from and to JSON.

python ask_vllm.py QUESTIONS.json ANSWERS.json

QUESTIONS has `prompts`, lists of token ids, and `models`, name -> folder. ANSWERS has by name `logprobs`, those of
each token of each prompt but the first, and the `quantization` vLLM saw, or the `error` it raised.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def ask(model: str, prompts: list[list[int]]) -> dict[str, Any]:
    """What one model makes of the prompts."""
    from vllm import LLM, SamplingParams

    try:
        llm = LLM(
            model,
            enforce_eager=True,
            max_model_len=128,
            max_num_seqs=8,
            seed=0,
            disable_log_stats=True,
            enable_prefix_caching=False,
        )
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    found = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0),
        use_tqdm=False,
    )
    logprobs = [
        [
            places[token].logprob
            for places, token in zip(one.prompt_logprobs[1:], one.prompt_token_ids[1:], strict=True)
        ]
        for one in found
    ]
    return {"logprobs": logprobs, "quantization": llm.llm_engine.model_config.quantization}


def main() -> None:
    os.environ.update(SETTINGS)
    from vllm.distributed import cleanup_dist_env_and_memory

    questions = json.loads(Path(sys.argv[1]).read_text())
    answers = {}
    for name, model in questions["models"].items():
        answers[name] = ask(model, questions["prompts"])
        gc.collect()
        cleanup_dist_env_and_memory()
        Path(sys.argv[2]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
