"""The page of `edgesafe serve` in headless Chromium, used as a person would: drop, type, slide, ask, stop; then a screenshot.

`make shot` runs it. It needs Chromium (Debian: `apt-get install chromium`), which is driven over its debugging pipe. A copy of
the bundle is measured first, so that the page shows this machine's times. It fails where the page asks anything of another
address, logs an error, misses the budget each time, or doesn't show the answer, its exit, its times and its verdict. A picture
of the documents is recorded in `tests/study/figures/made.json`, which `make check` holds it to.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import edgesafe
from study.figures import FIGURES, PICTURES, stamp

SAMPLES = Path(edgesafe.__file__).parent / "reference" / "samples"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 1080, 720
WAIT_S = 300.0
# The first request on a cold machine, or one beside other work, may miss its budget; the picture shows one that did not.
ASKS = 5
# How many pieces the answer was made of: each one is a text node that was added.
WATCH = """
window.pieces = 0;
const count = (records) => { for (const record of records) pieces += record.addedNodes.length; };
new MutationObserver(count).observe(document.querySelector("#answer"), {childList: true});
1
"""


class Browser:
    """One page of a headless Chromium, by its debugging protocol: JSON messages that end with a zero byte."""

    def __init__(self, profile: str) -> None:
        program = next(filter(None, map(shutil.which, BROWSERS)), None)
        if program is None:
            sys.exit("no Chromium here: apt-get install chromium")
        (read_in, self._out), (self._in, write_out) = os.pipe(), os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        # The browser listens on 3 and speaks on 4.
        shell = f'exec "$@" 3<&{read_in} 4>&{write_out}'
        words = ["sh", "-c", shell, "sh", program, *flags, "--no-first-run", "--hide-scrollbars", "about:blank"]
        self.process = subprocess.Popen(words, pass_fds=(read_in, write_out), stderr=subprocess.DEVNULL)
        os.close(read_in)
        os.close(write_out)
        self.events: list[dict[str, Any]] = []
        self._rest, self._number, self._page = b"", 0, ""
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(t["targetId"] for t in targets if t["type"] == "page")
        self._page = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for what it returns; events that come meanwhile are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **({"sessionId": self._page} if self._page else {})}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._read()
            if reply.get("id") == self._number:
                if "error" in reply:
                    sys.exit(f"{method}: {reply['error']['message']}")
                return dict(reply["result"])
            self.events.append(reply)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._in, 1 << 16)
            if not more:
                sys.exit("Chromium ended")
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))

    def js(self, code: str) -> Any:
        """An expression's value; a promise is awaited."""
        done = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in done:
            sys.exit(f"{code}: {done['exceptionDetails']}")
        return done["result"].get("value")

    def until(self, condition: str) -> None:
        """Wait for something to be so; the page looks at it ten times a second."""
        wait = "await new Promise((r) => setTimeout(r, 100));"
        loop = f"for (let i = 0; i < {int(WAIT_S * 10)}; i++) {{ if ({condition}) return true; {wait} }}"
        if not self.js(f"(async () => {{ {loop} return false; }})()"):
            sys.exit(f"after {WAIT_S:g} s it is not so: {condition}; the page says {self.js('document.body.innerText')!r}")

    def place(self, selector: str, across: float = 0.5) -> dict[str, float]:
        """The middle of an element, or another place across it."""
        found = f"document.querySelector('{selector}').getBoundingClientRect()"
        box = self.js(f"[{found}].map((b) => [b.x, b.y, b.width, b.height])[0]")
        return {"x": box[0] + across * box[2], "y": box[1] + box[3] / 2}

    def click(self, selector: str, across: float = 0.5) -> None:
        """Press and release the left button there."""
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **self.place(selector, across))

    def drop(self, selector: str, file: Path) -> None:
        """Drop a file there, as from a file manager."""
        data = {"items": [], "files": [str(file.resolve())], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, data=data, **self.place(selector))


