"""A headless Chromium for tests of pages, driven by its DevTools protocol through two pipes."""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
# In CI a test without a browser fails.
IS_DISPENSABLE = BROWSER is None and os.environ.get("FARSPAN_CI") != "1"
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --hide-scrollbars "
    "--disable-dev-shm-usage --remote-debugging-pipe"
)
# Far more than a page takes on a busy machine.
PATIENCE_S = 90
# What a page says without anything being wrong.
HARMLESS = ("setting log level to", "document idle at")


class PageError(AssertionError):
    """What a script of the page, or of a test, has thrown."""


class Browser:
    """One page; `messages` are those of its console that are not harmless, and what was thrown."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self.messages: list[str] = []
        self._to, self._from = to_browser, from_browser
        self._rest = b""
        self._number = 0
        self._session: dict[str, str] = {}
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime"):
            self._call(f"{domain}.enable")

    def open(self, address: str, width: int = 1440, height: int = 900, dark: bool = False) -> None:
        """Load a page, as wide as a screen; below 600 pixels that of a phone, with touch."""
        self.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self._call("Page.navigate", url=address)
        self.wait_for(f"location.href.startsWith({json.dumps(address[:40])})")
        self.wait_for("document.readyState == 'complete'")

    def resize(self, width: int, height: int) -> None:
        is_phone = width < 600
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=is_phone,
        )
        self._call("Emulation.setTouchEmulationEnabled", enabled=is_phone)

    def js(self, expression: str) -> Any:
        """The value of an expression, as JSON would hold it."""
        answer = self._call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise PageError(f"{expression}: {_thrown(answer['exceptionDetails'])}")
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """The first value of an expression that is true."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            if value := self.js(expression):
                return value
            time.sleep(0.02)
        raise PageError(f"{expression} has not become true; the page says {self.messages}")

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Press the mouse at one place of the window and release it at another."""
        middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
        self._mouse("mouseMoved", start)
        self._mouse("mousePressed", start)
        for place in (middle, end):
            self._mouse("mouseMoved", place)
        self._mouse("mouseReleased", end)

    def click(self, place: tuple[float, float], times: int = 1) -> None:
        self._mouse("mouseMoved", place)
        for count in range(1, times + 1):
            self._mouse("mousePressed", place, count)
            self._mouse("mouseReleased", place, count)

    def choose(self, selector: str, value: str) -> None:
        """Set a control to a value, as a person does."""
        self.js(
            f"""(() => {{
              const control = document.querySelector({json.dumps(selector)})
              control.value = {json.dumps(value)}
              for (const event of ["input", "change"]) control.dispatchEvent(new Event(event))
            }})()"""
        )

    def move(self, place: tuple[float, float]) -> None:
        self._mouse("mouseMoved", place)

    def screenshot(self, path: Path) -> None:
        """A PNG of what the window shows."""
        shot = self._call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(shot["data"]))

    def _mouse(self, kind: str, place: tuple[float, float], count: int = 1) -> None:
        is_held = kind != "mouseMoved"
        self._call(
            "Input.dispatchMouseEvent",
            type=kind,
            x=place[0],
            y=place[1],
            button="left" if is_held else "none",
            clickCount=count if is_held else 0,
        )

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": arguments, **self._session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise PageError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self._note(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._from, 1 << 20)
            if not more:
                raise PageError("the browser has ended")
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        if event.get("method") == "Runtime.exceptionThrown":
            self.messages.append(_thrown(event["params"]["exceptionDetails"]))
        elif event.get("method") == "Runtime.consoleAPICalled":
            told = " ".join(str(it.get("value", "")) for it in event["params"]["args"])
            if not any(harmless in told for harmless in HARMLESS):
                self.messages.append(told)


def _thrown(details: dict[str, Any]) -> str:
    return details.get("exception", {}).get("description") or details["text"]


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser of its own, which ends with the block."""
    assert BROWSER is not None
    # It reads from descriptor 3 and writes to 4.
    read_there, write_here = os.pipe()
    read_here, write_there = os.pipe()
    command = (
        f"exec {BROWSER} {OPTIONS} --user-data-dir='{profile}' 3<&{read_there} 4>&{write_there}"
    )
    process = subprocess.Popen(
        ["bash", "-c", command],
        pass_fds=(read_there, write_there),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    os.close(read_there)
    os.close(write_there)
    try:
        yield Browser(write_here, read_here)
    finally:
        process.terminate()
        process.wait()
        os.close(write_here)
        os.close(read_here)
