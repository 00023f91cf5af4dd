"""Driver for OpenVINO GenAI's ContinuousBatchingPipeline. Reads a folder with an IR, or a GGUF file (a slow path)."""

from __future__ import annotations

import os
import runpy
from importlib.metadata import version
from pathlib import Path
from typing import Any

KV_CACHE_GIB = 4
"""Its own cache grows with what is used, up to this."""


class Engine:
    def load(self, task: dict[str, Any]) -> dict[str, Any]:
        import openvino_genai  # type: ignore[import, unused-ignore]

        self.lib = openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_seqs = max(1, int(task["max_requests"]))
        properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": int(task["threads"]), "PERFORMANCE_HINT": "LATENCY"}
        if task["precision"] == "fp32":
            properties["INFERENCE_PRECISION_HINT"] = "f32"
        elif os.environ.get("ONEDNN_MAX_CPU_ISA") == "AVX2":
            # What it chooses by itself on a CPU without VNNI and bf16; it asks the CPU, not oneDNN, and then fails.
            properties |= {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
        for name, value in task.get("settings", {}).items():
            if hasattr(scheduler, name):
                setattr(scheduler, name, value)
            else:
                properties[name] = value
        if scheduler.cache_size == 0 and scheduler.num_kv_blocks == 0:
            scheduler.cache_size = KV_CACHE_GIB
        model = Path(task["model"])
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(str(model), scheduler, "CPU", properties)
        self.count = 0
        weights = model if model.is_file() else model / "openvino_model.bin"
        return {
            "versions": {name: version(name) for name in ("openvino", "openvino-genai")},
            "weights_bytes": weights.stat().st_size,
            "scheduling": "continuous",
            "settings": {**properties, "scheduler": scheduler.to_string()},
        }

    def run(self, run: Any) -> None:
        live: dict[int, tuple[Any, Any]] = {}
        while live or run.waiting:
            for asked in run.arrived() if live else run.wait():
                self.count += 1
                live[self.count] = (asked, self._add(self.count, asked, run))
            self.pipeline.step()
            for number, (asked, handle) in list(live.items()):
                while handle.can_read():
                    for output in handle.read().values():
                        run.take(asked, output.generated_ids)
                if asked.done:
                    del live[number]

    def _add(self, number: int, asked: Any, run: Any) -> Any:
        import numpy as np
        import openvino  # type: ignore[import, unused-ignore]

        config = self.lib.GenerationConfig()
        config.max_new_tokens = asked.max_tokens
        config.ignore_eos = not run.ends
        config.stop_token_ids = set(run.ends)
        config.do_sample = run.temperature > 0
        if config.do_sample:
            config.temperature, config.top_p, config.rng_seed = run.temperature, run.top_p, run.seed + number
            config.top_k = 2**31 - 1
        ids = openvino.Tensor(np.asarray([asked.token_ids], dtype=np.int64))
        return self.pipeline.add_request(number, ids, config)


if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).with_name("serve.py")))["serve"](Engine())
