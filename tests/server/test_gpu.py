"""A server on a GPU, with one made by hand: its engine runs where it was said to, and the GPU's energy is counted."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from headrace.core.config import EngineConfig, Gpu, Hardware
from headrace.engine import model
from headrace.engine.model import OpenModel
from headrace.server import lifecycle
from headrace.server.config import ServeConfig
from headrace.testing.checkpoints import tiny_checkpoint

GIB = 2**30
H200 = Gpu("NVIDIA H200", 140 * GIB, 139 * GIB, (9, 0), 132)


def test_the_engine_stays_on_its_device_and_its_energy_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_checkpoint(tmp_path / "tiny")
    asked: list[bool] = []
    monkeypatch.setattr(lifecycle, "find_meters", lambda cuda: asked.append(cuda) or [])
    for gpu, device in ((H200, "cuda"), (None, "cpu")):
        found = Hardware(2, 8 * GIB, ("native", "torch"), gpu, "no GPU")
        monkeypatch.setattr(model, "probe_hardware", lambda found=found: found)
        server = lifecycle.Server(EngineConfig(str(path)), ServeConfig())
        with closing(OpenModel(EngineConfig(str(path)))) as opened:
            assert server._engine_config(opened).device == device
            server._metrics(opened, "tiny")
    assert asked == [True, False]
