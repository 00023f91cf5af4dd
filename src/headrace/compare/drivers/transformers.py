"""Driver for Hugging Face transformers in float32. Reads a folder in the Hugging Face layout.

By default static batches, padded on the left: what came while one ran makes the next one, and a row that has ended
leaves its batch. Settings:
    compile      the decode step (one token for every row, a static cache) is compiled by hand while loading, since
                 `generate` does not compile on a CPU; a row stays to the batch's end: its cache cannot be cut out
    continuous   its own continuous batching instead, greedy only
"""

from __future__ import annotations

import runpy
from importlib.metadata import version
from pathlib import Path
from typing import Any

PAGE, STEP_TOKENS = 32, 512
"""Of continuous batching: tokens of a page of the KV cache, and most tokens of a step. What it chooses by itself is for
GPUs, and takes all memory."""
LOOK_S = 0.2


class Engine:
    def load(self, task: dict[str, Any]) -> dict[str, Any]:
        import torch
        from transformers import AutoModelForCausalLM

        settings = {"compile": False, "continuous": False, "attn_implementation": "sdpa", **task.get("settings", {})}
        if settings["compile"] and settings["continuous"]:
            raise ValueError("settings: compile or continuous, not both")
        attention = settings["attn_implementation"]
        model: Any = AutoModelForCausalLM.from_pretrained(
            task["model"], dtype=torch.float32, attn_implementation=attention
        )
        torch.set_num_threads(int(task["threads"]))
        self.batches: Any = Continuous(model, task) if settings["continuous"] else Static(model, task, settings)
        # Tied matrices are one parameter, which a step reads once, as the head.
        weights = sum(one.numel() * one.element_size() for one in model.parameters())
        return {
            "versions": {name: version(name) for name in ("torch", "transformers")},
            "weights_bytes": weights,
            "scheduling": "continuous" if settings["continuous"] else "static",
            "settings": settings | {"threads": torch.get_num_threads()},
            "isa": torch.backends.cpu.get_cpu_capability(),
        }

    def run(self, run: Any) -> None:
        self.batches.run(run)


