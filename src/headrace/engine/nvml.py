"""The NVIDIA GPUs of this machine, as the driver's own library tells of them: no torch, no CUDA context.

NVML is called through ctypes: nvmlInit_v2, nvmlDeviceGetMemoryInfo and so on, as NVIDIA's NVML API reference has them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

LIBRARY = "libnvidia-ml.so.1"
VISIBLE = "CUDA_VISIBLE_DEVICES"
NAME_BYTES = 96
CORES: Mapping[tuple[int, int], int] = {(7, 0): 64, (7, 2): 64, (7, 5): 64, (8, 0): 64}
"""Compute capability -> CUDA cores of a multiprocessor; 128 from 8.6 on (CUDA C++ Programming Guide)."""


@dataclass(frozen=True, slots=True)
class Card:
    """One GPU. Unknown is None."""

    name: str
    total_bytes: int | None
    free_bytes: int | None
    capability: tuple[int, int] | None
    multiprocessors: int | None
    driver: str | None
    uuid: str | None = None


class NvmlError(Exception):
    """Why the GPUs are not known, in words for a user."""


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def find_cards(library: str = LIBRARY, visible: str | None = None) -> tuple[tuple[Card, ...], str | None]:
    """(the GPUs that CUDA would show this process, in NVML's order, which is that of the PCI bus; why there are none).

    `visible`: the value of CUDA_VISIBLE_DEVICES; None: it is not set. Raises nothing.
    """
    try:
        with _opened(library) as nvml:
            driver = nvml.text("nvmlSystemGetDriverVersion")
            handles = nvml.handles()
            if not handles:
                return (), "none found: the NVIDIA driver knows of no GPU"
            shown = _shown(nvml, handles, visible)
            if not shown:
                return (), f"hidden: {VISIBLE} leaves none of {len(handles)}"
            return tuple(nvml.card(handle, driver) for handle in shown), None
    except NvmlError as error:
        return (), str(error)


def visible_devices() -> str | None:
    """CUDA_VISIBLE_DEVICES as the CUDA driver will read it: from the C library's environment."""
    with suppress(OSError, AttributeError):
        read = ctypes.CDLL(None).getenv
        read.restype = ctypes.c_char_p
        value: bytes | None = read(VISIBLE.encode())
        return None if value is None else value.decode(errors="replace")
    return None


def _shown(nvml: _Nvml, handles: Sequence[ctypes.c_void_p], visible: str | None) -> list[ctypes.c_void_p]:
    """What CUDA shows: indices, or UUIDs that may be cut short; the first entry that names no GPU ends the list, and
    one that comes twice empties it (CUDA C++ Programming Guide, CUDA environment variables)."""
    if visible is None:
        return list(handles)
    found: dict[int | str, ctypes.c_void_p] = {}
    for entry in visible.split(","):
        one = nvml.named(entry.strip(), handles)
        if one is None:
            break
        key, handle = one
        if key in found:
            return []
        found[key] = handle
    return list(found.values())


@contextmanager
def _opened(library: str) -> Iterator[_Nvml]:
    try:
        loaded = ctypes.CDLL(library)
    except OSError as error:
        raise NvmlError(f"none found: no NVIDIA driver ({library} cannot be loaded)") from error
    nvml = _Nvml(loaded)
    nvml.call("nvmlInit_v2")
    try:
        yield nvml
    finally:
        with suppress(NvmlError):
            nvml.call("nvmlShutdown")


class _Nvml:
    """The library, between nvmlInit_v2 and nvmlShutdown."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def call(self, name: str, *arguments: object) -> None:
        """Raises NvmlError where the function is missing or fails."""
        try:
            function = getattr(self._library, name)
        except AttributeError as error:
            raise NvmlError(f"unknown: the NVIDIA driver's library has no {name}") from error
        function.restype = ctypes.c_int
        status = function(*arguments)
        if status:
            raise NvmlError(f"unknown: the NVIDIA driver's {name} failed: {self._words(status)}")

    def _words(self, status: int) -> str:
        """What NVML says of an error number, else the number."""
        try:
            function = self._library.nvmlErrorString
        except AttributeError:
            return f"error {status}"
        function.restype = ctypes.c_char_p
        words: bytes | None = function(status)
        return words.decode(errors="replace") if words else f"error {status}"

    def text(self, name: str, *arguments: object) -> str | None:
        """What a function writes as a string."""
        buffer = ctypes.create_string_buffer(NAME_BYTES)
        with suppress(NvmlError):
            self.call(name, *arguments, buffer, ctypes.c_uint(NAME_BYTES))
            return buffer.value.decode(errors="replace")
        return None

    def number(self, name: str, *arguments: object) -> int | None:
        """What a function writes as one unsigned number."""
        found = ctypes.c_uint()
        with suppress(NvmlError):
            self.call(name, *arguments, ctypes.byref(found))
            return found.value
        return None

    def handles(self) -> list[ctypes.c_void_p]:
        """Of all GPUs. Raises NvmlError."""
        count = ctypes.c_uint()
        self.call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        found = []
        for index in range(count.value):
            handle = ctypes.c_void_p()
            self.call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
            found.append(handle)
        return found

    def named(self, entry: str, handles: Sequence[ctypes.c_void_p]) -> tuple[int | str, ctypes.c_void_p] | None:
        """(index or UUID, handle) of an entry of CUDA_VISIBLE_DEVICES; None where it names no GPU."""
        if entry.isascii() and entry.isdecimal():
            index = int(entry[:9])
            return (index, handles[index]) if index < len(handles) else None
        if entry.startswith("MIG-"):
            handle = ctypes.c_void_p()
            with suppress(NvmlError):
                self.call("nvmlDeviceGetHandleByUUID", ctypes.c_char_p(entry.encode()), ctypes.byref(handle))
                return entry, handle
            return None
        if not entry.startswith("GPU-"):
            return None
        uuids = [self.text("nvmlDeviceGetUUID", handle) or "" for handle in handles]
        fitting = [index for index, uuid in enumerate(uuids) if uuid.startswith(entry)]
        return (fitting[0], handles[fitting[0]]) if len(fitting) == 1 else None

    def card(self, handle: ctypes.c_void_p, driver: str | None) -> Card:
        memory = _Memory()
        sizes: tuple[int | None, int | None] = (None, None)
        with suppress(NvmlError):
            self.call("nvmlDeviceGetMemoryInfo", handle, ctypes.byref(memory))
            sizes = (memory.total, memory.free)
        whole = self._whole(handle)
        capability = self._capability(handle) or self._capability(whole)
        cores = self.number("nvmlDeviceGetNumGpuCores", handle)
        multiprocessors = None
        if cores and capability and whole is handle:
            multiprocessors = cores // CORES.get(capability, 128)
        return Card(
            self.text("nvmlDeviceGetName", handle) or "an NVIDIA GPU",
            *sizes,
            capability,
            multiprocessors,
            driver,
            self.text("nvmlDeviceGetUUID", whole),
        )

    def _whole(self, handle: ctypes.c_void_p) -> ctypes.c_void_p:
        """The GPU that a MIG instance is a part of; any other handle is its own."""
        whole = ctypes.c_void_p()
        with suppress(NvmlError):
            self.call("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", handle, ctypes.byref(whole))
            return whole
        return handle

    def _capability(self, handle: ctypes.c_void_p) -> tuple[int, int] | None:
        major, minor = ctypes.c_int(), ctypes.c_int()
        with suppress(NvmlError):
            self.call("nvmlDeviceGetCudaComputeCapability", handle, ctypes.byref(major), ctypes.byref(minor))
            return major.value, minor.value
        return None
