"""The house rules that a syntax tree can tell (docs/DESIGN.md §2, §4): `Source` in, complaints out.

Rules look at names as they are written: they keep honest people from slips, not a determined one from cheating.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
PACKAGE = REPO / "src" / "headrace"

UNSAFE_MODULES = frozenset({"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"})
UNSAFE_CALLS = frozenset({"eval", "exec", "yaml.load", "torch.load"})
TENSOR_MODULES = frozenset({"torch", "torchvision", "triton"})
TENSOR_ROOMS = ("backends/torch/", "backends/transformers/", "parallel/comm.py", "compress/")
HTTP_MODULES = frozenset({"fastapi", "starlette", "uvicorn", "uvloop", "httptools", "aiohttp", "flask", "tornado"})
HTTP_SERVERS = frozenset({"http.server", "socketserver", "wsgiref", "xmlrpc.server"}) | HTTP_MODULES
ENVIRONMENT = frozenset({"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"})
READ_ONLY = frozenset({"Mapping", "Sequence", "Collection", "Iterable", "Set", "AbstractSet", "tuple", "frozenset"})
MUTABLE = frozenset(
    {"list", "dict", "set", "bytearray", "defaultdict", "OrderedDict", "Counter", "deque", "ChainMap", "ContextVar"}
    | {"WeakKeyDictionary", "WeakValueDictionary", "WeakSet", "Queue", "SimpleQueue", "local", "count", "cycle"}
)
BROAD = frozenset({"Exception", "BaseException"})
CODED = ("Error", "ErrorEvent")
TENSOR_STREAMS = frozenset({"weights", "tensors", "state_dict", "named_parameters", "named_modules", "parameters"})
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Source:
    path: str
    """Relative to src/headrace, with slashes."""
    tree: ast.Module

    @classmethod
    def parse(cls, path: str, text: str) -> Source:
        return cls(path, ast.parse(text))

    def at(self, node: ast.AST, complaint: str) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {complaint}"

    def within(self, places: Sequence[str]) -> bool:
        return any(self.path.startswith(place) for place in places)


def package_sources() -> tuple[Source, ...]:
    """Every module of the package; `compare/drivers` hold standalone scripts, which have a rule of their own."""
    return tuple(
        Source.parse(file.relative_to(PACKAGE).as_posix(), file.read_text(encoding="utf-8"))
        for file in sorted(PACKAGE.rglob("*.py"))
    )


def is_driver(source: Source) -> bool:
    return source.path.startswith("compare/drivers/") and not source.path.endswith("/__init__.py")


def dotted(node: ast.expr | None) -> str:
    """`a.b.c` of a name or an attribute of a name, else the empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (left := dotted(node.value)):
        return f"{left}.{node.attr}"
    return ""


def last(node: ast.expr | None) -> str:
    """`c` of `a.b.c`."""
    return dotted(node).rpartition(".")[2]


