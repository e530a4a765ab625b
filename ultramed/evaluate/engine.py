"""Who writes the replies: weights on this machine, or a server behind a URL (vLLM, transformers serve, a hosted model).

A model named 'http://host:port/v1#model' is a server's. All engines take conversations and give `Reply`s; what needs
the weights themselves (likelihoods, words put into the model's mouth) only the local one can do.

`replies` calls `done(indices, replies)` as they come, each conversation once; rngs: one stream each, for sampling.
Conversations that do not fit into the model's context are not asked: `unfit(indices)` is told, or ConfigError raised without
it. After `close` an engine has no weights any more, whoever still holds it.
"""

import json
import logging
import re
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ultramed.core.client import Request, ServerConfig, ask
from ultramed.core.errors import ConfigError
from ultramed.core.ledger import Ledger
from ultramed.core.progress import bar as progress_bar
from ultramed.core.store import Artifact
from ultramed.evaluate.generate import Reply, Sampling, cut, generate
from ultramed.lm import models
from ultramed.lm.architecture import context_length
from ultramed.lm.device import at_most_on_cpu, free_memory, placement
from ultramed.lm.templates import Template
from ultramed.train.crew import hold, let_go

if TYPE_CHECKING:
    from ultramed.evaluate.openvino import OpenVino

log = logging.getLogger(__name__)
CPU_TOKENS = 32768  # of a batch: a GPU profile's would not fit beside the weights
Unfit = Callable[[list[int]], None]


def fitting(fits: list[bool], room: str, unfit: Unfit | None) -> list[int]:
    """Indices of the conversations that fit into `room`; the others are passed on to `unfit`, with a line in the log."""
    long = [i for i, fit in enumerate(fits) if not fit]
    if long and unfit is None:
        raise ConfigError(
            f"{len(long)} of {len(fits)} conversations do not fit into {room}: shorten them, or ask for shorter replies"
        )
    if long:
        log.warning("%d of %d conversations do not fit into %s: they are not asked, and counted", len(long), len(fits), room)
        unfit(long)
    return [i for i, fit in enumerate(fits) if fit]


def load(model: Artifact, dtype: str | None, quantize: str | None):
    """(net, tokenizer), in evaluation mode. dtype: a name, such as 'bfloat16'; the machine's own choice if None."""
    tokenizer = models.load_tokenizer(model)
    return models.load(model, dtype=dtype and getattr(torch, dtype), quantize=quantize), tokenizer


class Local:
    """Weights in memory, of this process or of a crew: token-budget batches, a prompt read once for all its samples."""

    def __init__(self, net, tokenizer, template: Template, budget: int):
        self.net, self.tokenizer, self.template = net, tokenizer, template
        self.budget = at_most_on_cpu(budget, CPU_TOKENS)

    def shown(self, messages: list[dict]) -> str:
        return self.template.render(messages, self.tokenizer)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def fitting(self, given: list[list[int]], new_tokens: int, unfit: Unfit | None) -> list[int]:
        """Indices of the prompts (token ids) that fit into the model's context with `new_tokens` more."""
        context = context_length(self.net)
        fits = [len(ids) + new_tokens <= context for ids in given]
        return fitting(fits, f"{context} positions with {new_tokens} new tokens", unfit)

    def replies(self, conversations, sampling, done, rngs=None, unfit=None) -> None:
        given = [self.ids(self.shown(messages)) for messages in conversations]
        fit = self.fitting(given, sampling.max_new_tokens, unfit)
        asked, streams = [given[i] for i in fit], [rngs[i] for i in fit] if rngs else None

        def tell(batch: list[int], made: list[Reply]) -> None:
            done([fit[i] for i in batch], made)

        generate(self.net, self.tokenizer, asked, sampling, budget=self.budget, rngs=streams, done=tell)

    def close(self) -> None:
        let_go(self.net)
        del self.net


