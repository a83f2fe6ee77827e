"""A headless Chromium for tests of pages, told what to do over a pipe (Chrome DevTools Protocol)."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

SECONDS = 60.0  # until the browser must have answered
COMMANDS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe")


class Browser:
    """One tab.

    Attributes:
        complaints: what the console said, exceptions, and what the page's policy refused.
        requests: addresses that were asked for, without data: URLs.
    """

    def __init__(self, folder: Path) -> None:
        command = next((found for name in COMMANDS if (found := shutil.which(name))), None)
        if command is None:
            pytest.skip("there is no Chromium (Debian: apt-get install chromium)")
        to_browser, self.write = os.pipe()
        self.read, from_browser = os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_browser, from_browser)]
        # Chromium reads commands from file 3 and writes answers to file 4.
        start = f"import os, sys; os.dup2({ends[0]}, 3); os.dup2({ends[1]}, 4); os.execv(sys.argv[1], sys.argv[1:])"
        self.process = subprocess.Popen(
            [sys.executable, "-c", start, command, *FLAGS, f"--user-data-dir={folder}", "about:blank"],
            pass_fds=ends,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (to_browser, from_browser, *ends):
            os.close(end)
        self.pending, self.number, self.session = b"", 0, ""
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.loaded = False
        targets = self.call("Target.getTargets")["targetInfos"]
        tab = next(target["targetId"] for target in targets if target["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command's result; what the browser reports meanwhile is noted."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def receive(self) -> dict[str, Any]:
        """The next message."""
        while b"\0" not in self.pending:
            ready, _, _ = select.select([self.read], [], [], SECONDS)
            assert ready, "the browser does not answer"
            content = os.read(self.read, 1 << 20)
            assert content, "the browser has ended"
            self.pending += content
        line, _, self.pending = self.pending.partition(b"\0")
        message = json.loads(line)
        self.note(message)
        return message

    def note(self, message: dict[str, Any]) -> None:
        """Keeps what an event says."""
        method, params = message.get("method"), message.get("params", {})
        if method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.complaints.append(json.dumps(params))
        if method == "Network.requestWillBeSent" and not params["request"]["url"].startswith("data:"):
            self.requests.append(params["request"]["url"])
        self.loaded |= method == "Page.loadEventFired"

    def open(self, page: Path, *, width: int, dark: bool) -> None:
        """Shows a page in a window of a width in pixels, and waits until it is loaded."""
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.complaints, self.requests, self.loaded = [], [], False
        self.call("Page.navigate", url=page.resolve().as_uri())
        deadline = time.monotonic() + SECONDS
        while not self.loaded and time.monotonic() < deadline:
            self.receive()

    def ask(self, expression: str) -> Any:
        """The value of JavaScript in the page, which its policy does not bind."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def press(self, key: str) -> None:
        """Presses a key, such as Tab."""
        code, typed = {"Tab": (9, ""), "Enter": (13, "\r")}[key]
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, text=typed, windowsVirtualKeyCode=code)

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        path.write_bytes(base64.b64decode(found["data"]))

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(SECONDS)
        os.close(self.read)
        os.close(self.write)


def check_page(browser: Browser, page: Path) -> None:
    """What holds of every page: in a wide and a narrow window, light and dark, nothing is wrong or too wide."""
    for width, dark in ((1280, False), (390, False), (390, True)):
        browser.open(page, width=width, dark=dark)
        assert browser.complaints == [] and browser.requests == [page.resolve().as_uri()]
        assert browser.ask("[...document.images].every(i => i.complete && i.naturalWidth > 0 && i.alt)")
        assert browser.ask("document.documentElement.scrollWidth <= innerWidth"), f"too wide for {width} pixels"
        back, front = (browser.ask(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color"))
        assert (lightness(back) < lightness(front)) == dark
        assert abs(lightness(back) - lightness(front)) > 150
        broken = "[...document.querySelectorAll('a')].filter(a => !document.getElementById(a.hash.slice(1))).length"
        assert browser.ask(broken) == 0
        # What scrolls sideways or opens can be reached by keyboard.
        assert browser.ask("[...document.querySelectorAll('.scroll')].every(e => e.tabIndex === 0)")


def lightness(color: str) -> float:
    """The mean of a color ``rgb(r, g, b)``."""
    return sum(map(int, color.removeprefix("rgb(").removesuffix(")").split(","))) / 3
