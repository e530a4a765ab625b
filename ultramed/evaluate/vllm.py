"""vLLM as an engine: a server on this machine, started for a stage and ended with it, for models larger than a device.

vLLM lives in an environment of its own (environment-vllm.yml). It is given the model as a plain folder (lm/plain.py) whose chat
template renders what the model's template renders here, and which is compared with transformers before it is believed.
"""

import contextlib
import functools
import itertools
import logging
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.request import ProxyHandler, build_opener

import psutil
import torch

from ultramed.core.client import ServerConfig
from ultramed.core.errors import ConfigError, ServerError
from ultramed.core.ledger import read_lines, write_lines
from ultramed.core.progress import duration
from ultramed.core.store import Artifact
from ultramed.evaluate import guard
from ultramed.evaluate.engine import Local, Server, fitting, load
from ultramed.evaluate.generate import Reply, Sampling
from ultramed.lm import models
from ultramed.lm.architecture import context_length
from ultramed.lm.device import device_memory, free_memory
from ultramed.lm.plain import plain_model
from ultramed.lm.templates import Template, without_system
from ultramed.train.launch import FOLDER, LOG, free_port

log = logging.getLogger(__name__)
ENVIRONMENT = "ULTRAMED_VLLM_ENV"
KEY = "ULTRAMED_VLLM_KEY"
DIRECT = build_opener(ProxyHandler({}))  # a server on this machine is asked without a proxy
READY = 3600.0  # seconds that loading may take
MINUTE = 60.0  # between two lines about it
CHECKED, CHECK_TOKENS = 4, 32  # prompts that transformers answers, too, and the longest reply to them
CHECKS = "checked.jsonl"
AT_ONCE = 256  # requests; vLLM makes batches of them


def command() -> list[str]:
    """The words that start vLLM: `ULTRAMED_VLLM_ENV`, a folder with bin/vllm or a command; else `vllm`.

    Raises ConfigError if there is no such program.
    """
    given = os.environ.get(ENVIRONMENT, "")
    folder = Path(given).expanduser()
    words = [str(folder / "bin" / "vllm")] if given and folder.is_dir() else shlex.split(given or "vllm")
    if shutil.which(words[0]) is None:
        raise ConfigError(
            f"engine vllm: there is no program {words[0]!r}. `conda env create -f environment-vllm.yml`, then set {ENVIRONMENT} to the "
            "folder of that environment (it holds bin/vllm), or to a command; or use engine=transformers"
        )
    return words


