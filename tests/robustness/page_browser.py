"""The page at `/` in a real headless browser: typed into, streamed, stopped, by keyboard alone, on a phone, with a key.

    python -m tests.robustness.page_browser SCREENSHOTS
    python -m tests.robustness.page_browser SCREENSHOTS --url http://127.0.0.1:8000

Without --url it starts `headrace serve demo` itself, and once more with an API key. A line for each check; exit 0: all
pass, 1: one does not, 2: this machine has no Chromium.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.robustness.devtools import BROWSERS, SHIFT, Browser, find_browser
from tests.server.conftest import serving

KEY = "a-key-for-this-test"
DESKTOP, PHONE, SMALLEST = (1280, 800), (375, 812), (320, 568)
LONG_QUESTION = "Write a very long story about a river, with many chapters."

MARKDOWN_CHECK = r"""
(async () => {
  const { MarkdownView } = await import("/page/markdown.js");
  const render = (pieces) => {
    const root = document.createElement("div");
    const view = new MarkdownView(root, () => document.createElement("button"));
    for (const piece of pieces) view.append(piece);
    view.end();
    return root;
  };
  const parts = ["**", "*", "_", "`", "```", "```py\n", "~~~", "\n", "\n\n", "# ", "- ", "1. ", "  - ", "---", "    ",
    "\\", "\r\n", "word ", "a_b", "<img src=x onerror=alert(1)>", "<script>alert(1)</script>", "&lt;", "é", "🙂",
    "\u2028", "x".repeat(230), "long words ".repeat(500), " ".repeat(210), "***", "9) "];
  let seed = 7;
  const draw = (n) => (seed = (seed * 48271) % 2147483647) % n;
  for (let round = 0; round < 600; round += 1) {
    const text = Array.from({ length: 1 + draw(24) }, () => parts[draw(parts.length)]).join("");
    const pieces = [];
    for (let at = 0; at < text.length; ) {
      let end = at + 1 + draw(round % 2 ? 4 : 400);
      if (/[\uD800-\uDBFF]/.test(text[end - 1])) end += 1;
      pieces.push(text.slice(at, end));
      at = end;
    }
    const [whole, streamed] = [render([text]), render(pieces)];
    if (whole.innerHTML !== streamed.innerHTML) return `differs: ${JSON.stringify(pieces)}`;
    if (whole.querySelector("img, script, a, iframe")) return `became markup: ${JSON.stringify(text)}`;
  }
  const sample = render(["**bold** and `a*b*`\n- one\n  - two\n\n```py\nx = 1\n\ny = '''\n```\n## End"]);
  const shape = sample.innerHTML.replace(/<\/?span>/g, "");
  const wanted = ["<strong>bold</strong>", "<code>a*b*</code>", "<ul><li><p>one</p><ul><li><p>two</p>",
    "x = 1\n\ny = '''\n", "<h4>End</h4>"];
  const missing = wanted.find((one) => !shape.includes(one));
  return missing ? `no ${missing} in ${shape}` : "";
})()
"""

EVENTS_CHECK = r"""
(async () => {
  const { EventReader } = await import("/page/sse.js");
  const text = ": ping\n\ndata: {\"a\":1}\r\n\r\ndata:two\ndata: lines\n\n"
    + "event: x\nid: 3\n\r\ndata: {\"b\":\"é 🙂\"}\r\rdata: [DONE]\n\n";
  const wanted = JSON.stringify(['{"a":1}', "two\nlines", '{"b":"é 🙂"}', "[DONE]"]);
  for (let size = 1; size <= text.length; size += 1) {
    const reader = new EventReader();
    const found = [];
    for (let at = 0; at < text.length; at += size) found.push(...reader.push(text.slice(at, at + size)));
    if (JSON.stringify(found) !== wanted) return `pieces of ${size}: ${JSON.stringify(found)}`;
  }
  return "";
})()
"""

LONG_CHECK = r"""
(async () => {
  const { MarkdownView } = await import("/page/markdown.js");
  const piece = { prose: "A sentence of the tale. ", code: "x = compute(y)\n", line: "word " }[KIND];
  const seconds = (pieces) => {
    const root = document.querySelector("#log").appendChild(document.createElement("div"));
    root.className = "rich";
    const view = new MarkdownView(root, () => document.createElement("button"));
    if (KIND === "code") view.append("```\n");
    const start = performance.now();
    for (let n = 0; n < pieces; n += 1) {
      view.append(KIND === "prose" && n % 20 === 19 ? `${piece}\n\n` : piece);
      if (n % 100 === 0) root.getBoundingClientRect();
    }
    const spent = performance.now() - start;
    root.remove();
    return spent;
  };
  seconds(500);
  const [short, long] = [seconds(2000), seconds(20000)];
  return long < 40 * short + 200 ? "" : `2000 pieces: ${short.toFixed(0)} ms, 20000: ${long.toFixed(0)} ms`;
})()
"""

UNNAMED_CHECK = """
[...document.querySelectorAll("button, input, select, textarea")].filter((one) => !one.closest("[hidden]")
  && !(one.labels && one.labels.length) && !one.getAttribute("aria-label") && !one.textContent.trim())
  .map((one) => one.outerHTML).join(" ")
