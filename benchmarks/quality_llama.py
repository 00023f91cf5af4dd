"""llama.cpp's logits at every position of a window, for `quality.py`. A standalone script: imports nothing of headrace.

    PYTHON -I quality_llama.py MODEL.gguf THREADS WINDOW FIRST

Writes one JSON line (versions, vocabulary, KV type), then for every JSON list of WINDOW - 1 token ids that comes on
stdin, the float32 logits of positions FIRST and after, as the machine holds them. Everything is at llama.cpp's defaults
but for the number of threads; a window is computed at once.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

KV_TYPES = {0: "float32", 1: "float16"}


def open_context(lib: Any, path: str, threads: int, length: int) -> tuple[Any, int, str]:
    """-> context, size of the vocabulary, type of the KV cache"""
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot load {path}")
    params = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = length
    params.n_threads = params.n_threads_batch = threads
    context = lib.llama_init_from_model(model, params)
    if not context:
        raise SystemExit("llama.cpp cannot make a context of this size")
    kv = KV_TYPES.get(int(params.type_k), str(int(params.type_k)))
    return context, lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model)), kv


def main(path: str, threads: int, window: int, first: int) -> None:
    # The answer goes to the real stdout; what the library prints goes to stderr.
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    import llama_cpp  # type: ignore[import, unused-ignore]
    import numpy as np

    length = window - 1
    context, vocabulary, kv = open_context(llama_cpp, path, threads, length)
    facts = {"version": llama_cpp.__version__, "vocabulary": vocabulary, "kv": kv}
    answer.write(json.dumps(facts).encode() + b"\n")
    answer.flush()
    batch = llama_cpp.llama_batch_init(length, 0, 1)
    for line in sys.stdin:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
        batch.n_tokens = length
        for at, token in enumerate(json.loads(line)):
            batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, at, 1
            batch.seq_id[at][0], batch.logits[at] = 0, int(at >= first)
        if status := llama_cpp.llama_decode(context, batch):
            raise SystemExit(f"llama_decode returned {status}")
        shape = (length - first, vocabulary)
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape=shape)
        answer.write(logits.tobytes())
        answer.flush()


if __name__ == "__main__":
    main(sys.argv[1], *(int(number) for number in sys.argv[2:5]))
