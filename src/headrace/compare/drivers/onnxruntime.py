"""Driver for onnxruntime-genai's Engine with static batches, all it has on a CPU (its paged attention needs a GPU).

Reads a folder that its model builder made. Its Generator would do for one row, but it mistakes the padding of rows of
different lengths for text. Static batches take no seed: sampled answers differ from run to run. It keeps the token
that ends an answer to itself, so answers are ended here.
"""

from __future__ import annotations

import json
import runpy
from importlib.metadata import version
from pathlib import Path
from typing import Any

MAX_EVENTS = 256


class Engine:
    def load(self, task: dict[str, Any]) -> dict[str, Any]:
        import onnxruntime_genai  # type: ignore[import, unused-ignore]

        self.lib = onnxruntime_genai
        folder = Path(task["model"])
        options = {"intra_op_num_threads": int(task["threads"]), **task.get("settings", {})}
        config = onnxruntime_genai.Config(str(folder))
        vocab_size = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["vocab_size"]
        # One id has to end answers: the last one, which is masked as long as an answer is to go on.
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}, "eos_token_id": vocab_size - 1}}))
        config.overlay(json.dumps({"engine": {"static_batching": {"max_batch_size": int(task["max_requests"])}}}))
        self.engine = onnxruntime_genai.Engine(onnxruntime_genai.Model(config))
        self.events = self.engine.create_event_buffer(MAX_EVENTS)
        facts = json.loads((folder / "headrace-peer.json").read_text(encoding="utf-8"))
        return {
            "versions": {name: version(name) for name in ("onnxruntime", "onnxruntime-genai")},
            "weights_bytes": facts["weights_bytes"],
            "scheduling": "static",
            "settings": options,
        }

    def run(self, run: Any) -> None:
        live: dict[Any, Any] = {}
        while live or run.waiting:
            for asked in run.arrived() if live else run.wait():
                live[self._begin(asked, run)] = asked
            for event in self.engine.run(self.events):
                if event.flags & self.lib.EngineEventFlags.TOKEN:
                    run.take(live[event.request], [event.token])
            for request in [request for request, asked in live.items() if asked.done]:
                del live[request]
                request.close()

    def _begin(self, asked: Any, run: Any) -> Any:
        options = self.lib.RequestOptions()
        options.set_max_session_tokens(len(asked.token_ids) + asked.max_tokens)
        request = self.engine.create_request(options=options)
        turn = self.lib.TurnOptions(request)
        turn.set_max_generated_tokens(asked.max_tokens)
        turn.set_min_generated_tokens(asked.max_tokens)
        turn.set_do_sample(run.temperature > 0)
        if run.temperature > 0:
            turn.set_temperature(run.temperature)
            turn.set_top_p(run.top_p)
            turn.set_top_k(0)
        request.begin_turn(asked.token_ids, turn)
        return request


if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).with_name("serve.py")))["serve"](Engine())
