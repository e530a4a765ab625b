"""A client of any OpenAI-compatible server: bounded concurrency, back-off, budgets, and a ledger so that nothing is paid twice.

Works in a script and in a notebook, whose event loop is running already. The key is read from the environment at the
moment of the request and is written nowhere.
"""

import asyncio
import json
import os
import random
import re
import ssl
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import certifi
from pydantic import BaseModel, Field, ValidationError, field_validator

from ultramed.core.errors import ConfigError, ServerError
from ultramed.core.ledger import Ledger
from ultramed.core.progress import bar as progress_bar
from ultramed.core.schema import Strict
from ultramed.core.store import digest

PRICES = "ULTRAMED_PRICES"
LOCAL = ("127.0.0.1", "localhost", "::1")  # no proxy could reach these
TOO_LONG = re.compile(r"context.{0,20}(length|window|size)|too (long|many tokens)|maximum.{0,30}tokens", re.IGNORECASE)
RETRY = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # statuses that another try may mend


class BudgetError(ServerError):
    """The budget is used up; what was paid for is in the ledger."""


class ServerConfig(Strict):
    """Where to ask, how hard, and how much it may cost. `url` ends before /chat/completions, mostly in /v1.

    Only url and model say what comes out; the rest is left out of an artifact's key. The budgets count everything in
    the ledger, earlier runs included; 0 means no limit.
    """

    url: str
    model: str
    key_env: str = Field("OPENAI_API_KEY", exclude=True)  # variable with the key; need not be set for a server without one
    concurrency: int = Field(16, ge=1, exclude=True)
    timeout: float = Field(120.0, gt=0, exclude=True)  # seconds for one answer
    tries: int = Field(8, ge=1, exclude=True)  # of one request, before it is given up for this run
    longest_wait: float = Field(60.0, gt=0, exclude=True)  # seconds between two tries
    max_requests: int = Field(0, ge=0, exclude=True)
    max_tokens: int = Field(0, ge=0, exclude=True)  # prompt and completion together

    @field_validator("url")
    @classmethod
    def _plain(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"a server's url is http(s)://host[:port]/v1, got {url!r}")
        if parts.username or parts.password or parts.query:
            raise ValueError("no keys in the url: set the environment variable that `key_env` names")
        return url.rstrip("/")

    @classmethod
    def of(cls, where: str, **more) -> "ServerConfig":
        """'http://localhost:8000/v1#my-model' as configuration. Raises ConfigError for anything else."""
        url, _, model = where.partition("#")
        try:
            if not model:
                raise ValueError("the model's name is missing")
            return cls(url=url, model=model, **more)
        except ValueError as err:  # pydantic's is one, and repeats its input: only its own words are passed on
            why = err.errors(include_input=False)[0]["msg"] if isinstance(err, ValidationError) else err
            raise ConfigError(f"a server's model is url#model, such as http://localhost:8000/v1#my-model: {why}") from None


@dataclass(frozen=True)
class Request:
    """One conversation to answer. `options` go to the server as they are: temperature, top_p, max_tokens, seed, stop."""

    id: str
    messages: list[dict]
    options: dict = field(default_factory=dict)


def ask(
    server: ServerConfig, requests: list[Request], path: Path, *, schema: type[BaseModel] | None = None, desc: str = "answers"
) -> list[dict]:
    """Ledger rows of all requests, in their order; those in the ledger `path` already are not asked again.

    A row has key, id, model, status, text, value, finish_reason, completion_tokens, and the requests and tokens that it cost.
    Status is 'ok', or 'too_long' for a conversation that the server says does not fit; with a `schema` also 'unparsed' (no JSON
    that fits it, after one request to mend it; `value` is None then). Raises ServerError if requests stay unanswered,
    BudgetError if the budget is used up, ConfigError for what no further try can mend (a wrong key or model); finished answers
    are in the ledger in each case.
    """
    shape = schema.model_json_schema() if schema else None
    prices()  # a slip in them should show before anything is paid for
    keys = [digest([server.model, r.messages, r.options, shape]) for r in requests]
    with Ledger(path) as ledger:
        todo = {k: r for k, r in zip(keys, requests, strict=True) if k not in ledger}  # equal requests are asked once
        if todo:
            with progress_bar(len(set(keys)), desc, "request", initial=len(set(keys)) - len(todo)) as bar:
                _in_thread(_Run(server, schema, ledger, bar).all(todo))
        return [{**ledger.rows[key], "id": request.id} for key, request in zip(keys, requests, strict=True)]


