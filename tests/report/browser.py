"""A headless Chromium for tests, steered through its debugging pipe: nothing but the browser itself is needed."""

import base64
import contextlib
import fcntl
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

CHROMIUM = next(
    (
        Path(path)
        for path in ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")
        if Path(path).exists()
    ),
    None,
)
KEYS = {
    "Tab": 9, "Enter": 13, "Escape": 27, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39,
    "ArrowDown": 40,
}  # fmt: skip


class Browser:
    """Headless Chromium steered through its debugging pipe, so that phone widths are emulated truly."""

    flags = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--remote-debugging-pipe",
    )
    start = (
        "import os, sys; read, write = map(int, sys.argv[1:3]); "
        "os.dup2(read, 3); os.dup2(write, 4); os.execv(sys.argv[3], sys.argv[3:])"
    )

    def __init__(self, profile):
        (read_in, write_in), (read_out, write_out) = os.pipe(), os.pipe()
        theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (read_in, write_out)]
        command = [sys.executable, "-c", self.start, *map(str, theirs), str(CHROMIUM), *self.flags]
        command += [f"--user-data-dir={profile}", "about:blank"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "stdin": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, pass_fds=theirs, **quiet)
        for fd in (*theirs, read_in, write_out):
            os.close(fd)
        self.to, self.back, self.rest, self.count, self.events = write_in, read_out, b"", 0, []
        os.set_blocking(self.back, False)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if hasattr(self, "session"):
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        return self.wait(lambda m: m.get("id") == self.count).get("result", {})

    def wait(self, wanted):
        while True:
            while b"\0" in self.rest:
                raw, self.rest = self.rest.split(b"\0", 1)
                message = json.loads(raw)
                assert "error" not in message, message
                if "method" in message:
                    self.events.append(message)
                if wanted(message):
                    return message
            try:
                self.rest += os.read(self.back, 1 << 20)
            except BlockingIOError:
                time.sleep(0.005)

    def open(self, path, width=1280, height=900, *, scheme="light"):
        phone = width < 600
        size = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        if not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.wait(lambda m: m.get("method") == "Page.loadEventFired")
        self.ask("Promise.all([...document.images].map((i) => i.decode().catch(() => 0))).then(() => 1)")

    def ask(self, expression):
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key):
        """Press a key as a person does; Enter needs its character to act on a button."""
        text = {"text": "\r"} if key == "Enter" else {}
        event = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **event, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def screenshot(self, path, *, full=True):
        data = self.call("Page.captureScreenshot", captureBeyondViewport=full, format="png")["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self):
        with contextlib.suppress(OSError, TimeoutError):
            self.call("Browser.close")
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.to)
        os.close(self.back)


def check_access(browser):
    """Demand that axe-core, which comes with the extra dev, finds no serious violation in the open page."""
    found = importlib.util.find_spec("axe_playwright_python")  # for its script alone
    if found is None:
        pytest.skip("axe_playwright_python, which brings axe-core, is not installed")
    browser.call("Page.setBypassCSP", enabled=True)
    browser.ask((Path(found.submodule_search_locations[0]) / "axe.min.js").read_text() + "; 1")
    said = browser.ask(
        "axe.run(document).then((r) => JSON.stringify(r.violations.map((v) => [v.id, v.impact, v.nodes[0].html])))"
    )
    browser.call("Page.setBypassCSP", enabled=False)
    assert [v for v in json.loads(said) if v[1] in ("serious", "critical")] == []
