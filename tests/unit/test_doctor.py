"""`headrace doctor`: every probe against files and programs made for it, and the report as a whole."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from dataclasses import replace
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from math import prod
from pathlib import Path

import numpy as np
import pytest

from headrace.backends import native
from headrace.backends.native._kernels import Packer
from headrace.backends.native.weights import pack_all
from headrace.cli import doctor, doctor_report, probes
from headrace.cli.console import Style
from headrace.cli.main import main
from headrace.core.config import EngineConfig
from headrace.core.sizing import stored_bytes
from headrace.engine.hardware import NEEDS, peak_rss_bytes, probe_hardware
from headrace.engine.model import OpenModel
from headrace.testing.checkpoints import tiny_checkpoint
from headrace.weights.qtensor import SCHEMES, QTensor

CPUINFO = """processor\t: 0
model name\t: Fast CPU @ 3 GHz
flags\t\t: fpu avx2 avx512f avx512bw avx512vl avx512_vnni

processor\t: 1
model name\t: Another
"""
ON_CUDA = {"name": "native", "available": True, "found": {"device": "cuda"}}
MEMINFO = "MemTotal:  2000 kB\nMemAvailable:  1500 kB\nSwapTotal:  10 kB\nSwapFree:  4 kB\nHugePages_Total:  0\n"


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes.platform, "machine", lambda: "x86_64")
    governor = "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"
    nodes = {f"sys/devices/system/node/node{i}/cpulist": "0" for i in (0, 1)}
    found = probes.cpu(tree(tmp_path, {"proc/cpuinfo": CPUINFO, governor: "powersave\n", **nodes}))
    assert found["model"] == "Fast CPU @ 3 GHz" and found["governor"] == "powersave" and found["numa_nodes"] == 2
    assert found["instructions"] == {
        "avx2": True, "avx512": True, "vnni": True, "avx_vnni": False, "bf16": False, "amx": False,
    }  # fmt: skip


def test_nothing_there_is_unknown(tmp_path: Path) -> None:
    found = probes.cpu(tmp_path)
    assert found["instructions"] == {} and found["quota_cores"] is None and found["governor"] is None
    assert set(probes.memory(tmp_path).values()) == {None}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000",
          "sys/fs/cgroup/a/cpu.max": "50000 100000"}, 0.5),
        ({"proc/self/cgroup": "2:cpu,cpuacct:/c\n", "sys/fs/cgroup/cpu/c/cpu.cfs_quota_us": "200000",
          "sys/fs/cgroup/cpu/c/cpu.cfs_period_us": "100000"}, 2.0),
        ({"proc/self/cgroup": "2:cpu:/c\n", "sys/fs/cgroup/cpu/c/cpu.cfs_quota_us": "-1",
          "sys/fs/cgroup/cpu/c/cpu.cfs_period_us": "100000"}, None),
        ({"proc/self/cgroup": "0::/../../etc\n", "sys/fs/cgroup/cpu.max": "odd\x1b text"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000 0"}, None),
    ],
)  # fmt: skip
def test_cpu_quota(tmp_path: Path, files: dict[str, str], expected: float | None) -> None:
    assert probes.cpu_quota(tree(tmp_path, files)) == expected


def test_memory(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "4:memory:/x\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096),
        "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "1000000",
    }
    assert probes.memory(tree(tmp_path, files)) == {
        "total_bytes": 2_048_000, "available_bytes": 1_536_000, "limit_bytes": 1_000_000,
        "swap_total_bytes": 10_240, "swap_free_bytes": 4_096,
    }  # fmt: skip


def program(path: Path, lines: str) -> str:
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("environ", "path"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b", "HOME": "/h"}, "/a"),
        ({"HF_HOME": "/b", "HOME": "/h"}, "/b/hub"),
        ({"HF_HOME": "~/b", "HOME": "/h"}, "/h/b/hub"),
        ({"XDG_CACHE_HOME": "/c", "HOME": "/h"}, "/c/huggingface/hub"),
        ({"HOME": "/h"}, "/h/.cache/huggingface/hub"),
    ],
)
def test_where_the_hub_cache_is(environ: dict[str, str], path: str) -> None:
    found = probes.hub_cache(environ)
    assert found["path"] == path and found["present"] is False and found["disk_free_bytes"] is not None


def test_hub_cache_counts_each_blob_once(tmp_path: Path) -> None:
    blob = tree(tmp_path, {"models--a--b/blobs/1": "x" * 5000}) / "models--a--b"
    (blob / "snapshots").mkdir()
    (blob / "snapshots" / "model.safetensors").symlink_to("../blobs/1")
    found = probes.hub_cache({"HF_HUB_CACHE": str(tmp_path)})
    assert found["models"] == 1 and found["counted_whole"] and 5000 <= int(str(found["bytes"])) < 5100


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    model = tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model")
    return doctor.examine(str(model), {"HF_TOKEN": "hf_secret", "OMP_NUM_THREADS": "many\x1b", "HOME": "/nowhere"})


def test_report_has_the_documented_keys(found: dict[str, object]) -> None:
    assert list(found) == list(doctor.KEYS)
    text = json.dumps(found, allow_nan=False)
    assert "hf_secret" not in text and found["environment"]["HF_TOKEN"] == "set"  # type: ignore[index]
    for key in ("cpu", "memory", "demo_model", "hub_cache"):
        section = found[key]
        assert isinstance(section, dict) and all(name in doctor.KEYS[key] for name in section)
    model = found["model"]
    assert isinstance(model, dict) and all(name in doctor.KEYS["model"] for name in model)
    assert (
        model["layers"] == 2
        and model["fits"]
        and not model["tokenizer"]
        and model["parameters"] == 48 * 97 * 2 + 2 * (48 * 48 * 2 + 48 * 16 * 2 + 3 * 48 * 80 + 2 * 48) + 48
    )
    assert any("OMP_NUM_THREADS" in line for line in found["warnings"])  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [80, 110])
def test_report_for_people(found: dict[str, object], width: int) -> None:
    plain = doctor_report.render(found, Style(colour=False), width)
    assert "\x1b" not in plain and "hf_secret" not in plain
    lines = [line for line in plain.splitlines() if not line.startswith("Model ")]
    assert max(map(len, lines)) <= width
    assert "HF_TOKEN=set" in plain and "Worth a look" in plain
    coloured = doctor_report.render(found, Style(colour=True), width)
    assert "\x1b[32myes\x1b[0m: device cpu" in coloured
    bare = coloured.replace("\x1b[0m", "")
    for code in ("1", "31", "32", "35"):
        bare = bare.replace(f"\x1b[{code}m", "")
    assert bare == plain, "colours take no room"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"usable": False}, "No backend can run"),
        ({"backends": [{"name": "native", "available": False, "found": {}}]}, "several times slower: install a C++20"),
        ({"cpu": {"cores_usable": 4, "quota_cores": 1.5}}, "the default is --threads 1"),
        ({"cpu": {"load_1min": 900.0}}, "Other programs"),
        ({"cpu": {"governor": "powersave"}}, "powersave"),
        ({"cpu": {"instructions": {"avx2": False}}}, "no AVX2"),
        ({"memory": {"available_bytes": 5000}}, "Only 5 KiB of memory"),
        ({"gpus": [{"name": "H200"}], "gpu_note": "torch is not installed"}, "on the CPU: torch is not installed."),
        ({"gpus": [{"name": "A"}, {"name": "B"}], "backends": [ON_CUDA]}, "CUDA_DEVICE_ORDER=PCI_BUS_ID"),
        ({"card": {"error": "no kernel image"}}, "could not be measured: no kernel image"),
        ({"hub_cache": {"disk_free_bytes": 3 * 2**30}}, "3.0 GiB are free"),
        ({"model": {"fits": False, "needed_bytes": 2**34, "free_bytes": 2**30}}, "does not fit"),
    ],
)
def test_warnings(found: dict[str, object], change: dict[str, object], words: str) -> None:
    calm = {"governor": None, "quota_cores": None, "load_1min": 0.1, "instructions": {}, "cores_usable": 2}
    quiet = {**found, "cpu": calm, "memory": {"available_bytes": 2**34}, "hub_cache": {"disk_free_bytes": 2**40}}
    quiet |= {"environment": dict.fromkeys(doctor.SHOWN), "gpus": [], "card": {"error": None}}
    assert doctor.warnings_of(quiet) == []
    for key, value in change.items():
        quiet[key] = {**quiet[key], **value} if isinstance(value, dict) else value  # type: ignore[dict-item]
    (said,) = doctor.warnings_of(quiet)
    assert words in said


def test_model_that_cannot_be_opened_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{")
    assert main(["doctor", str(tmp_path / "bad"), "--json"]) == 1
    out, err = capsys.readouterr()
    model = json.loads(out)["model"]
    assert list(model) == ["error"] and model["error"]["code"] == "bad_checkpoint" and err == ""
    assert main(["doctor", str(tmp_path / "bad")]) == 1
    assert "not valid JSON" in capsys.readouterr().out


def test_broken_library_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "headrace.backends.torch.backend", None)
    found = doctor.examine_backend("torch")
    assert not found["available"] and found["why"]


def test_kernels_that_were_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "headrace.engine.model.find_spec", lambda name: None if name == NEEDS["native"] else find_spec(name)
    )
    one = doctor.examine_backend("native")
    assert not one["available"] and "were not built: install a C++20 compiler" in one["why"]
    found = {"backends": [one], "compiler": None, "auto": None}
    rows = {row.label: row.text for row in doctor_report.backend_rows(found)}
    assert rows["native"].startswith("no: ") and rows["compiler"] == "no C++ compiler is on the PATH"
    assert rows["auto"] == "none of them"
    assert doctor_report.backend_rows(found | {"compiler": "/usr/bin/c++"})[1].text == "/usr/bin/c++"


def test_kernels_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"_kernels{EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")
    monkeypatch.setattr(native, "__path__", [str(tmp_path), *native.__path__])
    for name in ("backend", "program", "weights", "_kernels"):
        monkeypatch.delitem(sys.modules, f"{native.__name__}.{name}", raising=False)
        monkeypatch.delattr(native, name, raising=False)
    found = doctor.examine_backend("native")
    assert not found["available"] and "its kernels cannot be loaded" in found["why"] and "C++20" in found["why"]


def test_the_native_backend_tells_its_kernels() -> None:
    found = doctor.examine_backend("native")
    assert found["available"], found["why"]
    usable, built = found["found"]["available"], found["found"]["built"]
    assert usable and set(usable) <= set(built) and found["found"]["instructions"] == usable[-1]
    assert doctor_report.backend_row(found).text.startswith(f"yes: {usable[-1]} kernels")
    older = {**found, "found": {"instructions": "portable", "available": ["portable"], "built": ["portable", "avx2"]}}
    assert doctor_report.backend_row(older).text.endswith("(it lacks what avx2 needs)")


def test_compiler(tmp_path: Path) -> None:
    assert probes.compiler({"PATH": str(tmp_path)}) is None
    path = program(tmp_path / "clang++", "exit 0")
    assert probes.compiler({"PATH": str(tmp_path)}) == path
    assert probes.compiler({"PATH": str(tmp_path), "CXX": "/nowhere/c++ -m64"}) is None
    assert probes.compiler({"PATH": "", "CXX": path}) == path


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_bytes_of_stored_weights_are_those_of_the_backend(scheme: str) -> None:
    kind = SCHEMES[scheme]
    shape = (32, 512)
    raw = np.zeros(shape[0] * shape[1] // kind.group * kind.group_bytes, np.uint8)
    packed = pack_all([("w", QTensor.from_bytes(scheme, shape, raw))], Packer(1), "stored", "float32")
    assert packed.nbytes == stored_bytes({scheme: shape[0] * shape[1]})


def test_bytes_of_loaded_weights(tmp_path: Path) -> None:
    with closing(OpenModel(EngineConfig(str(tiny_checkpoint(tmp_path / "model")), backend="native"))) as opened:
        checkpoint, config = opened.checkpoint, opened.config
        assert doctor.loaded_bytes(checkpoint, config) == checkpoint.nbytes
        numbers = sum(prod(shape) for shape in checkpoint.shapes().values())
        assert doctor.loaded_bytes(checkpoint, replace(config, quant="none", dtype="bfloat16")) == 2 * numbers


def test_sizes() -> None:
    sizes = (None, 0, 1023, 1024, 5 * 2**20, 3 * 2**29)
    assert [doctor_report.size(each) for each in sizes] == [
        "unknown",
        "0 bytes",
        "1023 bytes",
        "1 KiB",
        "5 MiB",
        "1.5 GiB",
    ]


def test_the_engine_counts_with_what_the_control_groups_allow(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/a\n",
        "sys/fs/cgroup/a/cpu.max": "150000 100000\n",
        "sys/fs/cgroup/memory.max": "1000000\n",
        "sys/fs/cgroup/memory.current": "400000\n",
    }
    found = probe_hardware(tree(tmp_path, files))
    assert (found.cores, found.free_memory_bytes) == (1, 600_000)
    free = tree(tmp_path / "free", {"proc/meminfo": MEMINFO})
    assert probe_hardware(free).free_memory_bytes == 1500 * 1024


def test_peak_memory(tmp_path: Path) -> None:
    assert peak_rss_bytes(tree(tmp_path, {"proc/self/status": "Name:\tx\nVmHWM:\t  2048 kB\n"})) == 2 * 2**20
    assert peak_rss_bytes(tmp_path / "nowhere") > 2**20
