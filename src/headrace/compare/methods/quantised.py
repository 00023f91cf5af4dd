"""fused on weights that are rounded at load: faster where a step is bound by memory, and not the same model."""

from __future__ import annotations

import math
from dataclasses import replace

from headrace.compare.methods import Outcome
from headrace.compare.methods.admission import DESCRIPTIONS, AdmissionMethod
from headrace.compare.methods.bench import Bench, beside_text, same_settings
from headrace.compare.workloads import Workload
from headrace.core.config import ResolvedConfig
from headrace.core.errors import ConfigError, OutOfMemory
from headrace.engine.hardware import probe_hardware
from headrace.engine.model import OpenModel

BITS_A_WEIGHT = 10
"""More than int8 and its scales take as the native backend keeps them; int4 takes less."""


class QuantisedMethod:
    """Runs workloads on an engine of its own, whose weights are rounded; all else is as the bench has it."""

    exact = False

    def __init__(self, name: str, quant: str, bench: Bench) -> None:
        """`quant`: int8, int4 or fp8."""
        self.name = name
        self.description = f"fused, on weights rounded to {quant} as they are loaded: {DESCRIPTIONS['fused']}"
        self.config: ResolvedConfig | None = None
        """As resolved by `start`."""
        self._quant = quant
        self._bench = bench
        self._own: Bench | None = None
        self._fused: AdmissionMethod | None = None

    def start(self, workload: Workload) -> float:
        """Raises ConfigError where the base has these weights already or no rounding is to be had, OutOfMemory."""
        base = self._bench.opened
        if base.config.quant == self._quant:
            raise ConfigError(
                f"{self.name}: the base's weights are rounded to {self._quant} already: fused is the same"
            )
        if base.checkpoint.is_packed:
            raise ConfigError(
                f"{self.name}: this checkpoint's weights are packed, and stay so: only plain ones are rounded; give a "
                "checkpoint of 16 or 32 bits"
            )
        if self._quant == "fp8" and base.config.device != "cuda":
            raise ConfigError(
                f"{self.name}: products in fp8 need an NVIDIA GPU (--device cuda), of compute capability 8.9 or newer"
            )
        opened = self._open(base)
        try:
            own = Bench(opened, self._bench.clock, self._bench.sleep)
            fused = AdmissionMethod(self.name, "fused", own)
            load_s = fused.start(workload)
        except BaseException:
            opened.close()
            raise
        self._own, self._fused, self.config = own, fused, opened.config
        return load_s

    def run(self, workload: Workload) -> Outcome:
        assert self._fused is not None
        return self._fused.run(workload)

    def close(self) -> None:
        own, self._own, self._fused = self._own, None, None
        if own is not None:
            own.close()
            own.opened.close()

    def _open(self, base: OpenModel) -> OpenModel:
        settings = same_settings(base, base.config.max_num_seqs, base.config.num_blocks)
        if base.config.device == "cpu":
            self._check_memory()
        else:
            # What the base holds of the GPU is there by now, and not free any more.
            _ = self._bench.backend
        try:
            return OpenModel(replace(settings, quant=self._quant))
        except OutOfMemory as error:
            raise OutOfMemory(f"{self.name}: beside the base's engine, {error}{beside_text(base)}") from error

    def _check_memory(self) -> None:
        """The system would end the whole comparison where it runs out of memory."""
        numbers = sum(math.prod(shape) for shape in self._bench.opened.checkpoint.shapes().values())
        needed, free = numbers * BITS_A_WEIGHT // 8, probe_hardware().free_memory_bytes
        if needed > free:
            raise OutOfMemory(
                f"{self.name}: its weights, beside the base's, take up to {needed / 1e6:.0f} MB, "
                f"{free / 1e6:.0f} MB are free"
            )
