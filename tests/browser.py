"""A headless Chromium, driven through its debugging protocol: open a page, run JavaScript in it, see what it asked for."""

import asyncio
import base64
import contextlib
import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

from tornado.websocket import websocket_connect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    def __init__(self, loop, socket):
        self._loop, self._socket, self._count, self.requested = loop, socket, 0, []

    def call(self, method: str, **params) -> dict:
        """Send a command and wait for its answer; requests that the page makes meanwhile go to `requested`."""
        self._count += 1
        text = json.dumps({"id": self._count, "method": method, "params": params})
        return self._loop.run_until_complete(asyncio.wait_for(self._answer(text), 60))

    async def _answer(self, text: str) -> dict:
        await self._socket.write_message(text)
        while True:
            told = json.loads(await self._socket.read_message())
            if told.get("method") == "Network.requestWillBeSent":
                self.requested.append(told["params"]["request"]["url"])
            if told.get("id") == self._count:
                assert "error" not in told, told
                return told["result"]

    def js(self, expression: str):
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, expression: str, seconds: float = 60):
        for _ in range(int(seconds / 0.1)):
            if value := self.js(expression):
                return value
            time.sleep(0.1)
        raise AssertionError(f"{expression} did not come about; the page shows: {self.js('document.body.innerText')}")

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextlib.contextmanager
def page(url: str, folder: Path):
    """A page of a browser with an empty profile in `folder`."""
    command = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--remote-debugging-port=0",
        "--window-size=900,700",
    ]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    child = subprocess.Popen([*command, f"--user-data-dir={folder}", "about:blank"], **quiet)
    loop = asyncio.new_event_loop()
    try:
        told = folder / "DevToolsActivePort"
        for _ in range(300):
            if told.exists() and told.read_text().count("\n"):
                break
            time.sleep(0.1)
        port = told.read_text().split()[0]
        targets = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json"))
        address = next(t["webSocketDebuggerUrl"] for t in targets if t["type"] == "page")

        async def connect():
            return await websocket_connect(address, max_message_size=1 << 26)

        made = Page(loop, loop.run_until_complete(connect()))
        for domain in ("Network", "Page", "Runtime"):
            made.call(f"{domain}.enable")
        made.call("Page.navigate", url=url)
        made.until("document.readyState == 'complete' && location.href != 'about:blank'")
        yield made
    finally:
        child.terminate()
        child.wait(20)
        loop.close()
