"""Templates: how a conversation becomes the text that a model reads, and where its answer ends.

A template renders the prompt and finishes the completion apart, so that training and generation see the same prompt.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from datetime import date

from ultramed.core.errors import ConfigError
from ultramed.data.messages import HINTS, REASON

RELEASED = "ultramedical_released"
CONVERSATION = "conversation"
# The day that chat templates which print one are told, so that a prompt is the same tomorrow: the one that Llama 3's template
# has where nobody tells it another.
DAY = date(2024, 7, 26)


@dataclass(frozen=True)
class Template:
    """An instruction format. `with_input` and `without_input` are prompts with {instruction} and {input}."""

    name: str
    source: str
    with_input: str = ""
    without_input: str = ""

    def render(self, prompt: list[dict], tokenizer) -> str:
        """Text that the model is given; it ends where the answer begins."""
        if self.name in ("chat", CONVERSATION, RELEASED):
            return _chat(prompt, tokenizer)
        *system, user = [m["content"] for m in prompt]
        if [m["role"] for m in prompt] not in (["user"], ["system", "user"]):
            raise ConfigError(f"template {self.name} has one user turn; got {[m['role'] for m in prompt]}")
        if system:  # the system turn says what to do, the user turn is what to do it with
            return beginning(tokenizer) + self.with_input.format(instruction=system[0], input=user)
        return beginning(tokenizer) + self.without_input.format(instruction=user)

    def finish(self, completion: str, tokenizer) -> str:
        """Text that the model shall produce, with its end token."""
        if self.name == RELEASED:
            header = role_header(tokenizer)
            return header + completion.strip() + tokenizer.eos_token + "\n" + header
        if self.name == CONVERSATION:
            return completion.strip() + turn_end(tokenizer)
        return completion.strip() + tokenizer.eos_token

    def jinja(self, tokenizer) -> str:
        """The same as a chat template for transformers; '' for the model's own. One user turn, as `render`."""
        if not self.with_input:
            return ""

        def text(form: str, **named: str) -> str:
            parts = re.split(r"\{(instruction|input)\}", form)
            return " + ".join(named[p] if p in named else json.dumps(p) for p in parts if p)

        system = text(self.with_input, instruction="messages[0]['content']", input="messages[1]['content']")
        plain = text(self.without_input, instruction="messages[0]['content']")
        answer = "{% if messages[-1]['role'] == 'assistant' %}{{ messages[-1]['content'] + eos_token }}{% endif %}"
        start = "{{ bos_token }}" if beginning(tokenizer) else ""
        return f"{start}{{% if messages[0]['role'] == 'system' %}}{{{{ {system} }}}}{{% else %}}{{{{ {plain} }}}}{{% endif %}}{answer}"

    def fingerprint(self, tokenizer) -> str:
        """Hash of everything that decides what this template renders."""
        chat = (tokenizer.chat_template or "") if self.name in ("chat", RELEASED) else ""
        text = self.with_input + "\0" + self.without_input + "\0" + chat + (RELEASED if self.name == RELEASED else "")
        return hashlib.sha256(text.encode()).hexdigest()[:12]


_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
_ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
TEMPLATES = {
    t.name: t
    for t in (
        Template("chat", "the model's own chat template"),
        # An assistant header after every rendering: doubled before the completion, dangling after it. For the ablation
        # "as released" only; the lint lets nothing else like it pass.
        Template(RELEASED, "TsinghuaC3I/UltraMedical, chat template of its preference training"),
        Template(
            "alpaca",
            "tatsu-lab/stanford_alpaca, train.py",
            _ALPACA_INPUT + "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
            _ALPACA + "### Instruction:\n{instruction}\n\n### Response:",
        ),
        Template(  # an empty input keeps its header there
            "medalpaca",
            "kbressem/medAlpaca, prompt_templates/medalpaca.json and handler.py",
            _ALPACA_INPUT + "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
            _ALPACA_INPUT + "### Instruction:\n{instruction}\n\n### Input:\n\n\n### Response:\n",
        ),
    )
}
# How reward models from elsewhere read: the whole conversation, with whatever their own template puts behind a reply.
READ_WITH = {**TEMPLATES, CONVERSATION: Template(CONVERSATION, "allenai/reward-bench, rewardbench/utils.py")}


def beginning(tokenizer) -> str:
    """The begin token, where the tokenizer puts one before every plain text (Llama); chat templates bring their own."""
    ids = tokenizer("x")["input_ids"]
    return tokenizer.bos_token if ids and ids[0] == tokenizer.bos_token_id else ""


def _chat(prompt: list[dict], tokenizer) -> str:
    """The model's own chat template; where it knows no system turn (Gemma) or drops it, its text goes before the user's."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ConfigError("this tokenizer has no chat template; choose template alpaca or medalpaca")
    first = prompt[0]
    for messages in (prompt, without_system(prompt)):
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as err:
            why = str(err)
            continue
        if first["role"] != "system" or first["content"].strip() in text:
            return text
        why = "the system turn is dropped"
    raise ConfigError(f"the model's chat template does not take {[m['role'] for m in prompt]}: {why}")


def undated(chat_template: str) -> str:
    """The chat template, printing DAY where it would print today."""
    return re.sub(r"strftime_now\((['\"])(.*?)\1\)", lambda call: repr(DAY.strftime(call[2])), chat_template)


def without_system(messages: list[dict]) -> list[dict]:
    """The same conversation with the system turn's text at the beginning of the user turn that follows."""
    if [m["role"] for m in messages[:2]] != ["system", "user"]:
        return messages
    joined = f"{messages[0]['content']}\n\n{messages[1]['content']}"
    return [{"role": "user", "content": joined}, *messages[2:]]


def wording(config=None) -> str:
    """Hash of every text above; part of the key of each stage that renders prompts (a model's chat template is part of
    the model's own artifact)."""
    return hashlib.sha256(repr((HINTS, REASON, TEMPLATES)).encode()).hexdigest()[:12]


def role_header(tokenizer) -> str:
    """What the chat template puts before an assistant turn, e.g. '<|im_start|>assistant\\n'; '' without a template."""
    if not tokenizer.chat_template:
        return ""
    turn = [{"role": "user", "content": "x"}]
    without = tokenizer.apply_chat_template(turn, tokenize=False)
    return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True).removeprefix(without)


def turn_end(tokenizer) -> str:
    """What the chat template puts behind a reply, e.g. '<|im_end|>\\n'."""
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "reply"}]
    return tokenizer.apply_chat_template(turns, tokenize=False).rpartition("reply")[2]