class Static:
    def __init__(self, model: Any, task: dict[str, Any], settings: dict[str, Any]) -> None:
        import torch

        self.torch = torch
        self.model = model
        self.padded_len, self.max_requests = int(task["padded_len"]), int(task["max_requests"])
        self.compiled: Any = None
        if settings["compile"]:
            self.compiled = torch.compile(self._step)
            self._compile()

    def _compile(self) -> None:
        """Now rather than in a run: for one row, for two, and with the third size for any number."""
        torch = self.torch
        with torch.inference_mode():
            for rows in range(1, min(3, self.max_requests) + 1):
                cache, mask = self._cache(), torch.ones((rows, 2), dtype=torch.long)
                for at in (1, 2):
                    ids, positions = torch.zeros((rows, 1), dtype=torch.long), torch.full((rows, 1), at - 1)
                    step = self._step if at == 1 else self.compiled
                    step(ids, self._seen(mask, at), positions, cache)

    def run(self, run: Any) -> None:
        with self.torch.inference_mode():
            while run.waiting:
                self._generate(run.wait(self.max_requests), run)

    def _generate(self, batch: list[Any], run: Any) -> None:
        """Greedy or sampled, until every answer of the batch has ended."""
        torch = self.torch
        generator = torch.Generator().manual_seed(run.seed)
        length = max(len(asked.token_ids) for asked in batch)
        total = length + max(asked.max_tokens for asked in batch)
        ids = torch.zeros((len(batch), length), dtype=torch.long)
        mask = torch.zeros((len(batch), total), dtype=torch.long)
        for row, asked in enumerate(batch):
            ids[row, length - len(asked.token_ids) :] = torch.tensor(asked.token_ids)
            mask[row, length - len(asked.token_ids) :] = 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = self._cache()
        at = length
        while batch:
            begin = 0 if at == length else at - 1
            step = self._step if self.compiled is None or at == length else self.compiled
            # A copy, for a slice has other strides from batch to batch, and would be compiled anew.
            now = positions[:, begin:at].clone(memory_format=torch.contiguous_format)
            logits = step(ids, self._seen(mask, at), now, cache)
            ids = self._choose(logits, run, generator)
            for asked, token in zip(batch, ids[:, 0].tolist(), strict=True):
                run.take(asked, [token])
            left = [row for row, asked in enumerate(batch) if not asked.done]
            if len(left) < len(batch) and (self.compiled is None or not left):
                rows = torch.tensor(left, dtype=torch.long)
                batch = [batch[row] for row in left]
                ids, mask, positions = ids[rows], mask[rows], positions[rows]
                if left:
                    cache.batch_select_indices(rows)
            at += 1

    def _cache(self) -> Any:
        from transformers import DynamicCache, StaticCache

        if self.compiled is None:
            return DynamicCache()
        return StaticCache(config=self.model.config, max_cache_len=self.padded_len)

    def _seen(self, mask: Any, at: int) -> Any:
        """What the attention may look at: None where nothing is padding; of a static cache as long as that."""
        if self.compiled is None:
            return mask[:, :at] if bool((mask == 0).any()) else None
        seen = self.torch.zeros((len(mask), self.padded_len), dtype=self.torch.long)
        seen[:, :at] = mask[:, :at]
        return seen

    def _step(self, ids: Any, mask: Any, positions: Any, cache: Any) -> Any:
        """Logits after the last token of every row: [rows, vocabulary]."""
        out = self.model(
            ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        return out.logits[:, -1]

    def _choose(self, logits: Any, run: Any, generator: Any) -> Any:
        """[rows, 1] token ids."""
        if run.temperature == 0:
            return logits.argmax(-1, keepdim=True)
        torch = self.torch
        chances = torch.softmax(logits / run.temperature, dim=-1)
        ordered, order = chances.sort(dim=-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= run.top_p] = 0
        return order.gather(-1, torch.multinomial(ordered, 1, generator=generator))


class Continuous:
    """A thread of its own computes, and puts each token into a queue; it ends with the run."""

    def __init__(self, model: Any, task: dict[str, Any]) -> None:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        most = int(task["max_requests"])
        config = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=most * (int(task["max_len"]) // PAGE + 2),
            max_batch_tokens=max(STEP_TOKENS, most),
            max_requests_per_batch=most,
            allow_block_sharing=False,
        )
        generation: Any = GenerationConfig
        self.manager: Any = model.init_continuous_batching(
            generation(do_sample=False, eos_token_id=-1), continuous_batching_config=config
        )
        self.count = 0

    def run(self, run: Any) -> None:
        if run.temperature > 0:
            raise ValueError("continuous: temperature 0 only")
        live: dict[str, Any] = {}
        self.manager.start()
        try:
            while live or run.waiting:
                for asked in run.arrived() if live else run.wait():
                    self.count += 1
                    live[str(self.count)] = asked
                    self._add(str(self.count), asked, run)
                self._take(live, run)
        finally:
            self.manager.stop(block=True, keep_for_next_session=True, hard_stop=bool(live))

    def _add(self, number: str, asked: Any, run: Any) -> None:
        self.manager.add_request(
            asked.token_ids,
            request_id=number,
            max_new_tokens=asked.max_tokens,
            streaming=True,
            eos_token_id=sorted(run.ends) or -1,
        )

    def _take(self, live: dict[str, Any], run: Any) -> None:
        """What comes next, in at most LOOK_S or until the next request arrives."""
        output = self.manager.get_result(timeout=min(LOOK_S, run.next_s))
        if output is None:
            if not self.manager.is_running():
                raise RuntimeError("its thread has ended")
            return
        if output.error is not None:
            raise RuntimeError(output.error)
        asked = live[output.request_id]
        run.take(asked, output.generated_tokens[len(asked.output) :])
        if output.is_finished():
            del live[output.request_id]


if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).with_name("serve.py")))["serve"](Engine())
