"""What the driver's library says of the GPUs, asked of a small one that is compiled here; what torch was built for."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from headrace.cli import doctor, doctor_report, probes
from headrace.cli.console import Style
from headrace.core.config import Gpu
from headrace.engine import nvml
from headrace.engine.hardware import built_without_cuda, probe_gpu, probe_hardware, torch_version_file

GIB = 2**30
SOURCE = r"""
#include <stdlib.h>
#include <string.h>
static int mode(const char *name) { const char *set = getenv("FAKE_NVML"); return set && !strcmp(set, name); }
static int open_count = 0;
static const char *NAMES[] = {"NVIDIA H200", "NVIDIA A100-SXM4-40GB", "NVIDIA H200 MIG 1g.18gb"};
static const char *UUIDS[] = {"GPU-aaaa1111-0", "GPU-aabb2222-0", "MIG-cccc"};
static const int MAJORS[] = {9, 8, 9}, CORES[] = {16896, 6912, 2048};
static int ids[] = {0, 1, 2};
static int id(void *handle) { return *(int *)handle; }
static int say(const char *text, char *out, unsigned size) { strncpy(out, text, size); return 0; }
int nvmlInit_v2(void) { if (mode("no driver")) return 9; open_count++; return 0; }
int nvmlShutdown(void) { open_count--; return 0; }
int left_open(void) { return open_count; }
const char *nvmlErrorString(int code) { return code == 9 ? "Driver Not Loaded" : "Not Supported"; }
int nvmlSystemGetDriverVersion(char *out, unsigned size) { return say("580.159.03", out, size); }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = mode("empty") ? 0 : 2; return mode("lost") ? 15 : 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) { *handle = &ids[index]; return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
  if (strcmp(uuid, UUIDS[2])) return 6;
  *handle = &ids[2];
  return 0;
}
int nvmlDeviceGetUUID(void *handle, char *out, unsigned size) { return say(UUIDS[id(handle)], out, size); }
int nvmlDeviceGetName(void *handle, char *out, unsigned size) { return say(NAMES[id(handle)], out, size); }
int nvmlDeviceGetMemoryInfo(void *handle, unsigned long long *sizes) {
  if (mode("silent")) return 3;
  sizes[0] = (id(handle) ? 40ull : 140ull) << 30;
  sizes[1] = sizes[0] - (1ull << 30);
  sizes[2] = 1ull << 30;
  return 0;
}
int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
  *major = MAJORS[id(handle)];
  *minor = 0;
  return id(handle) == 2 ? 3 : 0;
}
int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(void *handle, void **whole) {
  if (id(handle) != 2) return 2;
  *whole = &ids[0];
  return 0;
}
#ifndef OLD_DRIVER
int nvmlDeviceGetNumGpuCores(void *handle, unsigned *cores) { *cores = CORES[id(handle)]; return 0; }
#endif
"""
CUDA_TORCH = "__version__ = '2.11.0+cu130'\ndebug = False\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n"
CPU_TORCH = "__version__ = '2.13.0+cpu'\ndebug = False\ncuda: Optional[str] = None\nrocm: Optional[str] = '6.4'\n"


def compiled(folder: Path, source: str, *flags: str) -> str:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    path = folder / "libfake-ml.so"
    command = [compiler, "-shared", "-fPIC", "-x", "c", *flags, "-o", str(path), "-"]
    subprocess.run(command, input=source, text=True, check=True, timeout=60)
    return str(path)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    return compiled(tmp_path_factory.mktemp("nvml"), SOURCE)


@pytest.fixture
def cuda_torch(tmp_path: Path) -> Path:
    path = tmp_path / "version.py"
    path.write_text(CUDA_TORCH)
    return path


def test_cards(library: str) -> None:
    cards, note = nvml.find_cards(library)
    assert note is None and cards == (
        nvml.Card("NVIDIA H200", 140 * GIB, 139 * GIB, (9, 0), 132, "580.159.03", "GPU-aaaa1111-0"),
        nvml.Card("NVIDIA A100-SXM4-40GB", 40 * GIB, 39 * GIB, (8, 0), 108, "580.159.03", "GPU-aabb2222-0"),
    )
    assert ctypes.CDLL(library).left_open() == 0


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        ("0", ["NVIDIA H200"]),
        ("1,0", ["NVIDIA A100-SXM4-40GB", "NVIDIA H200"]),
        (" 1 , 0", ["NVIDIA A100-SXM4-40GB", "NVIDIA H200"]),
        ("GPU-aab", ["NVIDIA A100-SXM4-40GB"]),
        ("GPU-aa", []),
        ("GPU-aaaa1111-0,7,1", ["NVIDIA H200"]),
        ("MIG-cccc", ["NVIDIA H200 MIG 1g.18gb"]),
        ("MIG-dddd", []),
        ("", []),
        ("-1", []),
        ("1,1", []),
        ("9" * 50, []),
        ("²", []),
        ("NoDevFiles", []),
    ],
)
def test_what_cuda_would_show(library: str, visible: str, names: list[str]) -> None:
    cards, note = nvml.find_cards(library, visible)
    assert [card.name for card in cards] == names
    assert (note is None) == bool(names) and (names or "CUDA_VISIBLE_DEVICES leaves none of 2" in str(note))
    assert ctypes.CDLL(library).left_open() == 0


def test_a_part_of_a_card_has_its_capability_and_its_own_memory(library: str) -> None:
    ((card,), _) = nvml.find_cards(library, "MIG-cccc")
    assert card.capability == (9, 0) and card.total_bytes == 40 * GIB and card.multiprocessors is None


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("no driver", "unknown: the NVIDIA driver's nvmlInit_v2 failed: Driver Not Loaded"),
        ("lost", "nvmlDeviceGetCount_v2 failed: Not Supported"),
        ("empty", "the NVIDIA driver knows of no GPU"),
    ],
)
def test_drivers_that_have_none(library: str, mode: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_NVML", mode)
    cards, note = nvml.find_cards(library)
    assert cards == () and words in str(note)
    assert ctypes.CDLL(library).left_open() == 0


def test_libraries_that_are_none(tmp_path: Path) -> None:
    assert "cannot be loaded" in str(nvml.find_cards(str(tmp_path / "nowhere.so"))[1])
    (tmp_path / "broken.so").write_bytes(b"\x7fELF")
    assert "cannot be loaded" in str(nvml.find_cards(str(tmp_path / "broken.so"))[1])
    assert "has no nvmlInit_v2" in str(nvml.find_cards(compiled(tmp_path, "int nothing;"))[1])


def test_an_old_driver_does_not_tell_the_multiprocessors(tmp_path: Path) -> None:
    cards, note = nvml.find_cards(compiled(tmp_path, SOURCE, "-DOLD_DRIVER"))
    assert note is None and [card.multiprocessors for card in cards] == [None, None]


def test_the_environment_is_the_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert nvml.visible_devices() is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert nvml.visible_devices() == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,GPU-aa")
    assert nvml.visible_devices() == "1,GPU-aa"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (CUDA_TORCH, None),
        ("cuda = '12.8'\n", None),
        (CPU_TORCH, "the installed torch 2.13.0+cpu is built without CUDA"),
        ("", "the installed torch is built without CUDA"),
    ],
)
def test_what_torch_was_built_for(tmp_path: Path, text: str, words: str | None) -> None:
    path = tmp_path / "version.py"
    path.write_text(text)
    assert built_without_cuda(path) == words


def test_the_installed_torch_is_read_as_it_says() -> None:
    torch = pytest.importorskip("torch")
    assert (built_without_cuda(torch_version_file()) is None) == (torch.version.cuda is not None)
    assert built_without_cuda(None) == "torch is not installed"


def test_the_gpu_that_torch_would_use(library: str, cuda_torch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert probe_gpu(cuda_torch, library) == (Gpu("NVIDIA H200", 140 * GIB, 139 * GIB, (9, 0), 132, 2), "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert probe_gpu(cuda_torch, library) == (Gpu("NVIDIA A100-SXM4-40GB", 40 * GIB, 39 * GIB, (8, 0), 108, 1), "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert probe_gpu(cuda_torch, library) == (None, "GPU: hidden: CUDA_VISIBLE_DEVICES leaves none of 2")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("FAKE_NVML", "silent")
    assert "does not tell the memory" in probe_gpu(cuda_torch, library)[1]


def test_a_torch_without_cuda_asks_no_driver(library: str, tmp_path: Path) -> None:
    (tmp_path / "version.py").write_text(CPU_TORCH)
    assert probe_gpu(tmp_path / "version.py", library)[0] is None
    assert probe_hardware().gpu is None or probe_hardware().no_gpu == ""


CARD = {
    "error": None, "name": "NVIDIA H200", "capability": [9, 0], "memory_bytes": 140 * GIB, "multiprocessors": 132,
    "copy_GBps": 4312.4, "read_GBps": None, "matmul_TFLOPs": {"bfloat16": 788.2, "fp8": None},
    "kernels": [{"op": "attention", "chosen": "Triton", "reason": "FlashInfer: not installed"}],
}  # fmt: skip


def test_doctor_tells_the_cards(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cards, note = probes.gpus(None, library)
    assert note is None and all(set(card) <= set(doctor.KEYS["gpus"].replace(",", "").split()) for card in cards)
    assert cards[0]["compute_capability"] == "9.0" and cards[1]["memory_free_bytes"] == 39 * GIB
    unknown = probes._card(nvml.Card("X", None, None, None, None, None))
    found = {**doctor.examine(None, {"HOME": "/nowhere"}), "gpus": [*cards, unknown], "gpu_note": None, "card": CARD}
    text = doctor_report.render(found, Style(colour=False), 200)
    assert "NVIDIA H200, 139.0 GiB free of 140.0 GiB, driver 580.159.03, compute capability 9.0" in text
    assert "X, unknown free of unknown, driver unknown, compute capability unknown" in text
    assert "copy 4,312 GB/s (read and written), read unknown GB/s" in text
    assert "bfloat16 788, fp8 unknown TFLOP/s" in text and "Triton: FlashInfer: not installed" in text
    assert max(map(len, doctor_report.render(found, Style(colour=False), 80).splitlines())) <= 80
    assert all(name in doctor.KEYS["card"] for name in CARD)
    failed = doctor_report.render(found | {"card": {"error": "no kernel image"}}, Style(colour=False), 200)
    assert "no kernel image" in failed


def test_a_card_that_cannot_be_measured_is_a_line() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        assert set(doctor.examine_card()) == {"error"}
