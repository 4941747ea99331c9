"""Chromium without a window, driven over a pipe by the DevTools protocol: no package, no port."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--hide-scrollbars"]


class Browser:
    """One tab.

    Attributes:
        console: what the page wrote to its console, and its errors.
        asked: addresses that it asked for.
    """

    def __init__(self, profile: Path):
        into, outof = os.pipe(), os.pipe()
        command = f'exec 3<&{into[0]} 4>&{outof[1]}; exec "$@"'
        arguments = [str(CHROMIUM), *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(
            ["bash", "-c", command, "bash", *arguments], pass_fds=(into[0], outof[1]), stderr=subprocess.DEVNULL
        )
        os.close(into[0])
        os.close(outof[1])
        self.write, self.read = os.fdopen(into[1], "wb", buffering=0), os.fdopen(outof[0], "rb")
        self.numbers, self.session, self.held = itertools.count(1), "", b""
        self.console, self.asked = list[str](), list[str]()
        (page,) = (one for one in self("Target.getTargets")["targetInfos"] if one["type"] == "page")
        self.session = self("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        self.write.write(json.dumps(message).encode() + b"\0")
        while True:
            found = self.next_message()
            if found.get("id") == number:
                assert "error" not in found, (method, found["error"])
                return found["result"]

    def next_message(self) -> dict[str, Any]:
        while b"\0" not in self.held:
            part = os.read(self.read.fileno(), 1 << 16)
            assert part, "Chromium ended"
            self.held += part
        first, _, self.held = self.held.partition(b"\0")
        message = json.loads(first)
        kind, params = message.get("method"), message.get("params", {})
        if kind == "Runtime.consoleAPICalled":
            self.console.append(str([one.get("value") for one in params["args"]]))
        elif kind == "Runtime.exceptionThrown":
            self.console.append(str(params["exceptionDetails"].get("exception", params["exceptionDetails"])))
        elif kind == "Log.entryAdded":
            self.console.append(params["entry"]["text"])
        elif kind == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])
        return message

    def see(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        done = self("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def until(self, expression: str, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not self.see(f"!!({expression})"):
            assert time.monotonic() < end, (expression, self.console, self.see("document.body.innerText")[:2000])

    def open(self, url: str, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        self.size(width, height, dark)
        self("Page.navigate", url=url)
        self.until(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def size(self, width: int, height: int, dark: bool = False) -> None:
        phone = width < 600
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])

    def point(self, selector: str, press: bool = False) -> None:
        """Move the pointer onto an element, and press there."""
        self.see(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
        box = self.see(f"document.querySelector({json.dumps(selector)}).getClientRects()[0].toJSON()")
        at = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        for kind in ["mouseMoved", *(["mousePressed", "mouseReleased"] if press else [])]:
            self("Input.dispatchMouseEvent", type=kind, x=at[0], y=at[1], button="left", clickCount=1)

    def press(self, key: str, text: str = "", modifiers: int = 0) -> None:
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self("Input.dispatchKeyEvent", type=kind, key=key, modifiers=modifiers, **more)

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.write.close()
        self.read.close()