"""


IDLE = "document.querySelector('#composer').dataset.busy === 'false'"
BUSY = "document.querySelector('#composer').dataset.busy === 'true'"
ANSWER = "([...document.querySelectorAll('.by-model .text')].at(-1)?.textContent ?? '')"
NOTE = "([...document.querySelectorAll('.note:not([hidden])')].at(-1)?.textContent ?? '')"
FACTS = "([...document.querySelectorAll('.facts')].at(-1)?.textContent ?? '')"
FITS = "document.documentElement.scrollWidth <= innerWidth && document.querySelector('#log').scrollWidth <= innerWidth"
RUNNING = "fetch('page/live.json').then((answer) => answer.json()).then((load) => load.running)"


class Checks:
    """The page at one address, and what it was found to do."""

    def __init__(self, browser: Browser, url: str, folder: Path) -> None:
        self.browser = browser
        self.url = url
        self.folder = folder
        self.failed: list[str] = []

    def check(self, name: str, passed: bool, why: object = "") -> None:
        print(f"{'pass' if passed else 'FAIL'}  {name}" + (f": {why}" if why and not passed else ""), flush=True)
        if not passed:
            self.failed.append(name)

    def ask(self, text: str) -> None:
        self.browser.js("document.querySelector('#message').focus()")
        self.browser.type(text)
        self.browser.press("Enter")

    def fill(self, field: str, text: str) -> None:
        self.browser.js(f"document.querySelector('#{field}').select()")
        if text:
            self.browser.type(text)
        else:
            self.browser.js("document.execCommand('delete')")

    def opens(self) -> None:
        browser = self.browser
        browser.size(*DESKTOP)
        browser.media("light")
        self.check("the page opens", browser.open(self.url))
        self.check("it names the model", browser.wait("document.querySelector('#model-name').textContent"))
        self.check(
            "it shows the load", browser.wait("/\\d+ running.*tok\\/s/.test(document.querySelector('#live').innerText)")
        )
        self.check("the message has the focus", browser.wait("document.activeElement.id === 'message'", 3))
        self.check("every control has a name", not browser.js(UNNAMED_CHECK), browser.js(UNNAMED_CHECK))
        browser.shoot(self.folder / "empty.png")

    def streams(self) -> None:
        browser = self.browser
        self.fill("max-tokens", "24")
        self.ask("Tell me <img src=x onerror=\"document.title='bad'\"> at length about rivers.")
        self.check("an answer begins", browser.wait(f"{ANSWER}.length > 0"))
        self.check("it ends", browser.wait(IDLE, 60))
        facts = browser.js(FACTS)
        expected = r"\d+ tokens · \d+\.\d tok/s · first token \d+\.\d\d s"
        self.check("tokens, speed and time to the first are told", bool(re.fullmatch(expected, facts)), facts)
        self.check("a cut answer says so", "limit of tokens" in browser.js(NOTE), browser.js(NOTE))
        made = browser.js("document.querySelectorAll('#log img').length === 0 && document.title !== 'bad'")
        self.check("text never becomes markup", made)
        body = browser.bodies()[-1]
        asked = body["stream"] is True and body["max_tokens"] == 24 and "temperature" not in body and "seed" not in body
        self.check("only what was set is sent", asked, body)

    def samples(self) -> None:
        browser = self.browser
        self.fill("temperature", "0.3")
        self.fill("seed", "11")
        self.fill("system-prompt", "Be brief.")
        self.check("the slider follows", browser.js("document.querySelector('#temperature-slider').value") == "0.3")
        self.ask("And about wheels?")
        self.check("a second answer ends", browser.wait(BUSY) and browser.wait(IDLE, 60))
        body = browser.bodies()[-1]
        roles = [message["role"] for message in body["messages"]]
        self.check("a changed temperature is sent", body.get("temperature") == 0.3 and body.get("seed") == 11, body)
        self.check("the conversation is sent", roles == ["system", "user", "assistant", "user"], roles)
        count = len(browser.bodies())
        self.fill("temperature", "7")
        self.ask("This must not be sent.")
        time.sleep(0.3)
        told = browser.js("document.querySelector('#message-error').textContent")
        refused = len(browser.bodies()) == count and "from 0 to 2" in told
        self.check("a temperature of 7 is refused in words", refused, told)
        self.check("and has the focus", browser.js("document.activeElement.id") == "temperature")
        for field in ("temperature", "seed", "system-prompt", "message"):
            self.fill(field, "")

    def stops(self) -> None:
        browser = self.browser
        self.fill("max-tokens", "")
        for name, act in (("Escape", lambda: browser.press("Escape")), ("the button", lambda: browser.click("#stop"))):
            self.ask(LONG_QUESTION)
            self.check(f"a long answer runs, for {name}", browser.wait(f"{BUSY} && {ANSWER}.length > 20", 30))
            first = browser.js(f"{ANSWER}.length")
            self.check(f"it grows, for {name}", browser.wait(f"{BUSY} && {ANSWER}.length > {first}"))
            seen = "/[1-9]\\d* running/.test(document.querySelector('#live').innerText)"
            self.check(f"the load is seen, for {name}", browser.wait(f"{BUSY} && {seen}", 5))
            browser.shoot(self.folder / "streaming.png")
            start = time.monotonic()
            act()
            self.check(f"{name} stops it", browser.wait(IDLE, 2))
            while (running := browser.js(RUNNING)) and time.monotonic() - start < 2:
                time.sleep(0.02)
            self.check(f"the server is free at once, after {name}", running == 0, f"{running} running after 2 s")
            kept = browser.js(f"{ANSWER}.length > 20") and "Stopped" in browser.js(NOTE)
            self.check(f"what was written stays, after {name}", kept)
        self.fill("max-tokens", "40")

    def changes(self) -> None:
        browser = self.browser
        turns = browser.js("document.querySelectorAll('.turn').length")
        browser.click("[aria-label='Generate the answer again']")
        again = browser.wait(BUSY) and browser.wait(IDLE, 60)
        self.check(
            "an answer is made again", again and browser.bodies()[-1]["messages"][-1]["content"] == LONG_QUESTION
        )
        browser.click("[aria-label='Edit your last message']")
        self.check("a message can be edited", browser.js("document.querySelector('#message').value") == LONG_QUESTION)
        self.fill("message", "What is a wheel?")
        browser.press("Enter")
        edited = browser.wait(BUSY) and browser.wait(IDLE, 60)
        body = browser.bodies()[-1]
        sent = body["messages"][-1]["content"] == "What is a wheel?"
        same = browser.js("document.querySelectorAll('.turn').length") == turns
        texts = [message["content"] for message in body["messages"]]
        self.check("and replaces the last one", edited and sent and same and texts.count(LONG_QUESTION) == 1)
        browser.js("document.execCommand = () => { window.copied = document.activeElement.value; return true; }")
        browser.js(
            "Object.defineProperty(navigator, 'clipboard', {value: {writeText: (text) => { window.copied = text; }}})"
        )
        browser.click("[aria-label='Copy the answer']")
        self.check("an answer is copied", browser.wait("window.copied?.length > 0", 2))

    def remembers(self) -> None:
        browser = self.browser
        turns = browser.js("document.querySelectorAll('.turn').length")
        browser.open(self.url)
        kept = browser.wait(f"document.querySelectorAll('.turn').length === {turns}", 3)
        self.check("a reload keeps the conversation", kept)
        away = browser.js("localStorage.length === 0 && document.cookie === ''")
        self.check("nothing is kept beyond the tab", away)

    def keyboard(self) -> None:
        browser = self.browser
        browser.click("#new-chat")
        self.check("a new chat is empty", browser.js("document.querySelectorAll('.turn').length") == 0)
        browser.type("one")
        browser.press("Enter", SHIFT)
        browser.type("two")
        self.check("Shift+Enter starts a line", browser.js("document.querySelector('#message').value") == "one\ntwo")
        browser.press("Enter")
        self.check("Enter sends", browser.wait(BUSY) and browser.wait(IDLE, 60))
        self.check("the focus stays", browser.js("document.activeElement.id") == "message")
        browser.js("document.activeElement.blur(); document.body.tabIndex = -1; document.body.focus()")
        order, faint = [], []
        for _ in range(30):
            browser.press("Tab")
            name = browser.js("document.activeElement.id || document.activeElement.ariaLabel || ''")
            if not name or name in order:
                break
            order.append(name)
            shown = browser.js(
                "getComputedStyle(document.activeElement).outlineStyle !== 'none' ||"
                "getComputedStyle(document.querySelector('#composer')).boxShadow !== 'none'"
            )
            if not shown:
                faint.append(name)
        wanted = [
            "new-chat",
            "open-settings",
            "log",
            "Copy the answer",
            "message",
            "send",
            "system-prompt",
            "temperature",
        ]
        places = [order.index(name) if name in order else -1 for name in wanted]
        self.check("Tab reaches everything in order", places == sorted(places) and places[0] >= 0, order)
        self.check("the focus is seen everywhere", not faint, faint)

    def modules(self) -> None:
        browser = self.browser
        for name, script in (
            ("Markdown is the same however it is cut", MARKDOWN_CHECK),
            ("events are read", EVENTS_CHECK),
        ):
            told = browser.js(script)
            self.check(name, told == "", told)
        for kind in ("prose", "code", "line"):
            told = browser.js(LONG_CHECK.replace("KIND", json.dumps(kind)))
            self.check(f"ten times as much {kind} costs about ten times as much", told == "", told)

    def looks(self) -> None:
        browser = self.browser
        light = browser.js("getComputedStyle(document.body).backgroundColor")
        browser.shoot(self.folder / "light.png")
        browser.media("dark")
        dark = browser.js("getComputedStyle(document.body).backgroundColor")
        browser.shoot(self.folder / "dark.png")
        self.check("light and dark differ", light != dark)
        browser.media("light", "reduce")
        self.ask("Once more.")
        moving = browser.wait(BUSY) and browser.js(
            "getComputedStyle(document.querySelector('#composer'), '::before').animationName"
        )
        self.check("nothing moves where motion is unwanted", moving == "none", moving)
        browser.wait(IDLE, 60)
        browser.media("light")
        for width, height in (PHONE, SMALLEST):
            browser.size(width, height)
            browser.wait("document.body.dataset.settings === 'closed'", 3)
            self.check(f"{width} pixels are wide enough", browser.js(FITS))
            browser.click("#open-settings")
            self.check(
                f"settings open on {width} pixels", browser.js(f"{FITS} && document.querySelector('main').inert")
            )
            browser.shoot(self.folder / f"phone-{width}-settings.png")
            browser.press("Escape")
            back = browser.js("!document.querySelector('main').inert && document.activeElement.id === 'open-settings'")
            self.check(f"and close on {width} pixels", back)
            self.ask("On a phone?")
            self.check(f"an answer comes on {width} pixels", browser.wait(BUSY) and browser.wait(IDLE, 60))
            browser.shoot(self.folder / f"phone-{width}.png")
        browser.size(*DESKTOP)

    def asks_for_key(self, url: str, key: str) -> None:
        browser = self.browser
        browser.open(url)
        self.check("a key is asked for", browser.wait("!document.querySelector('#key-form').hidden", 5))
        browser.shoot(self.folder / "key.png")
        browser.js("document.querySelector('#key').focus()")
        browser.type("wrong")
        browser.press("Enter")
        refused = "document.querySelector('#key-error').textContent.includes('does not accept')"
        self.check("a wrong key is refused in words", browser.wait(refused, 5))
        self.ask("Without a key?")
        self.check("an answer without a key shows the server's words", browser.wait(f"{IDLE} && {NOTE}.length > 0", 5))
        self.fill("key", key)
        browser.press("Enter")
        answered = browser.wait(f"{ANSWER}.length > 0 && {IDLE}", 60)
        self.check("the right one is taken, and the answer comes", answered)
        kept = browser.js("sessionStorage.getItem('headrace.key') !== null && localStorage.length === 0")
        self.check("it is kept in the tab only", kept and browser.js("!document.cookie"))

    def finds_server_gone(self) -> None:
        self.ask("Is anyone there?")
        told = self.browser.wait(f"{IDLE} && {NOTE}.includes('cannot be reached')", 10)
        self.check("a server that is gone is told in words", told)
        self.browser.shoot(self.folder / "gone.png")

    def stays_home(self, hosts: set[str]) -> None:
        self.check("nothing is loaded from elsewhere", self.browser.hosts() <= hosts, self.browser.hosts())
        self.check("the console has no complaint", not self.browser.complaints(), self.browser.complaints())


def run(checks: Checks) -> None:
    steps: Sequence[Callable[[], None]] = (
        *(checks.opens, checks.streams, checks.samples, checks.stops, checks.changes, checks.remembers),
        *(checks.keyboard, checks.modules, checks.looks),
    )
    for step in steps:
        step()


@contextlib.contextmanager
def address(options: argparse.Namespace) -> Iterator[str]:
    """That of the server to look at, which is started if none is named."""
    if options.url:
        yield options.url
    else:
        with serving(options.model) as server:
            yield server.url


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("screenshots", type=Path, help="folder for the screenshots")
    parser.add_argument("--model", default="demo", help="what to serve")
    parser.add_argument("--url", help="a server that runs already, without a key")
    parser.add_argument("--url-with-key", help=f"and one whose key is {KEY}")
    options = parser.parse_args()
    program = find_browser()
    if program is None:
        print(f"no Chromium found: none of {', '.join(BROWSERS)} is on the PATH", file=sys.stderr)
        return 2
    options.screenshots.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(program, Path(profile))
        try:
            with address(options) as url:
                checks = Checks(browser, url.rstrip("/") + "/", options.screenshots)
                run(checks)
            hosts = {url.split("/")[2]}
            if options.url_with_key:
                checks.asks_for_key(options.url_with_key, KEY)
                hosts.add(options.url_with_key.split("/")[2])
            elif not options.url:
                with serving(options.model, "--api-key", KEY) as guarded:
                    checks.asks_for_key(guarded.url, KEY)
                    hosts.add(guarded.url.split("/")[2])
                checks.finds_server_gone()
            checks.stays_home(hosts)
        finally:
            browser.close()
    print(f"{len(checks.failed)} failed; screenshots in {options.screenshots}")
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
