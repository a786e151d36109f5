"""Chromium without a window, told what to do through a pipe, for tests that measure a page as it is drawn."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --remote-debugging-pipe"
).split()
PATIENCE = 60.0


class Browser:
    """One page at a time; what `evaluate` returns is read from the drawn page, whatever the page itself forbids."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        ours, theirs = os.pipe(), os.pipe()
        self._write, self._read = ours[1], theirs[0]
        # the browser reads from 3 and writes to 4; copies above both, so that neither is overwritten by the other
        source, sink = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (ours[0], theirs[1]))

        def wire() -> None:
            os.dup2(source, 3)
            os.dup2(sink, 4)

        self._process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={profile}"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=wire, pass_fds=(3, 4),
        )  # fmt: skip
        for end in (ours[0], theirs[1], source, sink):
            os.close(end)
        self._number, self._rest, self._session = 0, b"", None
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._call("Page.enable")

    def close(self) -> None:
        self._session = None
        self._call("Browser.close")
        self._process.wait(timeout=PATIENCE)
        os.close(self._write)
        os.close(self._read)

    def open(self, page: Path, *, width: int = 1280, scheme: str = "light") -> None:
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._call("Page.navigate", url=page.as_uri())
        self._wait(lambda message: message.get("method") == "Page.loadEventFired")

    def evaluate(self, expression: str) -> Any:
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        answer = self._wait(lambda found: found.get("id") == self._number)
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def _wait(self, wanted) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while True:
            *whole, self._rest = self._rest.split(b"\0")
            for place, message in enumerate(map(json.loads, whole)):
                if wanted(message):
                    self._rest = b"".join(part + b"\0" for part in whole[place + 1 :]) + self._rest
                    return message
            assert select.select([self._read], [], [], max(end - time.monotonic(), 0))[0], "the browser says nothing"
            found = os.read(self._read, 1 << 20)
            assert found, "the browser has gone"
            self._rest += found
