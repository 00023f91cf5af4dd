"""How fast host and GPU copy to each other, through the CUDA driver's own library: no torch.

cuInit, cuDevicePrimaryCtxRetain, cuMemHostAlloc, cuMemcpyHtoD_v2 and so on, as NVIDIA's CUDA Driver API reference has
them.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from statistics import median

from headrace.plan.probe_tools import Bench, What

LIBRARY = "libcuda.so.1"
COPY_BYTES = 256 * 2**20
PASSES = 5
DIRECTIONS: Mapping[str, str] = {"device": "cuMemcpyHtoD_v2", "host": "cuMemcpyDtoH_v2"}
"""Where to -> what copies there."""


class CudaError(Exception):
    """Why the link was not measured, in words for a user."""


class HostLink:
    """Copies between pinned memory of the host and the first GPU that CUDA shows."""

    def __init__(self, bench: Bench, library: str = LIBRARY) -> None:
        """Without a GPU there is nothing to measure: noted in `bench.skipped`."""
        self._bench = bench
        self._cuda: ctypes.CDLL | None = None
        self._retained = False
        self._device = ctypes.c_int()
        self._host, self._remote = ctypes.c_void_p(), ctypes.c_uint64()
        try:
            self._open(library)
        except CudaError as error:
            self._leave_out(f"not there: {error}")

    def _leave_out(self, note: str) -> None:
        self.close()
        self._bench.skipped += [What("host_link", {"to": to}, "bytes/s", note) for to in DIRECTIONS]

    def _open(self, library: str) -> None:
        try:
            self._cuda = ctypes.CDLL(library)
        except OSError as error:
            raise CudaError("no CUDA driver") from error
        count, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGetCount", ctypes.byref(count))
        if not count.value:
            raise CudaError("CUDA shows no GPU")
        self._call("cuDeviceGet", ctypes.byref(self._device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self._retained = True
        self._call("cuCtxSetCurrent", context)
        size = ctypes.c_size_t(COPY_BYTES)
        self._call("cuMemHostAlloc", ctypes.byref(self._host), size, 0)
        self._call("cuMemAlloc_v2", ctypes.byref(self._remote), size)

    def _call(self, name: str, *arguments: object) -> None:
        assert self._cuda is not None
        try:
            code = getattr(self._cuda, name)(*arguments)
        except AttributeError as error:
            raise CudaError(f"the driver has no {name}") from error
        if code:
            raise CudaError(f"{name} says {code}")

    def round(self) -> Iterator[tuple[What, float]]:
        if self._cuda is None:
            return
        try:
            rates = [(to, COPY_BYTES / self._seconds(to, name)) for to, name in DIRECTIONS.items()]
        except CudaError as error:
            self._leave_out(str(error))
            return
        for to, rate in rates:
            yield What("host_link", {"to": to}, "bytes/s", "links: with pinned host memory"), rate

    def _seconds(self, to: str, name: str) -> float:
        """Median of the copies but the first."""
        ends = (self._remote, self._host) if to == "device" else (self._host, self._remote)
        seconds = []
        for _ in range(1 + PASSES):
            began = time.perf_counter()
            self._call(name, *ends, ctypes.c_size_t(COPY_BYTES))
            seconds.append(time.perf_counter() - began)
        return median(seconds[1:])

    def close(self) -> None:
        with suppress(CudaError):
            if self._remote.value:
                self._call("cuMemFree_v2", self._remote)
            if self._host.value:
                self._call("cuMemFreeHost", self._host)
            if self._retained:
                self._call("cuDevicePrimaryCtxRelease_v2", self._device)
        self._remote.value, self._host.value, self._retained = 0, None, False
        self._cuda = None
