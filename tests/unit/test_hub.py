"""Hub ids, through the real client against a Hub on this machine."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from headrace.core.errors import ModelNotFound
from headrace.weights import hub as module
from headrace.weights.checkpoint import locate, open_checkpoint
from headrace.weights.hub import HubId, fetch, origin, parse_hub_id
from tests.unit.hub_server import Files, HubServer

NAME = "maker/tiny"


def safetensors(value: int, names: tuple[str, ...] = ("w",), size: int = 64) -> bytes:
    """One float32 tensor of `size` numbers a name."""
    header = {
        name: {"dtype": "F32", "shape": [size], "data_offsets": [i * size * 4, (i + 1) * size * 4]}
        for i, name in enumerate(names)
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes([value]) * (size * 4 * len(names))


def repository_files(value: int = 0) -> Files:
    return {
        "config.json": json.dumps({"model_type": "llama", "value": value}).encode(),
        "generation_config.json": b'{"top_k": 3}',
        "tokenizer.json": b'{"version": "1.0"}',
        "chat_template.jinja": b"{{ messages }}",
        "model.safetensors": safetensors(value),
        "README.md": b"# tiny",
        "pytorch_model.bin": b"a pickle",
        "training_args.bin": b"a pickle",
        "consolidated.safetensors": b"twice the size",
        "modeling_tiny.py": b"raise SystemExit",
        "onnx/model.onnx": b"onnx",
        "onnx/config.json": b"another",
        "original/model.safetensors": b"other weights",
    }


def sharded_files() -> Files:
    files = repository_files()
    del files["model.safetensors"]
    homes = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": homes}).encode()
    files |= {home: safetensors(1, (name,)) for name, home in homes.items()}
    return files


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(autouse=True)
def as_first_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Online, as the other tests are not, and without the token of who runs the tests."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN_PATH", "HF_STORED_TOKENS_PATH"):
        monkeypatch.setattr(constants, name, str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def get(hub: HubServer, tmp_path: Path, revision: str = "main", name: str = NAME) -> Path:
    return fetch(HubId(name, revision), endpoint=hub.url, cache_dir=tmp_path / "cache")


def names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        ("org/name", HubId("org/name", "main")),
        ("org/name@v1.0", HubId("org/name", "v1.0")),
        ("org/name@refs/pr/3", HubId("org/name", "refs/pr/3")),
        ("org/name@" + "a" * 40, HubId("org/name", "a" * 40)),
        ("meta-llama/Llama-3.2-1B", HubId("meta-llama/Llama-3.2-1B", "main")),
        ("org/name@", None),
        ("org/name@-x", None),
        ("org/name@a/../b", None),
        ("org/name@a b", None),
        ("org/name@a@b", None),
        ("name", None),
        ("a/b/c", None),
        ("./org/name", None),
        ("../name", None),
        ("/org/name", None),
        ("folder/file.gguf", None),
        ("org/näme", None),
        ("", None),
    ],
)
def test_ids(model: str, wanted: HubId | None) -> None:
    assert parse_hub_id(model) == wanted
    if wanted is not None:
        assert parse_hub_id(str(wanted)) == wanted


# ---------------------------------------------------------------- what is fetched


def test_only_what_is_read_is_fetched(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.repository(NAME).push(repository_files(7))
    folder = get(hub, tmp_path)
    assert folder.name == commit and origin(folder) == f"{NAME}@{commit}"
    wanted = {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"}
    assert names_in(folder) == wanted
    assert set(hub.fetched()) == wanted, "nothing else was asked for either"
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.origin == f"{NAME}@{commit}"
        assert checkpoint.tensor("w").shape == (64,)


def test_a_second_time_nothing_is_fetched(hub: HubServer, tmp_path: Path) -> None:
    hub.repository(NAME).push(repository_files())
    first = get(hub, tmp_path)
    hub.log.clear()
    assert get(hub, tmp_path) == first
    assert hub.fetched() == []


def test_shards_are_those_of_the_index(hub: HubServer, tmp_path: Path) -> None:
    hub.repository(NAME).push({**sharded_files(), "model-00009-of-00009.safetensors": b"of another index"})
    folder = get(hub, tmp_path)
    weights = {name for name in names_in(folder) if name.endswith(".safetensors")}
    assert weights == {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    with open_checkpoint(folder) as checkpoint:
        assert sorted(checkpoint.names()) == ["a", "b"]


@pytest.mark.parametrize(
    "weight_map", [{}, None, [], {"a": "../up.safetensors"}, {"a": "*.safetensors"}, {"a": "x.bin"}, {"a": 3}]
)
def test_an_index_that_names_no_shards(weight_map: object, hub: HubServer, tmp_path: Path) -> None:
    files = sharded_files() | {"model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode()}
    hub.repository(NAME).push(files)
    with pytest.raises(ModelNotFound, match=r"model\.safetensors\.index\.json: got .*, allowed: file names"):
        get(hub, tmp_path)


# ---------------------------------------------------------------- revisions


def test_a_branch_moves_and_a_commit_stays(hub: HubServer, tmp_path: Path) -> None:
    repository = hub.repository(NAME)
    old = repository.push(repository_files(1))
    first = get(hub, tmp_path)
    new = repository.push(repository_files(2))
    second, third = get(hub, tmp_path), get(hub, tmp_path, old)
    assert (first.name, second.name, third) == (old, new, first)
    values = [json.loads((folder / "config.json").read_bytes())["value"] for folder in (second, third)]
    assert values == [2, 1]
    assert (third / "model.safetensors").read_bytes() == safetensors(1)
    assert (second / "model.safetensors").read_bytes() == safetensors(2)


def test_branches_and_tags(hub: HubServer, tmp_path: Path) -> None:
    repository = hub.repository(NAME)
    repository.push(repository_files(1))
    tag = repository.push(repository_files(2), ref="v1.0")
    request = repository.push(repository_files(3), ref="refs/pr/3")
    assert get(hub, tmp_path, "v1.0").name == tag
    assert get(hub, tmp_path, "refs/pr/3").name == request


def test_all_files_come_from_one_commit(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch moves between the first file and the weights."""
    repository = hub.repository(NAME)
    old = repository.push(sharded_files())
    shards = module._shards

    def move(hub_id: HubId, folder: Path) -> list[str]:
        repository.push(repository_files(2))
        return shards(hub_id, folder)

    monkeypatch.setattr(module, "_shards", move)
    folder = get(hub, tmp_path)
    assert folder.name == old
    with open_checkpoint(folder) as checkpoint:
        assert sorted(checkpoint.names()) == ["a", "b"]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            ("config.json", "pytorch_model.bin"),
            r"no model\.safetensors or .*its weights: 'pytorch_model\.bin'$",
        ),
        (("a.Q4.gguf", "b.gguf", "c.gguf", "d.gguf"), r"'a\.Q4\.gguf', 'b\.gguf', 'c\.gguf' and 1 more; download one"),
        (("README.md",), "its weights: none"),
        (("adapter_config.json", "adapter_model.safetensors"), r"its weights: 'adapter_model\.safetensors'"),
        (("model.safetensors",), r"has no config\.json"),
        (("onnx/model.safetensors", "config.json"), r"'onnx/model\.safetensors'"),
        ((), "its weights: none"),
    ],
)
def test_repositories_without_what_is_needed(
    files: tuple[str, ...], words: str, hub: HubServer, tmp_path: Path
) -> None:
    hub.repository(NAME).push(dict.fromkeys(files, b"x"))
    with pytest.raises(ModelNotFound, match=words) as caught:
        get(hub, tmp_path)
    assert one_line(caught.value)
    assert hub.fetched() == []


