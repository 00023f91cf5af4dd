"""Models by their Hugging Face Hub id: `org/name`, or `org/name@revision` for a branch, a tag or a commit.

A revision is settled once: every file comes from one commit, which the folder is named after. Only files that headrace
reads are fetched, pickles and code never. The client (cache, token, endpoint, offline switch) is huggingface_hub; it is
imported when the first id is asked for.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.core.errors import ModelNotFound, shorten
from headrace.weights.files import parse_object, read_file

DEFAULT_REVISION = "main"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_INDEX = 64 * 2**20
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "merges.txt",
    "tiktoken.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    INDEX,
)
"""Beside the weights; of the tokenizers, also those that are only named when they are refused."""
WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".onnx", ".h5", ".msgpack", ".nemo")
TIMEOUT_S = 20.0

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w./+-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHARD = re.compile(r"[^/\\\0]+\.safetensors")
_SERVER_FAULT = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True, slots=True)
class HubId:
    name: str
    """org/name"""
    revision: str

    def __str__(self) -> str:
        return self.name if self.revision == DEFAULT_REVISION else f"{self.name}@{self.revision}"


def parse_hub_id(model: str) -> HubId | None:
    """`org/name` or `org/name@revision`; None for anything else."""
    name, at, revision = model.partition("@")
    if not _ID.fullmatch(name) or name.endswith(".gguf"):
        return None
    if not at:
        return HubId(name, DEFAULT_REVISION)
    return HubId(name, revision) if _REVISION.fullmatch(revision) and ".." not in revision else None


def origin(path: Path) -> str | None:
    """`org/name@commit` of a folder in the Hub's cache; None for any other folder."""
    repo, snapshots, commit = path.parent.parent.name, path.parent.name, path.name
    if snapshots != "snapshots" or not repo.startswith("models--") or not _COMMIT.fullmatch(commit):
        return None
    return f"{repo.removeprefix('models--').replace('--', '/')}@{commit}"


def fetch(hub_id: HubId, *, endpoint: str | None = None, cache_dir: Path | None = None) -> Path:
    """The folder of one commit in the local cache, with what headrace reads of it; fetches what is not there yet.

    Where the Hub cannot be reached, the commit that the cache last had for the revision, if it is there whole.
    `endpoint` and `cache_dir`: instead of the client's own settings. Raises ModelNotFound, saying what to do.
    """
    client = _Client(hub_id, endpoint, cache_dir)
    try:
        files = client.list_files()
    except _Unreachable as error:
        return client.cached(str(error))
    _require_safetensors(hub_id, files)
    folder = client.download([name for name in SMALL_FILES if name in files], hub_id.revision)
    weights = [SINGLE] if SINGLE in files else _shards(hub_id, folder)
    # The client puts a file into the folder when it is whole.
    missing = [name for name in weights if not (folder / name).is_file()]
    return client.download(missing, folder.name, bars=True) if missing else folder


class _Unreachable(Exception):
    """No answer from the Hub, or none that says something about the repository."""


