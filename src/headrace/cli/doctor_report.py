"""What `headrace doctor` has found, for people: sections of labelled rows, wrapped to the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any, NamedTuple

from headrace.cli.console import Style, printable
from headrace.core.errors import shorten

LABEL = 13


class Row(NamedTuple):
    label: str
    text: str
    good: bool | None = None
    """Colours what stands before the first colon."""


def render(found: Mapping[str, Any], style: Style, width: int) -> str:
    """The whole report, wrapped to `width` columns."""
    packages = [f"{name} {version}" for name, version in found["packages"].items() if version]
    missing = [name for name, version in found["packages"].items() if not version]
    software = [
        Row("headrace", f"{found['headrace']}, Python {found['python']}"),
        Row("packages", ", ".join(packages)),
        Row("not installed", ", ".join(missing) or "–"),
        Row("environment", environment_text(found["environment"])),
    ]
    sections = [
        ("Machine", machine_rows(found)),
        ("GPU", card_rows(found["card"])),
        ("Software", software),
        ("Backends", backend_rows(found)),
        ("Models", storage_rows(found)),
    ]
    if found["model"] is not None:
        sections.append((f"Model {found['model'].get('name', '')}".rstrip(), model_rows(found["model"])))
        sections.append(("Settings chosen for it", settings_rows(found["model"])))
    blocks = [section_text(printable(title), rows, width, style) for title, rows in sections if rows]
    if found["warnings"]:
        lines = [line for text in found["warnings"] for line in hanging(text, width, "  ! ", "    ")]
        blocks.append("\n".join((style.bold("Worth a look"), *(style.warn(line) for line in lines))))
    return "\n\n".join(blocks)


def machine_rows(found: Mapping[str, Any]) -> list[Row]:
    cpu, memory = found["cpu"], found["memory"]
    cores = f"{cpu['cores_usable']} usable of {cpu['cores_present']}"
    if cpu["quota_cores"] is not None:
        cores += f", control group allows {cpu['quota_cores']:g} CPUs' worth of time"
    if (cpu["numa_nodes"] or 1) > 1:
        cores += f", {cpu['numa_nodes']} NUMA nodes"
    has = [name for name, there in cpu["instructions"].items() if there]
    lacks = [name for name, there in cpu["instructions"].items() if not there]
    sets = (", ".join(has) or "none that matter") + (f" (not: {', '.join(lacks)})" if lacks else "")
    rooms = f"{size(memory['available_bytes'])} available of {size(memory['total_bytes'])}"
    if memory["limit_bytes"] is not None:
        rooms += f", control group limit {size(memory['limit_bytes'])}"
    swap = memory["swap_total_bytes"]
    rooms += f", swap {size(memory['swap_free_bytes'])} free of {size(swap)}" if swap else ", no swap"
    rows = [
        Row("system", found["system"]),
        Row("CPU", cpu["model"] or "unknown"),
        Row("cores", cores),
        Row("instructions", sets if cpu["instructions"] else "unknown"),
        Row("memory", rooms),
        Row("load", "unknown" if cpu["load_1min"] is None else f"{cpu['load_1min']:g} in the last minute"),
    ]
    if cpu["governor"]:
        rows.append(Row("governor", cpu["governor"]))
    for card in found["gpus"]:
        text = f"{card['name']}, {size(card['memory_free_bytes'])} free of {size(card['memory_total_bytes'])}"
        about = [text, f"driver {card['driver'] or 'unknown'}"]
        about.append(f"compute capability {card['compute_capability'] or 'unknown'}")
        rows.append(Row("GPU", ", ".join(about)))
    if found["gpu_note"]:
        rows.append(Row("GPU", found["gpu_note"]))
    return rows


def card_rows(card: Mapping[str, Any] | None) -> list[Row]:
    """What was measured on the GPU, and what runs each operation there."""
    if card is None:
        return []
    if card["error"] is not None:
        return [Row("error", card["error"], good=False)]
    major, minor = card["capability"]
    about = f"{card['name']}, {size(card['memory_bytes'])}, {card['multiprocessors']} multiprocessors"
    rates = ", ".join(f"{name} {rate(value)}" for name, value in card["matmul_TFLOPs"].items())
    return [
        Row("card", f"{about}, compute capability {major}.{minor}"),
        Row(
            "memory rate",
            f"copy {rate(card['copy_GBps'])} GB/s (read and written), read {rate(card['read_GBps'])} GB/s",
        ),
        Row("matrix rate", f"{rates} TFLOP/s"),
        *(Row(one["op"], f"{one['chosen']}: {one['reason']}") for one in card["kernels"]),
    ]


def rate(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.0f}"


def environment_text(environment: Mapping[str, str | None]) -> str:
    parts = [f"{name}={shorten(value, 60)[1:-1]}" for name, value in environment.items() if value]
    return ", ".join(parts) or "nothing that matters is set"


def backend_rows(found: Mapping[str, Any]) -> list[Row]:
    rows = [backend_row(one) for one in found["backends"]]
    if any(one["name"] == "native" and not one["available"] for one in found["backends"]):
        rows.append(Row("compiler", found["compiler"] or "no C++ compiler is on the PATH"))
    chosen = found["auto"]
    if chosen is None:
        return [*rows, Row("auto", "none of them")]
    where = "" if chosen["device"] == "cpu" else f" on {chosen['device']}"
    return [*rows, Row("auto", f"{chosen['backend']}{where}: {chosen['reason']}")]


def backend_row(backend: Mapping[str, Any]) -> Row:
    if not backend["available"]:
        return Row(backend["name"], f"no: {backend['why']}", good=False)
    # The library's own number of threads is not the one that headrace will set.
    found = {name: value for name, value in backend["found"].items() if name != "threads"}
    text = ", ".join(f"{name} {spelled(found[name])}" for name in found)
    if "built" in found:
        usable = found["available"]
        text = f"{found['instructions']} kernels, the fastest that this CPU runs of {', '.join(found['built'])}"
        if lacking := [name for name in found["built"] if name not in usable]:
            text += f" (it lacks what {', '.join(lacking)} needs)"
    return Row(backend["name"], f"yes: {text}", good=True)


def storage_rows(found: Mapping[str, Any]) -> list[Row]:
    demo, cache = found["demo_model"], found["hub_cache"]
    text = f"empty ({cache['path']})"
    if cache["present"]:
        models = f"{cache['models']} model" + ("" if cache["models"] == 1 else "s")
        text = f"{models}, {'' if cache['counted_whole'] else 'at least '}{size(cache['bytes'])}, in {cache['path']}"
    return [
        Row("demo", f"installed, {size(demo['bytes'])}" if demo["installed"] else demo["hint"]),
        Row("Hub cache", text),
        Row("disk there", f"{size(cache['disk_free_bytes'])} free"),
    ]


def model_rows(model: Mapping[str, Any]) -> list[Row]:
    if model["error"] is not None:
        return [Row("error", model["error"]["message"], good=False)]
    bits = 8 * model["weight_bytes"] / max(1, model["parameters"])
    chat = "with a chat template" if model["chat_template"] else "no chat template"
    shape = f"{model['layers']} layers of {model['hidden_size']}, {model['heads']} heads, {model['kv_heads']} of KV"
    parts = f"{size(model['loaded_weight_bytes'])} of weights, up to {size(model['kv_cache_bytes'])} of KV cache"
    if (card := model["card_bytes"]) is not None:
        parts += f", {size(card['step'] + card['images'])} for a step, {size(card['graphs'])} for CUDA graphs"
    needs = f"{parts}, {size(model['free_bytes'])} free{'' if card is None else ' on the GPU'}"
    return [
        Row("architecture", f"{model['architecture']} ({model['format']}): {shape}"),
        Row("context", f"{model['context']} tokens, vocabulary of {model['vocab_size']}"),
        Row("tokenizer", f"yes, {chat}" if model["tokenizer"] else "none: token ids in and out"),
        Row("weights", f"{model['parameters'] / 1e6:,.1f} M in {size(model['weight_bytes'])}, {bits:.1f} bits each"),
        Row("KV cache", f"{model['kv_bytes_per_token'] / 1024:.1f} KiB a token"),
        Row("fits", f"{spelled(model['fits'])}: {needs}", good=model["fits"]),
        *(Row("note", note) for note in model["notes"]),
    ]


def settings_rows(model: Mapping[str, Any]) -> list[Row]:
    rows = []
    for name, setting in model.get("settings", {}).items():
        reason = setting["reason"].removeprefix(f"{setting['value']}: ")
        rows.append(Row(name, f"{spelled(setting['value'])}: {reason}"))
    return rows


def section_text(title: str, rows: Sequence[Row], width: int, style: Style) -> str:
    indent = 4 + max(LABEL, *(len(row.label) for row in rows))
    return "\n".join((style.bold(title), *(laid_out(row, indent, width, style) for row in rows)))


def laid_out(row: Row, indent: int, width: int, style: Style) -> str:
    """Label, then the text, wrapped below itself. Colours come last, so that they take no room."""
    lines = hanging(printable(row.text), width, f"  {row.label}".ljust(indent), " " * indent)
    if row.good is not None:
        word, colon, rest = lines[0][indent:].partition(":")
        lines[0] = lines[0][:indent] + (style.good if row.good else style.bad)(word) + colon + rest
    return "\n".join(lines)


def hanging(text: str, width: int, first: str, later: str) -> list[str]:
    """Wrapped lines; a path is longer than a line rather than broken."""
    lines = wrap(text, max(width - len(later), 40), break_on_hyphens=False, break_long_words=False)
    return [(later if number else first) + line for number, line in enumerate(lines or [""])]


def size(num_bytes: int | None) -> str:
    """In binary units, for people."""
    if num_bytes is None:
        return "unknown"
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if num_bytes >= 1 << power:
            return f"{num_bytes / (1 << power):.{1 if power == 30 else 0}f} {unit}"
    return f"{num_bytes} bytes"


def spelled(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