def one_line(error: Exception) -> bool:
    return "\n" not in str(error) and len(str(error)) < 400 and str(error).startswith(f"model {NAME}")


def test_unknown_names_and_revisions(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(
        ModelNotFound, match="no such repository on the Hub: check the name; if it is private"
    ) as caught:
        get(hub, tmp_path)
    assert one_line(caught.value)
    hub.repository(NAME).push(repository_files())
    for revision in ("v9", "0" * 40):
        with pytest.raises(ModelNotFound, match=f"no branch, tag or commit '{revision}'") as caught:
            get(hub, tmp_path, revision)
        assert one_line(caught.value)
    with pytest.raises(ModelNotFound, match="not a name that the Hub allows"):
        get(hub, tmp_path, name="maker/a--b")


@pytest.mark.parametrize("token", [None, "wrong"])
def test_gated(token: str | None, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    hub.token = "right"
    hub.repository(NAME).push(repository_files())
    hub.repository(NAME).gated = True
    with pytest.raises(ModelNotFound, match=r"gated: accept its terms .*, then log in \(hf auth login\)") as caught:
        get(hub, tmp_path)
    assert one_line(caught.value)
    monkeypatch.setenv("HF_TOKEN", "right")
    assert (get(hub, tmp_path) / "model.safetensors").is_file()


def test_private(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "right"
    hub.repository(NAME).push(repository_files())
    hub.repository(NAME).private = True
    with pytest.raises(ModelNotFound, match="if it is private, log in"):
        get(hub, tmp_path)
    monkeypatch.setenv("HF_TOKEN", "right")
    assert (get(hub, tmp_path) / "model.safetensors").is_file()


def test_forbidden(hub: HubServer, tmp_path: Path) -> None:
    hub.repository(NAME).push(repository_files())
    hub.status = 403
    with pytest.raises(ModelNotFound, match="refuses with status 403") as caught:
        get(hub, tmp_path)
    assert one_line(caught.value)


# ---------------------------------------------------------------- no network


@pytest.mark.parametrize("fault", ["status", "body", "gone"])
def test_a_hub_that_does_not_answer(fault: str, tmp_path: Path) -> None:
    with HubServer() as hub:
        commit = hub.repository(NAME).push(repository_files())
        first = get(hub, tmp_path)
        hub.status = 504 if fault == "status" else None
        hub.body = b"<html>Log in to this network</html>" if fault == "body" else None
        if fault != "gone":
            assert get(hub, tmp_path) == first
            with pytest.raises(ModelNotFound, match="the cache has no whole copy of it: run once with a connection"):
                get(hub, tmp_path, "v2")
    if fault == "gone":
        for revision in ("main", commit):
            assert get(hub, tmp_path, revision) == first
        with pytest.raises(ModelNotFound, match=r"the Hub cannot be reached.*no whole copy") as caught:
            get(hub, tmp_path, name="maker/other")
        assert "\n" not in str(caught.value)


def test_half_a_copy_is_not_run(hub: HubServer, tmp_path: Path) -> None:
    hub.repository(NAME).push(sharded_files())
    folder = get(hub, tmp_path)
    hub.status = 503
    assert get(hub, tmp_path) == folder
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelNotFound, match="no whole copy"):
        get(hub, tmp_path)
    hub.status = None
    assert (get(hub, tmp_path) / "model-00002-of-00002.safetensors").is_file()


def test_a_broken_connection_is_taken_up_again(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    weights = safetensors(5, size=6 * 2**20)
    hub.repository(NAME).push(repository_files() | {"model.safetensors": weights})
    hub.cut = {"model.safetensors": 12 * 2**20}  # the client keeps what it has in pieces of 10 MiB
    folder = get(hub, tmp_path)
    assert (folder / "model.safetensors").read_bytes() == weights
    ranges = [asked for method, path, asked in hub.log if method == "GET" and path.endswith("/model.safetensors")]
    assert ranges == [None, f"bytes={10 * 2**20}-", f"bytes={20 * 2**20}-"]


def test_a_download_that_broke_off_is_finished_later(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    files = sharded_files()
    hub.repository(NAME).push(files)
    hub.cut = {"model-00002-of-00002.safetensors": 100}
    with pytest.raises(ModelNotFound, match=r"the download broke off .*run it again") as caught:
        get(hub, tmp_path)
    assert one_line(caught.value)
    hub.status = 503
    with pytest.raises(ModelNotFound, match="no whole copy"):
        get(hub, tmp_path)
    hub.cut, hub.status = {}, None
    hub.log.clear()
    folder = get(hub, tmp_path)
    assert hub.fetched() == ["model-00002-of-00002.safetensors"]
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        assert (folder / name).read_bytes() == files[name]


# ---------------------------------------------------------------- as a user meets it

SCRIPT = """
import sys
from headrace.core.errors import HeadraceError
from headrace.weights.checkpoint import locate, open_checkpoint
assert "huggingface_hub" not in sys.modules
try:
    print(open_checkpoint(locate(sys.argv[1])).origin)
except HeadraceError as error:
    print("refused:", error)
"""


def run(hub: HubServer | None, tmp_path: Path, model: str, limit: int | None = None, **variables: str) -> str:
    """Another process, set up by the environment alone; what it printed. Standard error must stay empty."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path / "home"), **({"HF_ENDPOINT": hub.url} if hub else {}), **variables}
    command = [sys.executable, "-c", SCRIPT, model]
    if limit is not None:
        # A file of more than `limit` KiB cannot be written: what a full disk is to the program.
        command = ["sh", "-c", f'trap "" XFSZ; ulimit -f {limit * 2}; exec "$0" "$@"', *command]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


def test_from_the_environment(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.repository(NAME).push(repository_files())
    assert run(hub, tmp_path, NAME) == f"{NAME}@{commit}"
    newer = hub.repository(NAME).push(repository_files(1))
    hub.log.clear()
    assert run(hub, tmp_path, NAME, HF_HUB_OFFLINE="1") == f"{NAME}@{commit}", "what was there last"
    assert run(hub, tmp_path, f"{NAME}@{commit}", HF_HUB_OFFLINE="1") == f"{NAME}@{commit}"
    wanted = (
        f"refused: model {NAME}@{newer}: offline mode is on (HF_HUB_OFFLINE), and the cache has no whole copy of it"
    )
    assert run(hub, tmp_path, f"{NAME}@{newer}", HF_HUB_OFFLINE="1").startswith(wanted)
    assert hub.log == []


def on_terminal(hub: HubServer, tmp_path: Path) -> str:
    """What the same process writes to a terminal of 100 columns."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url}
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, NAME], env=environment, stdout=theirs, stderr=theirs)
    os.close(theirs)
    written = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while part := os.read(ours, 4096):
            written += part
    os.close(ours)
    assert process.wait(60) == 0
    return written.decode()


def test_bars_on_a_terminal_leave_nothing_behind(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.repository(NAME).push(repository_files() | {"model.safetensors": safetensors(1, size=2**20)})
    line = f"{NAME}@{commit}\r\n"
    first = on_terminal(hub, tmp_path)
    assert "4.19MB" in first and first.endswith("\r" + line)
    before = first.removesuffix("\r" + line)
    assert before.endswith(" " * 20), "the last bar was wiped"
    assert before.count("\n") == before.count("\x1b[A"), "the cursor is back where it was"
    assert on_terminal(hub, tmp_path) == line, "nothing to fetch, nothing to show"


def test_a_disk_that_is_full(hub: HubServer, tmp_path: Path) -> None:
    hub.repository(NAME).push(repository_files() | {"model.safetensors": safetensors(1, size=2**20)})
    line = run(hub, tmp_path, NAME, limit=512)
    assert line.startswith(f"refused: model {NAME}: cannot be written to the cache: File too large")


def test_a_cache_that_cannot_be_written(hub: HubServer, tmp_path: Path) -> None:
    hub.repository(NAME).push(repository_files())
    (tmp_path / "file").write_text("not a folder")
    line = run(hub, tmp_path, NAME, HF_HOME=str(tmp_path / "file" / "home"))
    assert line == f"refused: model {NAME}: cannot be written to the cache: Not a directory"


def test_a_local_folder_wins(hub: HubServer, tmp_path: Path) -> None:
    hub.repository(NAME).push(repository_files())
    folder = tmp_path / NAME
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes(repository_files()[name])
    assert run(hub, tmp_path, NAME) == NAME
    assert hub.log == []
    assert open_checkpoint(locate(str(folder))).origin == str(folder)


def test_without_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelNotFound, match="pip install huggingface_hub"):
        fetch(HubId(NAME, "main"))
