"""Driver for llama.cpp through llama-cpp-python's low-level calls: continuous batching as its server does it.

Each iteration computes one token of every running sequence and fills the batch up with prompt tokens. Reads a GGUF
file.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

N_BATCH, N_UBATCH = 2048, 512


class Sequence:
    """A request in the running batch."""

    def __init__(self, asked: Any, slot: int) -> None:
        self.asked = asked
        self.slot = slot
        self.length = 0
        """Tokens in the KV cache."""
        self.todo: list[int] = list(asked.token_ids)
        self.sampler: Any = None


class Engine:
    def load(self, task: dict[str, Any]) -> dict[str, Any]:
        import llama_cpp  # type: ignore[import, unused-ignore]

        self.lib = lib = llama_cpp
        lib.llama_backend_init()
        model_params = lib.llama_model_default_params()
        self.model = lib.llama_model_load_from_file(task["model"].encode(), model_params)
        if not self.model:
            raise ValueError(f"llama.cpp cannot load {task['model']}")
        self.max_requests = int(task["max_requests"])
        settings = {"kv_unified": True, "flash_attn": -1, **task.get("settings", {})}
        params = lib.llama_context_default_params()
        params.n_ctx = int(task["max_len"]) * self.max_requests
        params.n_batch, params.n_ubatch = N_BATCH, N_UBATCH
        params.n_seq_max = self.max_requests
        params.n_threads = params.n_threads_batch = int(task["threads"])
        params.kv_unified = bool(settings["kv_unified"])
        params.flash_attn_type = int(settings["flash_attn"])
        params.no_perf = True
        self.context = lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise ValueError("llama.cpp cannot make a context of this size")
        self.memory = lib.llama_get_memory(self.context)
        self.vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.batch = lib.llama_batch_init(N_BATCH, 0, 1)
        return {
            "versions": {"llama-cpp-python": lib.__version__},
            "weights_bytes": lib.llama_model_size(self.model),
            "scheduling": "continuous",
            "settings": settings | {"n_batch": N_BATCH, "n_ubatch": N_UBATCH},
            "isa": lib.llama_print_system_info().decode(),
        }

    def run(self, run: Any) -> None:
        lib = self.lib
        lib.llama_memory_clear(self.memory, False)
        free = list(range(self.max_requests))
        queue: list[Any] = []
        live: list[Sequence] = []
        while queue or live or run.waiting:
            queue += run.arrived() if queue or live else run.wait()
            while queue and free:
                live.append(self._start(queue.pop(0), free.pop(), run))
            for sequence in self._step(live, run):
                live.remove(sequence)
                free.append(sequence.slot)

    def _start(self, asked: Any, slot: int, run: Any) -> Sequence:
        lib, sequence = self.lib, Sequence(asked, slot)
        if run.temperature > 0:
            chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_top_p(run.top_p, 1))
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_temp(run.temperature))
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_dist((run.seed + slot) % 2**32))
            sequence.sampler = chain
        return sequence

    def _step(self, live: list[Sequence], run: Any) -> list[Sequence]:
        """One `llama_decode`. Returns the sequences that have ended."""
        lib, batch = self.lib, self.batch
        batch.n_tokens = 0
        chosen: list[Sequence] = []
        for sequence in sorted(live, key=lambda one: len(one.todo) > 1):
            count = min(len(sequence.todo), N_BATCH - batch.n_tokens)
            for token in sequence.todo[:count]:
                at = batch.n_tokens
                batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, sequence.length, 1
                batch.seq_id[at][0], batch.logits[at] = sequence.slot, 0
                batch.n_tokens += 1
                sequence.length += 1
            del sequence.todo[:count]
            if count and not sequence.todo:
                batch.logits[batch.n_tokens - 1] = 1
                chosen.append(sequence)
        status = lib.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        ended = []
        for sequence, token in zip(chosen, self._choose(chosen), strict=True):
            run.take(sequence.asked, [token])
            sequence.todo = [token]
            if sequence.asked.done:
                ended.append(sequence)
                lib.llama_memory_seq_rm(self.memory, sequence.slot, -1, -1)
                if sequence.sampler is not None:
                    lib.llama_sampler_free(sequence.sampler)
        return ended

    def _choose(self, chosen: list[Sequence]) -> list[int]:
        """The next token of each sequence; logits come in the order of the batch."""
        import numpy as np

        lib = self.lib
        if not chosen:
            return []
        if chosen[0].sampler is None:
            shape = (len(chosen), self.vocab_size)
            logits = np.ctypeslib.as_array(lib.llama_get_logits(self.context), shape=shape)
            return [int(row.argmax()) for row in logits]
        rows = [at for at in range(self.batch.n_tokens) if self.batch.logits[at]]
        return [
            lib.llama_sampler_sample(sequence.sampler, self.context, row)
            for sequence, row in zip(chosen, rows, strict=True)
        ]


if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).with_name("serve.py")))["serve"](Engine())
