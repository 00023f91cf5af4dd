"""What can be reached, and by whom: listening sockets, keys on every route, the comparison of keys, code that would run
what it reads, and the engine's ear for frames that are none.

    python -m tests.robustness.surface [--short]
"""

from __future__ import annotations

import ast
import hashlib
import pickle
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import headrace
from headrace.core.errors import EngineError, Unauthorized
from headrace.engine.ipc import FromEngine, Reader, ToEngine
from headrace.server.config import ServeConfig
from headrace.server.limits import Guard
from tests.robustness.attack_client import Connection, Unanswered, note_first, request
from tests.robustness.fuzz_cases import NOWHERE, Route, routes_of
from tests.robustness.http_load import descendants
from tests.robustness.score import Score, Target, finish, options, own_server

KEY = "sk-a3f1-0123456789abcdefghijklmnopqrstuvwxyz"
FLAGS = ("--threads", "1", "--api-key", KEY, "--kv-cache-mib", "64")
SAMPLES, SHORT_SAMPLES = 100_000, 10_000
FRAMES, SHORT_FRAMES = 1000, 300
MOST_T = 4.5
"""Welch's t above which two series of times count as different (the usual bound of leakage tests)."""
CROPPED = 0.9
"""Share of the samples that is kept: the slowest tell of the machine, not of the comparison."""
OPEN = frozenset({"/health/live", "/health/ready"})
LISTEN = "0A"


# ---------------------------------------------------------------- sockets


@dataclass(frozen=True)
class Socket:
    kind: str
    local: str
    state: str
    inode: str


def sockets(pid: int) -> list[Socket]:
    """Internet sockets of a process and all below it, and its Unix sockets that listen (Linux)."""
    own = {inode for one in (pid, *descendants(pid)) for inode in _inodes(one)}
    found = []
    for kind in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6"):
        table = Path(f"/proc/{pid}/net/{kind}")
        for line in table.read_text().splitlines()[1:] if table.exists() else ():
            fields = line.split()
            if fields[9] in own:
                found.append(Socket(kind, fields[1], fields[3], fields[9]))
    for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        accepts = int(fields[3], 16) & 0x10000
        if fields[6] in own and accepts:
            found.append(Socket("unix", " ".join(fields[7:]), LISTEN, fields[6]))
    return found


def _inodes(pid: int) -> Iterator[str]:
    try:
        for one in Path(f"/proc/{pid}/fd").iterdir():
            name = str(one.readlink())
            if name.startswith("socket:["):
                yield name[8:-1]
    except OSError:
        return


def judge_sockets(score: Score, target: Target, when: str) -> None:
    """One listener, of this machine only, and nothing that goes out or takes datagrams."""
    assert target.pid is not None
    found = sockets(target.pid)
    listeners = [one for one in found if one.state == LISTEN and one.kind in ("tcp", "tcp6", "unix")]
    port = f"{target.address[1]:04X}"
    loopback = [one for one in listeners if one.kind == "tcp" and one.local == f"0100007F:{port}"]
    others = [one for one in found if one.local.rpartition(":")[2] != port and one.kind != "unix"]
    score.check(f"listening sockets {when}", len(listeners), "1, loopback", len(listeners) == len(loopback) == 1)
    score.zero(f"other Internet sockets {when}", len(others))
    note_first(score, "socket", [str(one) for one in (*listeners, *others) if one not in loopback])


# ---------------------------------------------------------------- keys


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