class _Client:
    """huggingface_hub's calls for one id, with their errors as ours."""

    def __init__(self, hub_id: HubId, endpoint: str | None, cache_dir: Path | None) -> None:
        try:
            import huggingface_hub
            from huggingface_hub import errors
        except ImportError as error:
            raise ModelNotFound(
                f"model {hub_id}: reading from the Hub needs huggingface_hub: pip install huggingface_hub"
            ) from error
        self._hub: Any = huggingface_hub
        self._errors: Any = errors
        self._id = hub_id
        self._endpoint = endpoint
        self._cache_dir = cache_dir

    def list_files(self) -> frozenset[str]:
        """Every file of the revision. Raises ModelNotFound, _Unreachable."""
        api = self._hub.HfApi(endpoint=self._endpoint, library_name="headrace")
        info = self._guarded(
            lambda: api.model_info(self._id.name, revision=self._id.revision, timeout=TIMEOUT_S, files_metadata=False)
        )
        return frozenset(str(file.rfilename) for file in info.siblings or ())

    def download(self, names: Sequence[str], revision: str, bars: bool = False) -> Path:
        """The folder that then holds these files; `bars`: shows how far it is, on a terminal. Raises ModelNotFound."""
        made: list[Any] = []
        shown = bars and sys.stderr is not None and sys.stderr.isatty()
        try:
            return self._snapshot(names, revision, offline=False, bars=self._bars(made, shown))
        except _Unreachable as error:
            raise ModelNotFound(
                f"model {self._id}: the download broke off ({error}); run it again: the files that are whole are kept"
            ) from error
        finally:
            # The client leaves its bars to the end of the process, which would draw them over what we say.
            for bar in reversed(made):
                bar.close()

    def cached(self, reason: str) -> Path:
        """What an earlier run left. Raises ModelNotFound, with `reason` why the Hub was not asked."""
        try:
            folder = self._snapshot(["config.json"], self._id.revision, offline=True)
        except _Unreachable:
            folder = None
        if folder is not None and all((folder / name).is_file() for name in _needed(self._id, folder)):
            return folder
        raise ModelNotFound(
            f"model {self._id}: {reason}, and the cache has no whole copy of it: "
            "run once with a connection, or name a local folder"
        )

    def _snapshot(self, names: Sequence[str], revision: str, offline: bool, bars: type[Any] | None = None) -> Path:
        folder = self._guarded(
            lambda: self._hub.snapshot_download(
                self._id.name,
                revision=revision,
                endpoint=self._endpoint,
                cache_dir=self._cache_dir,
                allow_patterns=list(names),
                local_files_only=offline,
                tqdm_class=bars,
                library_name="headrace",
            )
        )
        return Path(folder)

    def _bars(self, made: list[Any], shown: bool) -> type[Any]:
        """The client's progress bar, noting each one in `made`; it leaves no line behind."""
        base: Any = self._hub.utils.tqdm

        class Bar(base):  # type: ignore[misc]
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                options = {**kwargs, "leave": False}
                super().__init__(*args, **(options if shown else {**options, "disable": True}))
                made.append(self)

        return Bar

    def _guarded(self, call: Callable[[], Any]) -> Any:
        """Raises ModelNotFound for what the Hub says of the repository, _Unreachable where it says nothing."""
        errors, shown = self._errors, f"model {self._id}"
        log_in = "log in (hf auth login) or set HF_TOKEN"
        try:
            return call()
        except errors.GatedRepoError as error:
            raise ModelNotFound(
                f"{shown}: the repository is gated: accept its terms on its page of the Hub, then {log_in}"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise ModelNotFound(
                f"{shown}: the repository has no branch, tag or commit {shorten(self._id.revision)}"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise ModelNotFound(
                f"{shown}: no local folder, and no such repository on the Hub: check the name; if it is private, "
                f"{log_in}"
            ) from error
        except errors.HFValidationError as error:
            raise ModelNotFound(f"{shown}: no local folder, and not a name that the Hub allows") from error
        except errors.OfflineModeIsEnabled as error:
            raise _Unreachable("offline mode is on (HF_HUB_OFFLINE)") from error
        except errors.LocalEntryNotFoundError as error:
            # Before the next: versions up to 1.0 of the client have it as a kind of that.
            raise _Unreachable("the Hub cannot be reached") from error
        except errors.HfHubHTTPError as error:
            status = getattr(error.response, "status_code", 0)
            if status in _SERVER_FAULT:
                raise _Unreachable(f"the Hub answers {status}") from error
            raise ModelNotFound(
                f"{shown}: the Hub refuses with status {status}: check the token, or {log_in}"
            ) from error
        except (OSError, errors.HTTPError) as error:
            number = getattr(error, "errno", None)
            if number is not None and not isinstance(error, ConnectionError | TimeoutError):
                raise ModelNotFound(f"{shown}: cannot be written to the cache: {error.strerror}") from error
            raise _Unreachable(f"the Hub cannot be reached: {type(error).__name__}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise _Unreachable("the Hub's answer cannot be understood") from error
        except RuntimeError as error:
            # What hf_xet, the transfer of large files, raises for all its faults.
            raise _Unreachable(f"the transfer failed: {shorten(str(error), 100)}") from error


def _require_safetensors(hub_id: HubId, files: Iterable[str]) -> None:
    names = sorted(files)
    if SINGLE in names or INDEX in names:
        if "config.json" in names:
            return
        raise ModelNotFound(f"model {hub_id}: the repository has no config.json")
    found = [name for name in names if name.endswith(WEIGHT_SUFFIXES)]
    shown = ", ".join(shorten(name) for name in found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    hint = "; download one of the .gguf files and name it" if any(name.endswith(".gguf") for name in found) else ""
    raise ModelNotFound(
        f"model {hub_id}: the repository has no {SINGLE} or {INDEX}; its weights: {shown or 'none'}{hint}"
    )


def _shards(hub_id: HubId, folder: Path) -> list[str]:
    homes = parse_object(read_file(folder / INDEX, MAX_INDEX), INDEX).get("weight_map")
    names = sorted({str(home) for home in homes.values()}) if isinstance(homes, dict) else []
    bad = [name for name in names if not _SHARD.fullmatch(name) or any(sign in name for sign in "*?[")]
    if bad or not names:
        raise ModelNotFound(
            f"model {hub_id}: {INDEX}: got {shorten(bad[0]) if bad else 'no files'}, allowed: file names"
        )
    return names


def _needed(hub_id: HubId, folder: Path) -> list[str]:
    """What a whole copy has. The weights are fetched last: where they are, the small files are."""
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        return ["config.json", SINGLE]
    return ["config.json", *_shards(hub_id, folder)]
