"""A headless Chromium, told what to do over its debugging pipe."""

import itertools
import json
import os
import pathlib
import shutil
import subprocess
import time
from typing import Any

PATH = shutil.which("chromium") or shutil.which("google-chrome")
_QUIET = ("background-networking", "component-update", "sync", "gpu", "quic", "default-apps", "extensions")


class Page:
    """One page. `requested` are the addresses that it has asked for."""

    def __init__(self, folder: pathlib.Path, url: str) -> None:
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        flags = ["--headless", "--no-sandbox", "--no-first-run", *[f"--disable-{name}" for name in _QUIET]]
        flags += [f"--user-data-dir={folder}", "--remote-debugging-pipe", "--window-size=1200,1400"]
        started = f'exec "$@" 3<&{to_read} 4>&{to_write}'  # the two numbers that it reads and writes
        self._process = subprocess.Popen(
            ["bash", "-c", started, "bash", str(PATH), *flags],
            pass_fds=(to_read, to_write),
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._numbers, self._left = itertools.count(1), b""
        self.requested: list[str] = []
        self.errors: list[str] = []
        self._session: dict[str, str] = {}
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Network", "Runtime", "Page", "Log"):
            self._call(f"{domain}.enable")
        self._call("Page.navigate", url=url)

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        asked = {"id": number, "method": method, "params": params, **self._session}
        os.write(self._write, json.dumps(asked).encode() + b"\0")
        while True:
            while b"\0" not in self._left:
                read = os.read(self._read, 2**20)
                assert read, "the browser has ended"
                self._left += read
            line, _, self._left = self._left.partition(b"\0")
            message = json.loads(line)
            match message.get("method"):
                case "Network.requestWillBeSent":
                    self.requested.append(message["params"]["request"]["url"])
                case "Runtime.exceptionThrown" | "Log.entryAdded":
                    self.errors.append(json.dumps(message["params"]))
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    def run(self, script: str) -> Any:
        """The value of an expression, awaited."""
        found = self._call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, script: str, seconds: float = 20.0) -> Any:
        """The expression's value, once it is true."""
        deadline = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, f"not so within {seconds} seconds: {script}"
            time.sleep(0.05)
        return value

    def picture(self, path: pathlib.Path) -> None:
        import base64

        found = self._call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)