def use(browser: Browser, url: str, picture: Path, prompt: str) -> bytes:
    """Use the page; returns the screenshot's PNG."""
    browser.call("Emulation.setDeviceMetricsOverride", width=WIDTH, height=HEIGHT, deviceScaleFactor=1.5, mobile=False)
    browser.call("Page.navigate", url=url)
    browser.until("document.querySelectorAll('#ladder li').length > 0")
    browser.drop("#drop", picture)
    browser.until("document.querySelector('#drop img')?.complete")
    browser.click("#prompt")
    browser.call("Input.insertText", text=prompt)
    browser.click("#limit")
    expected = []
    for across in (0.02, 0.98):  # the slider moves what is expected: nothing fits on the left, the deepest on the right
        browser.click("#budget", across)
        expected.append(browser.js("document.querySelector('#legend').textContent"))
    assert "no certified exit" in expected[0] and "is expected" in expected[1], expected
    for _ in range(ASKS):
        ask(browser)
        if not browser.js("document.querySelectorAll('#facts .bad').length"):
            break
    else:
        sys.exit(f"{ASKS} requests in turn missed the budget or were not certified")
    shot = base64.b64decode(browser.call("Page.captureScreenshot", format="png")["data"])
    browser.click("#budget", 0.02)
    browser.click("#ask")
    browser.until("document.querySelector('#answer').className === 'error'")
    assert "no certified exit fits" in browser.js("document.querySelector('#answer').textContent")
    return shot


def ask(browser: Browser) -> None:
    """Press Ask and wait for the whole answer, which has to come in pieces and with all its facts."""
    browser.js(WATCH)
    browser.click("#ask")
    browser.until("document.querySelector('#facts dd') || document.querySelector('#answer').className")
    shown = browser.js("document.querySelector('#facts').innerText")
    answer = browser.js("document.querySelector('#answer').textContent")
    assert answer and not browser.js("document.querySelector('#answer').className"), answer
    assert all(word in shown for word in ("exit", "certified", "first token", "harmful answers")), shown
    assert browser.js("document.querySelectorAll('#ladder li.used').length") == 1
    pieces = browser.js("pieces")
    assert pieces > 1, "the answer came in one piece"
    print(f"answer: {answer}\n{shown}\nin {pieces} pieces", file=sys.stderr)


def complaints(browser: Browser, url: str) -> list[str]:
    """Requests to anywhere else, and errors that the page logged; a refused budget is the one answer that is no 200."""
    wrong = []
    for event in browser.events:
        method, params = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent" and not params["request"]["url"].startswith((url, "blob:", "data:", "about:")):
            wrong.append(f"asked {params['request']['url']}")
        if method == "Runtime.exceptionThrown":
            wrong.append(str(params["exceptionDetails"]))
        if method == "Log.entryAdded" and params["entry"]["level"] == "error" and "422" not in params["entry"]["text"]:
            wrong.append(params["entry"]["text"])
    return wrong


def look(url: str, picture: Path, prompt: str) -> bytes:
    """Use the page in a browser of its own; returns the screenshot's PNG."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(profile)
        try:
            shot = use(browser, url, picture, prompt)
            wrong = complaints(browser, url)
        finally:
            browser.process.kill()
            browser.process.wait()
    if wrong:
        sys.exit("\n".join(wrong))
    return shot


def main() -> int:
    """Measure a copy, serve it, use the page, look at what it did, write the screenshot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--picture", type=Path, default=SAMPLES / "006-name.png")
    parser.add_argument("--prompt", default="What do you call the object? It is for a friend.")
    parser.add_argument("--out", type=Path, default=FIGURES / "serve.png", help="the screenshot, PNG (default: the documents')")
    options = parser.parse_args()
    begin = time.perf_counter()
    edgesafe_command = [sys.executable, "-m", "edgesafe"]
    with tempfile.TemporaryDirectory() as folder:
        bundle = shutil.copytree(options.bundle, Path(folder) / options.bundle.name)
        subprocess.run([*edgesafe_command, "measure", str(bundle)], check=True, stdout=subprocess.DEVNULL)
        server = subprocess.Popen([*edgesafe_command, "serve", str(bundle), "--port", "0"], stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            shot = look(server.stdout.readline().split()[0], options.picture, options.prompt)
        finally:
            server.kill()
            server.wait()
    options.out.write_bytes(shot)
    if options.out.resolve().parent == FIGURES and options.out.name in PICTURES:
        stamp(options.out.name)
    print(f"{options.out}: {len(shot)} bytes, in {time.perf_counter() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