class Vllm(Server):
    """Greedy or sampled replies of a model that vLLM serves. The server starts with the first request and ends at `close`."""

    def __init__(self, model: Artifact, template: Template, out: Path, dtype: torch.dtype, parallel: int = 0):
        self.model, self.template, self.out, self.dtype = model, template, out, dtype
        super().__init__(self._server(0), out / "requests.jsonl")
        self.parallel, self._program, self._process = parallel or max(1, torch.cuda.device_count()), command(), None
        self._log, self.tokenizer = out / FOLDER / "vllm.log", models.load_tokenizer(model)

    def _server(self, port: int) -> ServerConfig:
        name = f"{self.model.stage}-{self.model.key}"  # stays the same, so that what was answered before is found again
        where = {"url": f"http://127.0.0.1:{port}/v1", "model": name, "key_env": KEY}
        return ServerConfig(**where, concurrency=AT_ONCE, timeout=READY, tries=3)

    @functools.cached_property
    def folder(self) -> Path:
        """The model as vLLM reads it, made when something is to be generated."""
        return plain_model(model=self.model, template=self.template.name, dtype=_name(self.dtype)).path

    @functools.cached_property
    def served(self):
        """The tokenizer as vLLM reads it."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)

    @functools.cached_property
    def context(self) -> int:
        from transformers import AutoConfig

        return context_length(SimpleNamespace(config=AutoConfig.from_pretrained(self.folder)))

    def shown(self, messages: list[dict]) -> str:
        return self.template.render(messages, self.tokenizer)

    def asked(self, messages: list[dict]) -> list[dict]:
        """The conversation in the form for which the served template renders the text that the model was trained with.

        Raises ConfigError if it does for none.
        """
        wanted = self.shown(messages)
        for form in (messages, without_system(messages)):
            if rendered(self.served, form) == wanted:
                return form
        raise ConfigError(
            f"engine vllm: template {self.template.name} cannot be said as a chat template; use engine=transformers"
        )

    def options(self, sampling: Sampling) -> dict:
        options = super().options(sampling)
        return options | ({"top_k": sampling.top_k} if sampling.temperature and sampling.top_k else {})

    def replies(self, conversations, sampling, done, rngs=None, unfit=None) -> None:
        forms = [self.asked(messages) for messages in conversations]
        lengths = [len(self.tokenizer(self.shown(m), add_special_tokens=False)["input_ids"]) for m in conversations]
        fits = [length + sampling.max_new_tokens <= self.context for length in lengths]
        fit = fitting(fits, f"{self.context} positions with {sampling.max_new_tokens} new tokens", unfit)
        if fit and self._process is None:
            self._start([conversations[i] for i in fit])

        def tell(batch: list[int], made: list[Reply]) -> None:
            done([fit[i] for i in batch], made)

        try:
            super().replies([forms[i] for i in fit], sampling, tell, [rngs[i] for i in fit] if rngs else None)
        except ServerError:
            self._check_alive()
            raise

    def _start(self, conversations: list[list[dict]]) -> None:
        """Start the server, wait until it can be asked, and compare it with transformers, once for each artifact."""
        each = max(1, len(conversations) // CHECKED)
        chosen = [] if (self.out / CHECKS).exists() else conversations[::each][:CHECKED]
        theirs = self._replies_of_transformers(chosen)
        port = free_port()
        self.config = self._server(port)
        os.environ.setdefault(KEY, secrets.token_hex(16))  # other users of the node are not answered
        given = {
            "--host": "127.0.0.1",
            "--port": port,
            "--served-model-name": self.config.model,
            "--tensor-parallel-size": self.parallel,
            "--dtype": _name(self.dtype),
        }
        words = [*self._program, "serve", str(self.folder), *map(str, itertools.chain(*given.items()))]
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
        env |= {"PATH": f"{Path(shutil.which(words[0])).parent}:{env['PATH']}", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        env["VLLM_API_KEY"] = os.environ[KEY]
        self._log.parent.mkdir(exist_ok=True)
        with open(self._log, "w") as told:
            # A session of its own: Ctrl-C in the terminal reaches this process alone, which ends the server.
            self._process = subprocess.Popen(
                [sys.executable, guard.__file__, *words],
                env=env,
                stdin=subprocess.PIPE,
                stdout=told,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._wait()
        if theirs:
            self._compare(chosen, theirs)

    def _wait(self) -> None:
        begun, next_line = time.monotonic(), 0.0
        while True:
            self._check_alive()
            try:
                with DIRECT.open(self.config.url.removesuffix("/v1") + "/health", timeout=2):
                    return
            except OSError:  # nobody there yet, or not ready
                pass
            waited = time.monotonic() - begun
            if waited > READY:
                raise ServerError(f"vLLM is not ready after {duration(waited)}. {self._said()}")
            if waited >= next_line:
                next_line += MINUTE
                log.info("vLLM loads %s on %d device(s), %s so far", self.config.model, self.parallel, duration(waited))
            time.sleep(0.25)

    def _check_alive(self) -> None:
        if self._process is not None and self._process.poll() is not None:
            raise ServerError(f"vLLM has ended by itself. {self._said()}")

    def _said(self) -> str:
        tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-12:])
        shutil.copyfile(self._log, self.out / LOG)
        return f"The end of its log ({self.out / LOG}):\n{tail}"

    def _replies_of_transformers(self, conversations: list[list[dict]]) -> list[str]:
        """Greedy replies of the weights themselves; none where no single device has room for them."""
        memory = min(device_memory(), default=psutil.virtual_memory().available)
        if not conversations or models.exceeds(models.weight_bytes(self.model, self.dtype), memory):
            return []
        local, found = Local(*load(self.model, _name(self.dtype), None), self.template, budget=8192), {}
        local.replies(conversations, Sampling(CHECK_TOKENS), lambda batch, made: found.update(zip(batch, made, strict=True)))
        local.close()
        free_memory()
        return [found[i].text for i in range(len(conversations))]

    def _compare(self, conversations: list[list[dict]], theirs: list[str]) -> None:
        ours: dict[int, Reply] = {}
        forms = [self.asked(messages) for messages in conversations]
        super().replies(forms, Sampling(CHECK_TOKENS), lambda batch, made: ours.update(zip(batch, made, strict=True)))
        rows = [
            {"prompt": self.shown(messages), "transformers": text, "vllm": ours[i].text}
            for i, (messages, text) in enumerate(zip(conversations, theirs, strict=True))
        ]
        write_lines(self.out / CHECKS, rows)
        same = sum(row["transformers"] == row["vllm"] for row in rows)
        tell = log.info if same == len(rows) else log.warning
        tell("vLLM and transformers give the same greedy reply to %d of %d prompts (%s)", same, len(rows), CHECKS)

    def close(self) -> None:
        if self._process is None:
            return
        self._process.stdin.close()  # on which the guard ends the server
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(2 * guard.GRACE)
        with contextlib.suppress(ProcessLookupError):  # as it should be: all have ended
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        shutil.rmtree(self._log.parent, ignore_errors=True)


def rendered(tokenizer, messages: list[dict]) -> str | None:
    """What a server's chat template makes of a conversation; None if it takes no such turns."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError):
        return None


def checks(out: Path) -> dict:
    """For the metrics of a stage: greedy replies that were compared with transformers', and how many are the same."""
    if not (out / CHECKS).exists():
        return {}
    rows = read_lines(out / CHECKS)
    same = sum(row["transformers"] == row["vllm"] for row in rows)
    return {"compared_with_transformers": {"prompts": len(rows), "same": same}}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
