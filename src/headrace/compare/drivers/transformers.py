"""Driver for Hugging Face transformers in float32. It has static batches: what came while one ran makes the next one.

Reads a folder in the Hugging Face layout. Prompts are padded on the left. Settings: `compile` compiles the decode step
(one token for every row, a static cache) by hand, since `generate` does not compile on a CPU.
"""

from __future__ import annotations

import runpy
from importlib.metadata import version
from pathlib import Path
from typing import Any


class Engine:
    def load(self, task: dict[str, Any]) -> dict[str, Any]:
        import torch
        from transformers import AutoModelForCausalLM

        settings = {"compile": False, "attn_implementation": "sdpa", **task.get("settings", {})}
        self.torch = torch
        attention = settings["attn_implementation"]
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            task["model"], dtype=torch.float32, attn_implementation=attention
        )
        torch.set_num_threads(int(task["threads"]))
        self.max_len = int(task["max_len"])
        self.step: Any = torch.compile(self._step) if settings["compile"] else None
        # Tied matrices are one parameter, which a step reads once, as the head.
        weights = sum(one.numel() * one.element_size() for one in self.model.parameters())
        return {
            "versions": {name: version(name) for name in ("torch", "transformers")},
            "weights_bytes": weights,
            "scheduling": "static",
            "settings": settings | {"threads": torch.get_num_threads()},
            "isa": torch.backends.cpu.get_cpu_capability(),
        }

    def run(self, run: Any) -> None:
        with self.torch.inference_mode():
            while run.waiting:
                self._generate(run.wait(), run)

    def _generate(self, batch: list[Any], run: Any) -> None:
        """Greedy or sampled, row by row as long as the longest answer of the batch."""
        from transformers import DynamicCache, StaticCache

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
        static = self.step is not None
        cache = StaticCache(config=self.model.config, max_cache_len=self.max_len) if static else DynamicCache()
        padded = bool((mask == 0).any())
        for at in range(length, total):
            begin = 0 if at == length else at - 1
            step = self.step if static and at > length else self._step
            seen = mask[:, :at] if padded else None
            if static:
                seen = torch.zeros((len(batch), self.max_len), dtype=torch.long)
                seen[:, :at] = mask[:, :at]
            logits = step(ids, seen, positions[:, begin:at], cache)
            ids = self._choose(logits, run, generator)
            for asked, token in zip(batch, ids[:, 0].tolist(), strict=True):
                run.take(asked, [token])

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


if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).with_name("serve.py")))["serve"](Engine())