def values(rows: Iterable[dict], name: str) -> list:
    """The value `name` of every row of `ask` with a schema; None where the reply could not be read."""
    return [row["value"][name] if row["value"] else None for row in rows]


def spent(rows: Iterable[dict]) -> dict[str, int]:
    """Requests and tokens that rows of a ledger cost; `completion_tokens` are those of the tokens that were written."""
    total = {"requests": 0, "tokens": 0, "completion_tokens": 0}
    for row in rows:
        for name in total:
            total[name] += row[name]
    return total


def prices() -> tuple[float, float] | None:
    """Dollars a million tokens read and written, from `ULTRAMED_PRICES` ('0.15,0.6'); None without it."""
    if not (text := os.environ.get(PRICES)):
        return None
    try:
        read, written = map(float, text.split(","))
    except ValueError:
        raise ConfigError(f"prices {text!r}: wanted dollars a million tokens in and out, such as 0.15,0.6") from None
    return read, written


def bill(tokens: int, completion_tokens: int) -> str:
    """'12,300 tokens', and what they cost where the prices are known."""
    told = f"{tokens:,} tokens"
    if price := prices():
        told += f", ${((tokens - completion_tokens) * price[0] + completion_tokens * price[1]) / 1e6:.2f}"
    return told


def _proxy(scheme: str) -> str | None:
    """The proxy that the environment names. Raises ConfigError for one of a kind that cannot be used here."""
    named = getproxies().get(scheme) or getproxies().get("all")
    if named and urlsplit(named).scheme.startswith("socks"):
        raise ConfigError(f"proxy {named!r}: only HTTP proxies can be used; name one in HTTP_PROXY and HTTPS_PROXY")
    return f"http://{named}" if named and "://" not in named else named


def _in_thread(coroutine) -> None:
    """Run to the end in a thread of its own, since a notebook has a running loop; Ctrl-C stops it between answers."""
    failure: list[BaseException] = []
    loop = asyncio.new_event_loop()
    task = loop.create_task(coroutine)

    def run():
        try:
            loop.run_until_complete(task)
        except BaseException as err:
            failure.append(err.exceptions[0] if isinstance(err, BaseExceptionGroup) else err)
        finally:
            loop.close()

    worker = threading.Thread(target=run, daemon=True)
    worker.start()
    try:
        while worker.is_alive():
            worker.join(0.2)
    except KeyboardInterrupt:
        loop.call_soon_threadsafe(task.cancel)
        worker.join(5)
        raise
    if failure:
        raise failure[0]


