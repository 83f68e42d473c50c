"""A page in headless Chromium, which is spoken to over pipes in its DevTools protocol."""

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

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SWITCHES = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
SWITCHES += ["--no-first-run", "--disable-extensions", "--remote-debugging-pipe"]
PATIENCE = 60  # seconds that an answer may take


class Page:
    """One tab; events: what the browser told besides answers, with `method` and `params`."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = reading, writing
        self._rest, self._number, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, path: Path, width: int, scripts: bool = True) -> None:
        """Show a file as on a screen of this width."""
        size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._receive()

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def complaints(self) -> list[dict[str, Any]]:
        """Errors and messages of the console since the page was opened."""
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [event for event in self.events if event["method"] in kinds]

    def requests(self) -> list[str]:
        """Addresses that were asked for since the page was opened."""
        sent = (e["params"] for e in self.events if e["method"] == "Network.requestWillBeSent")
        return [event["request"]["url"] for event in sent]

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """Write a PNG of the screen, or of the whole page."""
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(picture["data"]))

    def pdf(self, path: Path) -> None:
        """Print the page on A4."""
        printed = self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)
        path.write_bytes(base64.b64decode(printed["data"]))

    def _receive(self) -> dict[str, Any]:
        """The next message; events are kept."""
        began = time.monotonic()
        while b"\0" not in self._rest:
            assert time.monotonic() < began + PATIENCE
            more = os.read(self._reading, 1 << 20)
            assert more, "the browser has ended"
            self._rest += more
        text, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A tab of a browser with a fresh profile, which knows no network."""
    assert CHROMIUM
    answers, out = os.pipe()
    commands, into = os.pipe()
    # The browser reads commands at descriptor 3 and answers at 4.
    script = f'exec "$@" 3<&{commands} 4>&{out}'
    words = [CHROMIUM, *SWITCHES, f"--user-data-dir={profile}", "--proxy-server=127.0.0.1:9"]
    with subprocess.Popen(
        ["bash", "-c", script, "bash", *words],
        pass_fds=(commands, out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        os.close(out)
        os.close(commands)
        try:
            yield Page(answers, into)
        finally:
            process.kill()
            os.close(answers)
            os.close(into)
