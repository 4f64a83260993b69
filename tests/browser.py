"""A headless Chromium, spoken to through its DevTools pipe (https://chromedevtools.github.io/devtools-protocol/)."""

import base64
import json
import os
import select
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import processes

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_chromium() -> str | None:
    """The program, named by the variable CHROMIUM or found by its usual names."""
    named = os.environ.get("CHROMIUM")
    return next((path for name in ([named] if named else NAMES) if (path := shutil.which(name))), None)


class Browser:
    """One tab of a fresh profile, without network.

    Attributes:
        requests: every URL that the tab has asked for.
        complaints: what the page said to the console, exceptions included, and what the browser had to say about it.
    """

    def __init__(self, program: str, timeout: float = 60) -> None:
        self.timeout = timeout
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._events: list[dict[str, Any]] = []
        self._buffer, self._number, self._session = b"", 0, None
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        command_end, self._write = os.pipe()
        self._read, answer_end = os.pipe()
        options = ["--headless", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        options += ["--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking"]
        options += [f"--user-data-dir={self._profile.name}", "--host-resolver-rules=MAP * ~NOTFOUND"]

        # Chromium reads its commands from descriptor 3 and answers on 4, whatever numbers the pipes have here.
        shell = f'exec 3<&{command_end} 4>&{answer_end}; exec "$@"'
        self._program = processes.Program(
            ["bash", "-c", shell, "bash", program, *options], pass_fds=(command_end, answer_end)
        )
        os.close(command_end)
        os.close(answer_end)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._write)  # the end of its commands is the end of the browser
        self._program.end(timeout=10)
        os.close(self._read)
        self._profile.cleanup()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and waits for its result.

        Raises:
            RuntimeError: if the browser refuses it, or has ended.
            TimeoutError: if no answer comes.
        """
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        answer = self._wait_for(lambda received: received.get("id") == self._number, method)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def open(self, page: Path, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Show a file, and waits until all of it has loaded."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self._events.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        if not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._wait_for(lambda received: received.get("method") == "Page.loadEventFired", "loading the page")

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{script}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def screenshot(self, path: Path) -> Path:
        """The whole page, not only what fits the window."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))
        return path

    def _wait_for(self, is_it: Any, what: str) -> dict[str, Any]:
        deadline = time.monotonic() + self.timeout
        while True:
            received = self._next(deadline, what)
            if "method" in received:
                self._note(received)
            if is_it(received):
                return received

    def _next(self, deadline: float, what: str) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], max(deadline - time.monotonic(), 0))[0]:
                raise TimeoutError(f"no answer from the browser: {what}")
            data = os.read(self._read, 1 << 20)
            if not data:
                raise RuntimeError(f"the browser has ended: {what}")
            self._buffer += data
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        self._events.append(event)
        method, params = event["method"], event["params"]
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(f"console.{params['type']}: {[arg.get('value') for arg in params['args']]}")
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(f"exception: {params['exceptionDetails']['text']}")
        elif method == "Log.entryAdded":
            self.complaints.append(f"{params['entry']['level']}: {params['entry']['text']}")