class Server:
    """A server's replies. The template is the server's own; `path` keeps what was paid for."""

    def __init__(self, config: ServerConfig, path: Path):
        self.config, self.path = config, path

    def shown(self, messages: list[dict]) -> str:
        return json.dumps(messages, ensure_ascii=False)

    def options(self, sampling: Sampling) -> dict:
        """What a request says of the sampling."""
        options: dict = {"max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature}
        if sampling.temperature:
            options["top_p"] = sampling.top_p
        if sampling.repetition_penalty != 1:  # not in OpenAI's interface, but in vLLM's
            options["repetition_penalty"] = sampling.repetition_penalty
        return options

    def replies(self, conversations, sampling, done, rngs=None, unfit=None) -> None:
        options, stop = self.options(sampling), re.compile(sampling.stop) if sampling.stop else None
        if sampling.temperature and sampling.top_k and "top_k" not in options:
            log.warning("%s is not told top_k=%d, which OpenAI's interface does not have", self.config.url, sampling.top_k)
        requests = [
            Request(str(i), messages, options | ({"seed": rngs[i].getrandbits(31)} if rngs else {}))
            for i, messages in enumerate(conversations)
        ]
        rows = ask(self.config, requests, self.path, desc=f"{self.config.model} replies")
        fit = fitting([row["status"] != "too_long" for row in rows], f"the context of {self.config.model}", unfit)
        made = [(rows[i]["text"], rows[i]["completion_tokens"], rows[i]["finish_reason"] != "length") for i in fit]
        done(fit, [cut(*reply, stop) for reply in made])

    def close(self) -> None:
        """Nothing to let go: the weights are the server's."""


def open_engine(
    model: Artifact,
    template: Template,
    out: Path,
    *,
    budget: int,
    dtype=None,
    quantize: str | None = None,
    engine: str = "transformers",
    tensor_parallel: int = 0,
    items: int = 1,
    ledger: Ledger | None = None,
) -> "Local | Server | OpenVino":
    """A server where the model's card names one (its ledger goes to `out`/requests.jsonl), else `engine`. tensor_parallel: GPUs
    that share the model with engine vllm, 0 for all. items: how many it is about to be asked, by which it may be a crew;
    ledger: where their results go (train/crew.py)."""
    metadata = models.card(model)
    if metadata["kind"] == "server":
        if quantize:
            raise ConfigError(f"{metadata['name']} is behind a URL: start the server with quantised weights instead")
        return Server(ServerConfig(url=metadata["url"], model=metadata["model"]), out / "requests.jsonl")
    if engine == "transformers":
        named = {"dtype": dtype and str(dtype).removeprefix("torch."), "quantize": quantize}
        alone = models.spreads(model, dtype or placement().dtype, quantize)  # one process then has all the devices
        return Local(*hold(load, model, 1 if alone else items, out, ledger, **named), template, budget)
    if quantize:
        raise ConfigError(f"engine {engine} runs 16- and 32-bit weights; quantize {quantize!r} needs engine transformers")
    if engine == "vllm":
        from ultramed.evaluate.vllm import Vllm

        return Vllm(model, template, out, dtype or placement().dtype, tensor_parallel)
    from ultramed.evaluate.openvino import OpenVino

    return OpenVino(model, template, out, "bf16" if dtype == torch.bfloat16 else "f32")


@contextmanager
def asking(ledger: Ledger, total: int, desc: str, unit: str, model: Artifact, template: str | None, out: Path, **options):
    """(engine, bar) to ask for what a ledger still lacks of `total` items; afterwards the engine's memory is given back.

    `template` and `options`: see `open_engine`.
    """
    engine = open_engine(model, models.template_of(model, template), out, items=total - len(ledger), ledger=ledger, **options)
    try:
        with progress_bar(total, desc, unit, initial=len(ledger)) as bar:
            yield engine, bar
    finally:
        engine.close()
    free_memory()


def weights(engine: "Local | Server | OpenVino", what: str) -> Local:
    """The engine, if it has weights; else ConfigError saying that `what` needs them."""
    if not isinstance(engine, Local):
        who = engine.config.url if type(engine) is Server else f"engine {type(engine).__name__.lower()}"
        raise ConfigError(f"{what} needs the weights, and {who} gives replies only; use protocol=greedy")
    return engine


def one_reply(model: Artifact, messages: list[dict], max_new_tokens: int) -> str:
    """The greedy reply of weights on this machine to one conversation."""
    local, replies = Local(*load(model, None, None), models.template_of(model), budget=8192), []
    local.replies([messages], Sampling(max_new_tokens), lambda _, made: replies.extend(made))
    return replies[0].text
