"""The page at `/`: what is served and with which headers, and what can be told of its files without a browser.

`tests/robustness/page_browser.py` looks at it in a real one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from html.parser import HTMLParser

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from headrace.core.errors import InvalidParameter
from headrace.core.types import SamplingParams
from headrace.server.page_routes import (
    ASSETS,
    CONTENT_SECURITY_POLICY,
    FOLDER,
    OPEN_PATHS,
    index_file,
    page_routes,
    wants_page,
)

LOAD: Mapping[str, object] = {"running": 2, "waiting": 1, "tokens_per_s": 41.5, "model": "tiny", "ready": True}
VOID = frozenset({"meta", "link", "img", "input"})
TEXTS: Mapping[str, str] = {name: (FOLDER / name).read_text("utf-8") for name in (*ASSETS, "index.html")}
SCRIPTS: Mapping[str, str] = {name: text for name, text in TEXTS.items() if name.endswith(".js")}


class Served:
    """A service of which only the load is asked."""

    def live(self) -> Mapping[str, object]:
        return LOAD


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    app.include_router(page_routes(Served()))
    index = index_file()

    @app.api_route("/", methods=["GET", "HEAD"])
    async def root(request: Request) -> object:
        return index.response(request, vary="Accept")

    return TestClient(app)


class Elements(HTMLParser):
    """(tag, attributes) of every element; complains of tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"{tag}: an attribute twice"
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def with_attribute(self, name: str) -> list[tuple[str, str]]:
        return [(tag, value or "") for tag, attributes in self.found if (value := attributes.get(name)) is not None]


@pytest.fixture(scope="module")
def page() -> Elements:
    return Elements(TEXTS["index.html"])


# --- what is served


@pytest.mark.parametrize("path", ["/", *sorted(OPEN_PATHS)])
def test_files_are_served_whole_and_guarded(client: TestClient, path: str) -> None:
    answer = client.get(path)
    name = path.removeprefix("/page/") if path != "/" else "index.html"
    kinds = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    assert answer.status_code == 200
    assert answer.content == (FOLDER / name).read_bytes()
    assert answer.headers["content-type"] == f"{kinds[name.rpartition('.')[2]]}; charset=utf-8"
    assert answer.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers.get("vary") == ("Accept" if path == "/" else None)


@pytest.mark.parametrize("path", ["/", "/page/page.js"])
def test_file_the_browser_has_is_not_sent_again(client: TestClient, path: str) -> None:
    etag = client.get(path).headers["etag"]
    for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        again = client.get(path, headers={"if-none-match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    assert client.get(path, headers={"if-none-match": '"other"'}).status_code == 200


def test_each_file_has_its_own_etag(client: TestClient) -> None:
    assert len({client.get(path).headers["etag"] for path in ("/", *OPEN_PATHS)}) == len(OPEN_PATHS) + 1


def test_head_is_answered(client: TestClient) -> None:
    assert client.head("/page/page.css").status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        *("/page/", "/page/index.html", "/page/missing.js", "/page/PAGE.JS", "/page/page.js/", "/page/page.js%00"),
        *("/page/../page_routes.py", "/page/%2e%2e/page_routes.py", "/page/..%2fpage_routes.py", "/page//page.js"),
    ],
)
def test_nothing_else_is_served(client: TestClient, path: str) -> None:
    answer = client.get(path, follow_redirects=False)
    assert answer.status_code in {404, 307}
    assert b"from __future__" not in answer.content


def test_nothing_but_reading_is_allowed(client: TestClient) -> None:
    assert client.post("/page/page.js").status_code == 405
    assert client.post("/page/live.json").status_code == 405


def test_allow_list_is_the_folder() -> None:
    assert {file.name for file in FOLDER.iterdir()} == {*ASSETS, "index.html"}


def test_load_is_told_and_not_kept(client: TestClient) -> None:
    answer = client.get("/page/live.json")
    assert answer.json() == LOAD
    assert answer.headers["cache-control"] == "no-store"


def test_load_is_not_open() -> None:
    assert "/page/live.json" not in OPEN_PATHS


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", True),
        ("application/json, TEXT/HTML ; q=0.1", True),
        ("text/html;q=0", False),
        ("text/html; q=0.000, */*", False),
        ("text/html;level=1;q=0.0", False),
        ("*/*", False),
        ("text/*", False),
        ("text/htmlx", False),
        ("application/json", False),
        ("", False),
        (",;,", False),
    ],
)
def test_only_browsers_get_the_page(accept: str, expected: bool) -> None:
    assert wants_page(accept) is expected


# --- what the files say


def test_policy_allows_no_inline_code() -> None:
    assert "unsafe" not in CONTENT_SECURITY_POLICY
    assert CONTENT_SECURITY_POLICY.startswith("default-src 'none'")


