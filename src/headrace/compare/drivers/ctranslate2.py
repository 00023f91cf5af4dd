"""Driver for CTranslate2's Generator. It has static batches only: what came while one ran makes the next one.

Reads a folder that its converter made; `precision` is its compute type.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any


class Engine:
    def load(self, task: dict[str, Any]) -> dict[str, Any]:
        import ctranslate2  # type: ignore[import, unused-ignore]

        self.lib = ctranslate2
        folder = Path(task["model"])
        self.generator = ctranslate2.Generator(
            str(folder), compute_type=task["precision"], inter_threads=1, intra_threads=int(task["threads"])
        )
        self.max_requests = int(task["max_requests"])
        self.tokens = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
        facts = json.loads((folder / "headrace-peer.json").read_text(encoding="utf-8"))
        return {
            "versions": {"ctranslate2": ctranslate2.__version__},
            "weights_bytes": facts["weights_bytes"],
            "scheduling": "static",
            "settings": {"compute_type": self.generator.compute_type, "threads": int(task["threads"])},
        }

    def run(self, run: Any) -> None:
        while run.waiting:
            self._generate(run.wait(self.max_requests), run)

    def _generate(self, batch: list[Any], run: Any) -> None:
        options: dict[str, Any] = {"sampling_topk": 1}
        if run.temperature > 0:
            self.lib.set_random_seed(run.seed)
            options = {"sampling_topk": 0, "sampling_topp": run.top_p, "sampling_temperature": run.temperature}

        def take(step: Any) -> bool:
            """Whether this answer has ended."""
            asked = batch[step.batch_id]
            run.take(asked, [step.token_id])
            return bool(asked.done)

        self.generator.generate_batch(
            [[self.tokens[token] for token in asked.token_ids] for asked in batch],
            max_length=max(asked.max_tokens for asked in batch),
            end_token=sorted(run.ends),
            include_prompt_in_result=False,
            callback=take,
            **options,
        )


if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).with_name("serve.py")))["serve"](Engine())
