"""Talk to a model: replies as they are made, in the terminal or on a page that this machine serves to itself."""

import itertools
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from ultramed.core.errors import ConfigError, UserError
from ultramed.core.store import Artifact
from ultramed.lm import models
from ultramed.lm.architecture import context_length

PAGE = Path(__file__).with_name("chat.html")
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
LONGEST = 1 << 20  # bytes of a request


class Talker:
    """A model and how it replies; temperature 0 is greedy. One reply is made at a time."""

    def __init__(self, model: Artifact, max_new_tokens: int = 200, temperature: float = 0.0):
        self.name = f"{models.card(model)['name']} ({model.stage}/{model.key})"
        self.tokenizer, self.net = models.load_tokenizer(model), models.load(model)
        self.one_turn = models.give_template(self.tokenizer, models.template_of(model))  # the instruction formats have one
        self.net.generation_config.eos_token_id = models.generation(model, self.tokenizer).eos_token_id
        if not self.tokenizer.chat_template:
            raise ConfigError(f"{self.name} has no chat template: it completes texts and holds no conversations")
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self._busy = threading.Lock()

    def _ids(self, turns: list[dict]) -> torch.Tensor:
        """Token ids (1, T) of the conversation; its oldest turns are left out if it has grown too long for the model."""
        room = context_length(self.net) - self.max_new_tokens
        turns = turns[-1:] if self.one_turn else turns
        while True:
            ids = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
            if ids["input_ids"].shape[1] <= room:
                return ids["input_ids"]
            if len(turns) == 1:
                raise ConfigError(f"this message has {ids['input_ids'].shape[1]} tokens, and there is room for {room}")
            turns = turns[2:]

    def reply(self, turns: list[dict]) -> Iterator[str]:
        """Pieces of the answer to a conversation of {'role', 'content'} that ends with the user's turn.

        Closing the iterator stops the model after the token at hand.
        """
        from transformers import StoppingCriteriaList, TextIteratorStreamer

        ids, stop = self._ids(turns).to(self.net.device), threading.Event()
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        how = {"do_sample": True, "temperature": self.temperature, "top_p": 0.9} if self.temperature else {"do_sample": False}
        failed: list[BaseException] = []

        def stopped(ids, scores, **_):
            return torch.full((1,), stop.is_set(), device=ids.device)

        def work():
            try:
                with self._busy:
                    self.net.generate(
                        input_ids=ids,
                        attention_mask=torch.ones_like(ids),
                        max_new_tokens=self.max_new_tokens,
                        streamer=streamer,
                        pad_token_id=self.tokenizer.pad_token_id,
                        **how,
                        stopping_criteria=StoppingCriteriaList([stopped]),
                    )
            except BaseException as err:
                failed.append(err)
                streamer.end()

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            yield from filter(None, streamer)
        finally:
            stop.set()
            worker.join()
        if failed:
            raise failed[0]


def _turns(data: bytes) -> list[dict]:
    """The conversation in a request. Raises ValueError if it is none."""
    turns = json.loads(data)["turns"]
    roles = [t["role"] for t in turns]
    if not turns or roles != ["user" if i % 2 == 0 else "assistant" for i in range(len(turns))] or len(turns) % 2 == 0:
        raise ValueError(f"wanted turns of user and assistant, from the user's to the user's; got {roles}")
    if not all(isinstance(t["content"], str) and t["content"].strip() for t in turns):
        raise ValueError("every turn needs a text")
    return [{"role": t["role"], "content": t["content"]} for t in turns]


class Page(ThreadingHTTPServer):
    """The server of `server`; `talker` is set before `serve_forever`."""

    talker: Talker
    daemon_threads = True

    def handle_error(self, request, client_address):
        """A reader who has gone is no error worth a traceback."""


def server(port: int = 0) -> Page:
    """A web server for this machine alone: GET / is the page, POST /reply streams the answer to {'turns': [...]}.

    It listens on the loopback address and refuses what names another host or does not come as JSON, so that pages of
    other sites cannot talk to it. Raises ConfigError if the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "ultramed", ""

        def _answer(self, status: int, text: bytes, kind: str = "text/plain; charset=utf-8") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(text)))
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Content-Security-Policy", POLICY)
            self.end_headers()
            self.wfile.write(text)

        def _foreign(self) -> bool:
            host = self.headers.get("Host", "").partition(":")[0]
            if host not in ("localhost", "127.0.0.1"):
                self._answer(403, b"this page is for this machine only")
                return True
            return False

        def do_GET(self):
            if self._foreign():
                return
            if self.path == "/about":
                self._answer(200, json.dumps({"model": self.server.talker.name}).encode(), "application/json")
            elif self.path == "/":
                self._answer(200, PAGE.read_bytes(), "text/html; charset=utf-8")
            else:
                self._answer(404, b"not found")

        def do_POST(self):
            if self._foreign():
                return
            told = self.headers.get("Content-Length", "")
            length = int(told) if told.isdecimal() else 0
            if self.path != "/reply" or self.headers.get("Content-Type") != "application/json" or not 0 < length <= LONGEST:
                self._answer(400, b"wanted POST /reply with JSON")
                return
            try:
                turns = _turns(self.rfile.read(length))
                pieces = self.server.talker.reply(turns)
                first = next(pieces, "")
            except (UserError, ValueError, KeyError, TypeError) as err:
                self._answer(400, str(err).encode())
                return
            except Exception as err:  # of the model; the page shows it
                self._answer(500, f"{type(err).__name__}: {err}".encode())
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.end_headers()
            try:
                for piece in itertools.chain([first], pieces):
                    self.wfile.write(piece.encode())
                    self.wfile.flush()
            except OSError:
                pass  # the reader has gone, or pressed Stop
            except Exception as err:  # of the model, in the middle of a reply: the reader must not take it for a whole one
                self.wfile.write(f"\n[{type(err).__name__}: the reply breaks off here]".encode())
            finally:
                pieces.close()

        def log_message(self, *_):
            """Nobody's questions belong in a log."""

    try:
        return Page(("127.0.0.1", port), Handler)
    except OSError as err:
        raise ConfigError(f"port {port} cannot be had ({err.strerror}); give another one (--port), or 0 for any") from None
