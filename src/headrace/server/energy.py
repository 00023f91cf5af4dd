"""Joules of each request: its share of what the meters of the machine say (`engine.energy`).

Attribution: each second's energy goes to the requests that got tokens in it, in proportion to their tokens. What passes
while requests are computed that have no token yet waits for the first of them; what passes while there are none
belongs to no request. So the requests' sum is the machine's energy of the time in which there were any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import monotonic

from headrace.core.metrics import Histogram, HistogramState
from headrace.engine.energy import JOULES_PER_KWH, Meter
from headrace.server.metric_names import REQUEST_JOULES

SAMPLE_S = 1.0
"""How often `Energy.sample` should be called."""


class Share:
    """What one request has had of the machine."""

    __slots__ = ("done", "joules", "prompt_tokens", "tokens")

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        """They count with the first token."""
        self.tokens = 0
        """Since the last sample."""
        self.joules = 0.0
        self.done = False


class Energy:
    """Adds up the meters and gives each request its share; `sample` is called once in SAMPLE_S seconds."""

    def __init__(
        self, meters: Sequence[Meter], price_per_kwh: float = 0.0, clock: Callable[[], float] = monotonic
    ) -> None:
        """`price_per_kwh`: in any currency; 0: no costs are shown."""
        self._meters = tuple(meters)
        self._clock = clock
        self._totals = {meter.source: 0.0 for meter in meters}
        self._shares: set[Share] = set()
        self._unshared = 0.0
        self._requests = Histogram(REQUEST_JOULES)
        self.price_per_kwh = price_per_kwh
        self.source = "+".join(self._totals)
        """Of the requests' figures, as a label: estimated, rapl, nvml+rapl, nvml+estimated."""
        for meter in self._meters:
            meter.joules(clock())

    def begin(self, prompt_tokens: int) -> Share:
        """A request starts; `end` must follow."""
        share = Share(prompt_tokens)
        self._shares.add(share)
        return share

    def end(self, share: Share) -> None:
        """It is over. Its figure is complete with the next sample."""
        share.done = True

    def sample(self) -> None:
        """Reads the meters and shares out what passed since the last sample."""
        now = self._clock()
        passed = 0.0
        for meter in self._meters:
            joules = meter.joules(now)
            self._totals[meter.source] += joules
            passed += joules
        tokens = sum(share.tokens for share in self._shares)
        self._unshared = self._unshared + passed if self._shares else 0.0
        if tokens:
            for share in self._shares:
                share.joules += self._unshared * share.tokens / tokens
                share.tokens = 0
            self._unshared = 0.0
        for share in [share for share in self._shares if share.done]:
            self._shares.remove(share)
            if share.joules:  # one that got no token, or while no meter moved, is not measured, and not free
                self._requests.observe(share.joules)
        if not self._shares:
            self._unshared = 0.0

    @property
    def totals(self) -> Mapping[str, float]:
        """Joules by source."""
        return self._totals

    @property
    def requests(self) -> HistogramState:
        """Joules of the requests that ended."""
        return self._requests.state()

    @property
    def cost(self) -> float:
        """Of these requests' energy."""
        return self._requests.sum / JOULES_PER_KWH * self.price_per_kwh