class _Run:
    def __init__(self, server: ServerConfig, schema, ledger: Ledger, bar):
        self.server, self.schema, self.ledger, self.bar = server, schema, ledger, bar
        self.format = {}
        if schema is not None:
            named = {"name": schema.__name__, "schema": schema.model_json_schema()}
            self.format = {"response_format": {"type": "json_schema", "json_schema": named}}
        self.requests, self.tokens, self.written = spent(ledger.rows.values()).values()
        self.failed: dict[str, str] = {}
        self.over_budget = False
        self.not_before = 0.0  # a 429 holds back all workers, not one

    async def all(self, todo: dict[str, Request]) -> None:
        waiting = iter(todo.items())
        async with self.session() as http:

            async def worker():
                for key, request in waiting:
                    if self.over_budget:
                        return
                    try:
                        row = await self.answer(http, request)
                    except BudgetError:
                        return
                    except ServerError as err:
                        self.failed[request.id] = str(err)
                        continue
                    self.ledger.add({"key": key, "id": request.id, "model": self.server.model, **row})
                    self.bar.set_postfix_str(bill(self.tokens, self.written))
                    self.bar.update(1)

            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.server.concurrency, len(todo))):
                    group.create_task(worker())
        left = sum(key not in self.ledger for key in todo)
        if self.over_budget:
            raise BudgetError(
                f"the budget is used up ({self.requests} requests, {self.tokens} tokens); {left} of {len(todo)} are left. "
                "Raise max_requests or max_tokens and run again: what is paid for is kept"
            )
        if self.failed:
            name, why = next(iter(self.failed.items()))
            raise ServerError(
                f"{left} of {len(todo)} requests have no answer after {self.server.tries} tries each, {name!r} because: "
                f"{why}. Run again to go on with them"
            )

    def session(self) -> aiohttp.ClientSession:
        """Connections to the server, through a proxy where the environment names one for it."""
        url, wait = urlsplit(self.server.url), self.server.timeout
        trusted = ssl.create_default_context(cafile=os.environ.get("SSL_CERT_FILE") or certifi.where())
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self.server.concurrency, ssl=trusted),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=wait, sock_read=wait),
            proxy=None if url.hostname in LOCAL or proxy_bypass(url.hostname) else _proxy(url.scheme),
        )

    async def answer(self, http: aiohttp.ClientSession, request: Request) -> dict:
        """A ledger row without its names."""
        row = {"status": "ok", "value": None, **await self.complete(http, request.messages, request.options)}
        if self.schema is None or row["status"] == "too_long":
            return row
        value, complaint = read_json(row["text"], self.schema)
        if value is None:
            mend = [
                *request.messages,
                {"role": "assistant", "content": row["text"]},
                {"role": "user", "content": f"That cannot be used: {complaint}. Answer again with the JSON object only."},
            ]
            again = await self.complete(http, mend, request.options)
            row |= {**again, **{k: row[k] + again[k] for k in ("requests", "tokens", "completion_tokens")}}
            value, complaint = read_json(row["text"], self.schema)
        return row | ({"value": value} if value is not None else {"status": "unparsed", "reason": complaint})

    async def complete(self, http: aiohttp.ClientSession, messages: list[dict], options: dict) -> dict:
        """text, finish_reason, completion_tokens, requests sent and tokens paid; ServerError when all tries failed."""
        why, sent = "", 0
        for attempt in range(self.server.tries):
            if (held := self.not_before - time.monotonic()) > 0:
                await asyncio.sleep(held * (1 + random.random() / 4))
            self.check_budget()
            shape = self.format  # another worker may take it away before the answer is there
            body = {"model": self.server.model, "messages": messages, **options, **shape}
            self.requests += 1
            sent += 1
            try:
                status, headers, content = await self.post(http, body)
                told = content.decode(errors="replace") if status >= 300 else ""
                if status in RETRY and "insufficient_quota" not in told:
                    why = f"HTTP {status}; it said: {self.words(told)}"
                    await self.back_off(attempt, why, status, headers.get("retry-after", ""))
                    continue
                if status in (400, 422) and shape and "response_format" in told:
                    self.format = {}  # the server has no structured outputs; the prompt asks for JSON as well
                    continue
                if status in (400, 413) and TOO_LONG.search(told):
                    nothing = {"text": "", "finish_reason": "", "tokens": 0, "completion_tokens": 0}
                    return {"status": "too_long", "requests": sent, **nothing}
                if status >= 300:
                    raise ConfigError(self.refusal(status, headers.get("location") or told))
                data = json.loads(content)
                if "choices" not in data:
                    raise ValueError(f"an answer without choices: {self.words(content.decode(errors='replace'))}")
                choice = data["choices"][0]
                text = choice["message"]["content"] or ""
                if not isinstance(text, str):
                    raise ValueError(f"its content is no text but a {type(text).__name__}")
            except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, IndexError, TypeError) as err:
                why = f"{type(err).__name__}: {err}" if str(err) else type(err).__name__
                await self.back_off(attempt, why)
                continue
            usage = data.get("usage") if isinstance(data.get("usage"), dict) else {}
            counts = {name: count if isinstance(count, int) else 0 for name, count in usage.items()}
            tokens = counts.get("total_tokens") or counts.get("prompt_tokens", 0) + counts.get("completion_tokens", 0)
            written = counts.get("completion_tokens") or len(text.split())
            self.tokens, self.written = self.tokens + tokens, self.written + written
            return {
                "text": text,
                "finish_reason": choice.get("finish_reason") or "",
                "requests": sent,
                "tokens": tokens,
                "completion_tokens": written,
            }
        raise ServerError(why)

    async def post(self, http: aiohttp.ClientSession, body: dict) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and content of the answer to one request."""
        key, headers = os.environ.get(self.server.key_env), {"Content-Type": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        data = json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
        url = f"{self.server.url}/chat/completions"
        async with http.post(url, data=data, headers=headers, allow_redirects=False) as reply:
            return reply.status, reply.headers, await reply.read()

    def check_budget(self) -> None:
        most, tokens = self.server.max_requests, self.server.max_tokens
        if (most and self.requests >= most) or (tokens and self.tokens >= tokens):
            self.over_budget = True
            raise BudgetError

    async def back_off(self, attempt: int, why: str, status: int = 0, asked: str = "") -> None:
        """Wait as long as the server asked, else twice as long each time, with jitter so that workers do not march in step."""
        self.bar.set_postfix_str(f"trying again after {why}")
        if attempt + 1 == self.server.tries:
            return
        wait = min(self.server.longest_wait, 0.5 * 2**attempt) * (0.5 + random.random() / 2)
        if re.fullmatch(r"\d+(\.\d+)?", asked):
            wait = min(self.server.longest_wait, max(wait, float(asked)))
        if status in (429, 503, 529):
            self.not_before = max(self.not_before, time.monotonic() + wait)
        else:
            await asyncio.sleep(wait)

    def refusal(self, status: int, told: str) -> str:
        """What a refusal means for the user, with the server's own words."""
        hint = {
            401: f"set {self.server.key_env} to a key that the server knows",
            403: f"the key in {self.server.key_env} may not use this model",
            429: "the account's quota is used up",
            404: f"is {self.server.url!r} the address before /chat/completions, and {self.server.model!r} a model it serves?",
        }.get(status, "the server did not understand the request" if status >= 400 else "it is at another address")
        return f"{self.server.url}: HTTP {status}; {hint}. It said: {self.words(told)}"

    def words(self, told: str) -> str:
        """A server's words, cut, and never the key."""
        key = os.environ.get(self.server.key_env)
        said = " ".join(told.split())[:300]
        return said.replace(key, "…") if key else said


def _no_number(name: str):
    raise ValueError(f"{name} is no number")


def read_json(text: str, schema: type[BaseModel]) -> tuple[dict | None, str]:
    """(value, '') of the first JSON object in `text` that fits the schema, or (None, what is wrong).

    Fences, prose around the object and a comma too many are put up with; nothing is guessed.
    """
    text = text.rpartition("</think>")[2]  # what a model thinks first is no answer
    complaint, decoder = "there is no JSON object in it", json.JSONDecoder(parse_constant=_no_number)
    for start in (m.start() for m in re.finditer(r"\{", text)):
        for candidate in (text[start:], re.sub(r",\s*([}\]])", r"\1", text[start:])):
            try:
                value, _ = decoder.raw_decode(candidate)
            except ValueError:
                continue
            try:
                return schema.model_validate(value).model_dump(mode="json"), ""
            except ValidationError as err:
                first = err.errors()[0]
                complaint = f"{'.'.join(map(str, first['loc'])) or 'the object'}: {first['msg']}"
            break
    return None, complaint