def imported(source: Source) -> Iterator[tuple[ast.stmt | ast.expr, str]]:
    """(node, module) of every import, wherever it stands, also through importlib. `from a import b` gives a and a.b."""
    room = ["headrace", *source.path.split("/")[:-1]]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = room[: len(room) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield node, module
            yield from ((node, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and last(node.func) in {"import_module", "__import__"}:
            named = [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
            yield from ((node, name) for name in named if isinstance(name, str))


def imports_of(source: Source, banned: frozenset[str], why: str) -> list[str]:
    """One complaint a node that imports one of `banned` or something inside it."""
    found = {
        (node, name)
        for node, module in imported(source)
        for name in banned
        if module == name or module.startswith(name + ".")
    }
    return [source.at(node, f"imports {name}: {why}") for node, name in sorted(found, key=lambda hit: hit[0].lineno)]


def tensor_library(source: Source) -> list[str]:
    if source.within(TENSOR_ROOMS):
        return []
    return imports_of(source, TENSOR_MODULES, f"only in {', '.join(TENSOR_ROOMS)}")


def control_plane_is_plain(source: Source) -> list[str]:
    """core and sched: the standard library and headrace only (so no numpy)."""
    if not source.within(("core/", "sched/")):
        return []
    tops = {(node, module.split(".")[0]) for node, module in imported(source)}
    outside = [(node, top) for node, top in tops if top != "headrace" and top not in sys.stdlib_module_names]
    return [
        source.at(node, f"imports {top}: core and sched hold the standard library only")
        for node, top in sorted(outside, key=lambda hit: hit[0].lineno)
    ]


def http_server(source: Source) -> list[str]:
    return [] if source.within(("server/", "cli/")) else imports_of(source, HTTP_SERVERS, "only in server")


def unsafe_code(source: Source) -> list[str]:
    found = imports_of(source, UNSAFE_MODULES, "it can run what a file says")
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and dotted(node.func) in UNSAFE_CALLS:
            found.append(source.at(node, f"calls {dotted(node.func)}: it can run what a file says"))
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.append(source.at(node.value, "allow_pickle: it can run what a file says"))
    return found


def environment(source: Source) -> list[str]:
    if source.within(("cli/",)):
        return []
    os_names = {
        alias.asname or alias.name
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "os"
    }
    found = imports_of(source, frozenset(f"os.{name}" for name in ENVIRONMENT), "the environment is read in cli only")
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT and dotted(node.value) in os_names:
            found.append(source.at(node, f"os.{node.attr}: the environment is read in cli only"))
    return found


def global_statement(source: Source) -> list[str]:
    return [
        source.at(n, "global statement: pass the value") for n in ast.walk(source.tree) if isinstance(n, ast.Global)
    ]


def _module_statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run at import: the module's own, inside if/for/with/try too, and those of class bodies."""
    for statement in body:
        if isinstance(statement, FUNCTIONS):
            continue
        yield statement
        for part in ("body", "orelse", "finalbody"):
            yield from _module_statements(getattr(statement, part, []))
        for handler in getattr(statement, "handlers", []):
            yield from _module_statements(handler.body)


def _makes_mutable(value: ast.expr | None) -> bool:
    match value:
        case ast.List() | ast.Dict() | ast.Set() | ast.ListComp() | ast.DictComp() | ast.SetComp():
            return True
        case ast.Call(func=func):
            return last(func) in MUTABLE
        case ast.BinOp(left=left, right=right) | ast.IfExp(body=left, orelse=right):
            return _makes_mutable(left) or _makes_mutable(right)
        case ast.BoolOp(values=values):
            return any(_makes_mutable(one) for one in values)
    return False


def _type_name(annotation: ast.expr) -> str:
    """The outermost type's name, looking through Final[...], ClassVar[...] and quotes; `Final` alone says nothing."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return _type_name(ast.parse(annotation.value, mode="eval").body)
    if isinstance(annotation, ast.Subscript):
        outer = last(annotation.value)
        return _type_name(annotation.slice) if outer in {"Final", "ClassVar"} else outer
    return last(annotation)


def module_state(source: Source) -> list[str]:
    """A list, dict or set bound at module or class level is typed read-only (Mapping, Sequence, tuple …), so that mypy
    refuses every write to it. Names between double underscores belong to the language and are free."""
    found = []
    for statement in _module_statements(source.tree.body):
        match statement:
            case ast.AnnAssign(target=target, annotation=annotation, value=value):
                kind = _type_name(annotation)
                shared = value is not None and not (isinstance(value, ast.Call) and last(value.func) == "field")
                if (kind in MUTABLE and shared) or (_makes_mutable(value) and kind not in READ_ONLY):
                    found.append(
                        source.at(statement, f"{ast.unparse(target)} is shared and mutable: type it read-only")
                    )
            case ast.Assign(targets=targets, value=value):
                names = [ast.unparse(target) for target in targets]
                free = all(name.startswith("__") and name.endswith("__") for name in names)
                if _makes_mutable(value) and not free:
                    found.append(
                        source.at(statement, f"{', '.join(names)} is shared and mutable: annotate it read-only")
                    )
                if any(isinstance(target, ast.Subscript) for target in targets):
                    found.append(source.at(statement, f"{names[0]} is written at import: build it in one expression"))
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and dotted(node.func) == "globals":
            found.append(source.at(node, "globals() is shared and mutable: pass the value"))
    return found


def _exceptions(handler: ast.ExceptHandler) -> set[str]:
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return {last(kind) for kind in kinds}


def broad_except(source: Source) -> list[str]:
    """A broad `except` raises again or makes a coded error of what it caught; suppress(Exception) does neither."""
    found = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler) and (node.type is None or _exceptions(node) & BROAD):
            inside = [part for statement in node.body for part in ast.walk(statement)]
            raises = any(isinstance(part, ast.Raise) for part in inside)
            coded = any(isinstance(part, ast.Call) and dotted(part.func).endswith(CODED) for part in inside)
            if not raises and not coded:
                found.append(source.at(node, "broad except that neither raises nor makes a coded error"))
        elif (
            isinstance(node, ast.Call)
            and last(node.func) == "suppress"
            and BROAD & {dotted(kind) for kind in node.args}
        ):
            found.append(source.at(node, "suppress(Exception) hides every error"))
    return found


def _streams(iterated: ast.expr) -> set[str]:
    """What an iteration walks over: `w` of `w`, `w.items()` and `sorted(w)`; of `w.rules` it is `rules` and not `w`."""
    parts = list(ast.walk(iterated))
    attributes = [part for part in parts if isinstance(part, ast.Attribute)]
    owners = [part.value for part in attributes if part.attr not in {"items", "keys", "values"}]
    return {part.id for part in parts if isinstance(part, ast.Name) and part not in owners} | {
        a.attr for a in attributes
    }


def loading_in_models(source: Source) -> list[str]:
    """models/ describes: no loading function, no walk over tensors, no arrays."""
    if not source.within(("models/",)):
        return []
    found = imports_of(source, frozenset({"numpy"}), "models describe, they hold no tensors")
    for node in ast.walk(source.tree):
        if isinstance(node, FUNCTIONS) and node.name.lstrip("_").startswith("load"):
            found.append(source.at(node, f"{node.name}: weights/loader.py loads, for every model"))
        elif isinstance(node, ast.For | ast.AsyncFor | ast.comprehension) and _streams(node.iter) & TENSOR_STREAMS:
            found.append(source.at(node.iter, f"loop over {ast.unparse(node.iter)}: weights/loader.py loads"))
    return found


def driver_stands_alone(source: Source) -> list[str]:
    """A driver runs in an interpreter of its own, where headrace is not."""
    return imports_of(source, frozenset({"headrace"}), "a driver is a standalone script")


RULES: Sequence[Callable[[Source], list[str]]] = (
    tensor_library,
    control_plane_is_plain,
    http_server,
    unsafe_code,
    environment,
    global_statement,
    module_state,
    broad_except,
    loading_in_models,
)
"""For every module of the package but the drivers."""