@pytest.mark.parametrize("name", TEXTS)
def test_nothing_is_loaded_from_elsewhere(name: str) -> None:
    text = TEXTS[name].replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"(?:https?:|wss?:)?//[a-z0-9]+[.:]", text)
    assert not re.search(r"@import|url\(", text)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_make_no_markup_of_text(name: str) -> None:
    unsafe = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|DOMParser|setTimeout\(\s*[\"'`]"
    )
    assert not re.search(unsafe, SCRIPTS[name])


def test_page_holds_no_inline_code(page: Elements) -> None:
    for tag, attributes in page.found:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        assert tag != "style"
        assert tag != "script" or attributes.get("src")
    assert not re.search(r"<script[^>]*>[^<]", TEXTS["index.html"])


def test_page_names_only_files_that_are_served(page: Elements) -> None:
    named = [value for name in ("src", "href") for _, value in page.with_attribute(name)]
    assert named
    assert {f"/{value}" for value in named} <= OPEN_PATHS
    for script in SCRIPTS.values():
        imported = re.findall(r"from \"\./([^\"]+)\"", script)
        assert {f"/page/{name}" for name in imported} <= OPEN_PATHS
        assert len(imported) == len(re.findall(r"^import ", script, re.MULTILINE))


def test_page_says_its_language_and_fits_phones(page: Elements) -> None:
    assert ("html", "en") in page.with_attribute("lang")
    viewport = [attributes["content"] for tag, attributes in page.found if attributes.get("name") == "viewport"]
    assert "width=device-width" in str(viewport)
    assert "user-scalable" not in str(viewport)
    assert "maximum-scale" not in str(viewport)


def test_ids_are_unique_and_referred_to_rightly(page: Elements) -> None:
    ids = [value for _, value in page.with_attribute("id")]
    assert len(ids) == len(set(ids))
    for name in ("for", "aria-describedby", "aria-labelledby", "aria-controls"):
        for _, value in page.with_attribute(name):
            assert set(value.split()) <= set(ids), f"{name}={value}"
    for name, script in SCRIPTS.items():
        for one in re.findall(r"byId\(\"([^\"]+)\"\)", script):
            assert one in ids, f"{name}: {one}"


def test_every_field_has_a_name(page: Elements) -> None:
    labelled = {value for _, value in page.with_attribute("for")}
    for tag, attributes in page.found:
        if tag in {"input", "select", "textarea"}:
            assert attributes.get("id") in labelled or attributes.get("aria-label"), attributes
        if tag == "img":
            assert "alt" in attributes
        if tag == "button":
            assert attributes.get("type") in {"button", "submit"}


def test_answers_are_read_out_when_there_is_time(page: Elements) -> None:
    log = next(attributes for _, attributes in page.found if attributes.get("id") == "log")
    assert (log["role"], log["aria-live"], log["tabindex"]) == ("log", "polite", "0")


@pytest.mark.parametrize("field", ["temperature", "top_p", "top_k", "max_tokens", "seed"])
def test_bounds_are_those_of_the_engine(page: Elements, field: str) -> None:
    wanted = field.replace("_", "-")
    attributes = next(attributes for _, attributes in page.found if attributes.get("id") == wanted)
    kind = int if attributes["step"] == "1" else float
    low, high = kind(attributes["min"] or ""), kind(attributes["max"] or "")
    SamplingParams(**{field: high})  # type: ignore[arg-type]
    if "data-above" in attributes:
        with pytest.raises(InvalidParameter):
            SamplingParams(**{field: low})  # type: ignore[arg-type]
    else:
        SamplingParams(**{field: low})  # type: ignore[arg-type]
    if kind is float:
        with pytest.raises(InvalidParameter):
            SamplingParams(**{field: high + 0.001})  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(scheme: str) -> None:
    """WCAG 2.2 §1.4.3: text 4.5 to 1 on every ground it stands on; §1.4.11: edges of controls 3 to 1."""
    blocks = re.findall(r":root \{([^}]*--ground[^}]*)\}", TEXTS["page.css"])
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[0 if scheme == "light" else 1]))
    grounds = ("ground", "sheet", "tint")
    for ink in ("ink", "soft", "accent", "wrong"):
        for ground in grounds:
            assert contrast(colours[ink], colours[ground]) >= 4.5, f"{ink} on {ground}"
    assert contrast(colours["accent-ink"], colours["accent"]) >= 4.5
    assert min(contrast(colours["edge"], colours[ground]) for ground in ("ground", "sheet")) >= 3


def contrast(first: str, second: str) -> float:
    """WCAG 2.2's ratio of two colours `#rrggbb`; 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)