BEARER = "Bearer "
HEADER_TRICKS: Mapping[str, Mapping[str, str]] = {
    "no key": {},
    "empty header": {"Authorization": ""},
    "scheme alone": {"Authorization": "Bearer"},
    "empty key": {"Authorization": BEARER},
    "wrong key": {"Authorization": BEARER + "wrong"},
    "beginning of the key": {"Authorization": BEARER + KEY[:-1]},
    "key and more": {"Authorization": BEARER + KEY + "x"},
    "key in capitals": {"Authorization": BEARER + KEY.upper()},
    "key twice": {"Authorization": BEARER + f"{KEY}, Bearer {KEY}"},
    "digest of the key": {"Authorization": BEARER + _digest(KEY)},
    "key without a scheme": {"Authorization": KEY},
    "Basic": {"Authorization": "Basic " + KEY},
    "Token": {"Authorization": "Token " + KEY},
    "bytes": {"Authorization": BEARER + "\xff\xfe\xe9"},
    "long key": {"Authorization": BEARER + "x" * 10_000},
    "None": {"Authorization": BEARER + "None"},
    "x-api-key": {"X-API-Key": KEY},
    "api-key": {"Api-Key": KEY},
    "cookie": {"Cookie": f"Authorization=Bearer {KEY}; api_key={KEY}"},
    "proxy": {"Proxy-Authorization": BEARER + KEY},
    "from this machine": {"X-Forwarded-For": "127.0.0.1", "X-Real-IP": "127.0.0.1", "Forwarded": "for=127.0.0.1"},
    "original path": {
        "X-Original-URL": "/health/live",
        "X-Rewrite-URL": "/health/live",
        "X-Forwarded-Prefix": "/page/",
    },
    "Host with a path": {"Host": "127.0.0.1/health/live?x="},
    "Host of the page": {"Host": "a/page/x?"},
    "Accept": {"Accept": "text/html"},
    "other method": {"X-HTTP-Method-Override": "GET", "X-Original-Method": "GET"},
    "preflight": {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"},
}
"""Headers that must not let anybody in."""
PATH_TRICKS: Mapping[str, Callable[[str], str]] = {
    "key in the query": lambda path: f"{path}?api_key={KEY}&key={KEY}&authorization=Bearer%20{KEY}",
    "open path in the query": lambda path: f"{path}?/health/live",
    "open path in parameters": lambda path: f"{path};/health/live",
    "up from an open path": lambda path: f"/health/live/../..{path}",
    "up from the page": lambda path: f"/page/..{path}",
    "up, encoded": lambda path: f"/page/%2e%2e{path}",
    "up, slashes encoded": lambda path: "/page/..%2f" + path[1:],
    "up, encoded twice": lambda path: f"/page/%252e%252e{path}",
    "up, backslashes": lambda path: "/page/..%5c" + path[1:],
    "one dot": lambda path: f"/.{path}",
    "slash at the end": lambda path: path + "/",
    "two slashes": lambda path: "/" + path,
    "NUL": lambda path: f"{path}%00/health/live",
    "encoded": lambda path: "/" + "".join(f"%{ord(char):02x}" if char.isalnum() else char for char in path[1:]),
    "capitals": lambda path: path.upper(),
    "fragment": lambda path: f"{path}#/health/live",
    "absolute": lambda path: f"http://127.0.0.1/health/live/..{path}",
    "line end": lambda path: f"{path}%0d%0aAuthorization:%20Bearer%20{KEY}",
}


@dataclass(frozen=True)
class Trick:
    what: str
    data: bytes
    bends: bool
    """Changes what the path is: then HTTP itself may be refused."""


def is_open(method: str, path: str, headers: Mapping[str, str]) -> bool:
    """What answers without a key: live, ready, and the page's own files."""
    from headrace.server.page_routes import OPEN_PATHS

    if method not in ("GET", "HEAD"):
        return False
    return path in OPEN or path in OPEN_PATHS or (path == "/" and headers.get("Accept") == "text/html")


def tricks(routes: Sequence[Route]) -> Iterator[Trick]:
    """Every route × every way in that is none."""
    for route in routes:
        path = route.path.replace("{model}", "demo")
        body = dict(route.good) if route.good else None
        for name, headers in HEADER_TRICKS.items():
            if not is_open(route.method, path, headers):
                yield Trick(f"{name}: {route.method} {path}", request(route.method, path, body, headers), False)
        for name, bend in PATH_TRICKS.items():
            if not is_open(route.method, unquote(bend(path).partition("?")[0]), {}):
                yield Trick(f"{name}: {route.method} {path}", request(route.method, bend(path), body), True)
        for method in ("HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"):
            if not is_open(method, path, {}) and method != route.method:
                yield Trick(f"{method} {path}", request(method, path), False)
        if not is_open(route.method, path, {}):
            wrong = request(route.method, path, body, {"Authorization": BEARER + "x"})
            both = wrong.replace(b"\r\n\r\n", f"\r\nAuthorization: {BEARER}{KEY}\r\n\r\n".encode(), 1)
            yield Trick(f"two keys: {route.method} {path}", both, False)


def judge_keys(score: Score, target: Target) -> None:
    """401 for every trick; with the key, every route answers."""
    with_key = {"Authorization": BEARER + KEY}
    with Connection(target.address) as connection:
        described = connection.ask(request("GET", "/openapi.json", None, with_key)).json()
    routes = routes_of(described, [("GET", path) for path in NOWHERE])
    asked, inside, other = 0, [], 0
    for trick in tricks(routes):
        asked += 1
        try:
            status = _status(target, trick)
        except (Unanswered, OSError) as error:
            inside.append(f"{trick.what}: {error}")
            continue
        if trick.bends and status == 400:
            other += 1
        elif status != 401:
            inside.append(f"{trick.what}: {status}")
    score.note(f"{asked} ways in over {len(routes)} routes; {other} paths refused as HTTP (400), the rest with 401")
    score.zero("ways in without the key", len(inside), asked)
    note_first(score, "let in", inside, 10)
    locked = []
    with Connection(target.address) as connection:
        for route in routes:
            body = dict(route.good) if route.good else None
            reply = connection.ask(request(route.method, route.path.replace("{model}", "demo"), body, with_key))
            locked += [f"{route.method} {route.path}"] if reply.status == 401 else []
        without = connection.ask(request("GET", "/health/live")).status
    score.zero("routes locked for the key", len(locked), len(routes))
    score.check("status of /health/live without a key", without, 200, without == 200)


def _status(target: Target, trick: Trick) -> int:
    with Connection(target.address) as connection:
        return connection.ask(trick.data).status


# ---------------------------------------------------------------- the comparison of keys


class _Guarded:
    """As much of a service as a guard looks at."""

    def __init__(self, key: str) -> None:
        self.settings = ServeConfig(api_key=(key,))
        self.draining = False


def guard_compare(key: str) -> Callable[[bytes], object]:
    """The server's own check of a header's key."""
    from headrace.server.limits import _Headers

    guard = Guard(_nowhere, _Guarded(key))

    def check(given: bytes) -> None:
        scope = {"path": "/metrics", "method": "GET", "headers": [(b"authorization", b"Bearer " + given)], "state": {}}
        with suppress(Unauthorized):
            guard._authenticate(scope, _Headers(scope))

    return check


async def _nowhere(scope: object, receive: object, send: object) -> None:
    raise AssertionError("nobody is let in")


def early_compare(key: str) -> Callable[[bytes], object]:
    """One that ends at the first difference: what the measurement must be able to see."""
    known = key.encode()

    def check(given: bytes) -> object:
        return len(given) == len(known) and all(one == other for one, other in zip(given, known, strict=True))

    return check


def welch_t(check: Callable[[bytes], object], key: str, samples: int, seed: int = 0) -> float:
    """|t| between the times of keys that are wrong at once and keys that are wrong at the end, asked in random order;
    times above one bound for both are left out (Welch 1947; Reparaz et al. 2017, "Dude, is my code constant time?")."""
    draw = random.Random(seed)
    wrong = (b"#" + key.encode()[1:], key.encode()[:-1] + b"#")
    labels = [draw.getrandbits(1) for _ in range(samples)]
    # Made beforehand, and the times sorted out afterwards: in the loop nothing depends on the label but the key itself.
    keys = [bytes(bytearray(wrong[label])) for label in labels]
    times = [0] * samples
    clock = time.perf_counter_ns
    for one in wrong * 200:
        check(one)
    for index, one in enumerate(keys):
        began = clock()
        check(one)
        times[index] = clock() - began
    bound = sorted(times)[int(CROPPED * samples)]
    kept = [
        [value for value, label in zip(times, labels, strict=True) if label == which and value < bound]
        for which in (0, 1)
    ]
    means = [statistics.fmean(one) for one in kept]
    spread = sum(statistics.variance(one) / len(one) for one in kept)
    return abs(means[0] - means[1]) / spread**0.5 if spread else 0.0


def judge_timing(score: Score, samples: int) -> None:
    found = welch_t(guard_compare(KEY), KEY, samples)
    score.at_most(f"Welch's t of the key's comparison, {samples} samples", found, MOST_T, "")
    control = welch_t(early_compare(KEY), KEY, samples)
    score.check("the same of one that ends early", f"{control:.1f}", f"> {MOST_T}", control > MOST_T)


# ---------------------------------------------------------------- code that runs what it reads

MODULES = frozenset(
    {"pickle", "cPickle", "_pickle", "dill", "marshal", "shelve", "cloudpickle", "joblib", "jsonpickle"}
)
BUILTINS = frozenset({"eval", "exec", "compile", "__import__"})
CALLS = frozenset(
    {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.load", "os.system", "os.popen", "torch.hub.load"}
    | {"pandas.read_pickle", "multiprocessing.Pipe", "multiprocessing.Queue", "multiprocessing.Manager"}
)
CONTROL = """
import pickle as p
from marshal import loads
def f(x, torch, np, subprocess):
    eval(x); exec(x); compile(x, "", "exec"); __import__(x); torch.load(x)
    np.load(x, allow_pickle=True); subprocess.run(x, shell=True)
"""
NUM_CONTROL = 9


def dangers(source: str) -> list[str]:
    """Lines of Python code that read code, or run a shell."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [one.name for one in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found += [f"{node.lineno}: import {one}" for one in names if one.split(".")[0] in MODULES]  # type: ignore[attr-defined]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in BUILTINS or called in CALLS:
                found.append(f"{node.lineno}: {called}()")
            for word in node.keywords:
                if word.arg in ("allow_pickle", "shell", "trust_remote_code") and ast.unparse(word.value) != "False":
                    found.append(f"{node.lineno}: {word.arg}={ast.unparse(word.value)}")
    return found


def judge_source(score: Score) -> None:
    root = Path(headrace.__file__).parent
    files = sorted(root.rglob("*.py"))
    found = [f"{path.relative_to(root)}:{line}" for path in files for line in dangers(path.read_text())]
    score.zero(f"places that run what they read, in {len(files)} files", len(found))
    note_first(score, "code", found, 10)
    control = len(dangers(CONTROL))
    score.check("the same in a file that has them", control, NUM_CONTROL, control == NUM_CONTROL)


# ---------------------------------------------------------------- frames


class _Bomb:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (sys.exit, (99,))


def hostile_frames(count: int, seed: int = 0) -> Iterator[bytes]:
    """Random bytes, pickles, msgpack of the wrong kind, too deep, too long, cut."""
    draw = random.Random(seed)

    def framed(data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + data

    ways: Sequence[Callable[[], bytes]] = (
        lambda: b"\xff" + draw.randbytes(draw.randint(4, 400)),
        lambda: framed(draw.randbytes(draw.randint(9, 4000))),
        lambda: framed(pickle.dumps(_Bomb(), draw.randint(0, 5))),
        lambda: b"\x80" + pickle.dumps([_Bomb()] * draw.randint(1, 9)),
        lambda: framed(b"\x91" * draw.choice((10, 1000, 100_000, 1_000_000))),
        lambda: framed(b"\x92\x01" + b"\x81\xa1a" * draw.randint(1, 100_000) + b"\xc0"),
        lambda: framed(b"\x92" + bytes([draw.randint(0, 127)]) + b"\xc1"),
        lambda: framed(b"\x92\x03\xa4" + b"\xff\xfe\xfd\xfc"),
        lambda: framed(b"\x92\x03\xdb\xff\xff\xff\xff" + draw.randbytes(8)),
        lambda: framed(b"\x93\x02\xa1a\xcf" + b"\xff" * 4),
        lambda: framed(b"\xdd\xff\xff\xff\xff\x01"),
        lambda: framed(b"\x92\x01\xc7\x10\x2a" + draw.randbytes(16)),
        lambda: framed(b"\x92\x01" + draw.choice((b"\xc0", b"\x00", b"\xa1a", b"\x90", b"\x80", b"\xc3"))),
        lambda: framed(b'{"type": "Submit", "request": {}}'),
        lambda: framed(b""),
    )
    for index in range(count):
        yield ways[index % len(ways)]()


def judge_frames(score: Score, count: int) -> None:
    """Each refused as what it is, on both sides, whether it comes whole or byte by byte."""
    accepted, wrong, asked = [], [], 0
    for kind in (ToEngine, FromEngine):
        for index, frame in enumerate(hostile_frames(count)):
            asked += 1
            step = 1 if index % 10 == 0 and len(frame) < 2000 else len(frame)
            reader = Reader(kind)
            try:
                messages = [one for at in range(0, len(frame), step) for one in reader.feed(frame[at : at + step])]
                accepted.append(f"{frame[:40]!r}: {messages}")
            except EngineError:
                continue
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                wrong.append(f"{frame[:40]!r}: {type(error).__name__} {error}")
    score.zero("hostile frames that are taken", len(accepted), asked)
    score.zero("hostile frames that raise another error than ours", len(wrong), asked)
    note_first(score, "frame", [*accepted, *wrong])


# ---------------------------------------------------------------- all of it


def attack(target: Target, score: Score, samples: int, frames: int) -> None:
    """On a server whose key is KEY."""
    judge_sockets(score, target, "before")
    judge_keys(score, target)
    judge_sockets(score, target, "after")
    judge_timing(score, samples)
    judge_source(score)
    judge_frames(score, frames)


def main() -> int:
    given = options(__doc__, False, None)
    score = Score("surface")
    with own_server(given.model, *FLAGS, *given.flag) as target:
        attack(target, score, *((SHORT_SAMPLES, SHORT_FRAMES) if given.short else (SAMPLES, FRAMES)))
    return finish(score, given.json)


if __name__ == "__main__":
    sys.exit(main())
