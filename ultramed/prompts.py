"""From rows to tokens: templates, the completion mask, a lint for malformed conversations, and a coloured preview.

Every row is a `prompt` (list of messages) and a `completion` (list with one assistant message). A template turns them
into two texts, which are tokenised apart and joined, so that training and generation see the same prompt tokens.
"""

import hashlib
import html
import json
import re
from dataclasses import dataclass
from itertools import pairwise

LABEL_IGNORED = -100

HINTS = {  # what the system turn asks for; the base model is told the form, too
    "content_first": "Answer: text (letter).",
    "letter_first": "Answer: letter: text.",
}


RELEASED = "ultramedical_released"


@dataclass(frozen=True)
class Template:
    """An instruction format. `with_input` and `without_input` are prompts with {instruction} and {input}."""

    name: str
    source: str
    with_input: str = ""
    without_input: str = ""

    def render(self, prompt: list[dict], tokenizer) -> str:
        """Text that the model is given; it ends where the answer begins."""
        if self.name in ("chat", RELEASED):
            if not tokenizer.chat_template:
                raise ValueError("this tokenizer has no chat template; choose template alpaca or medalpaca")
            return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        *system, user = [m["content"] for m in prompt]
        if [m["role"] for m in prompt] not in (["user"], ["system", "user"]):
            raise ValueError(f"template {self.name} has one user turn; got {[m['role'] for m in prompt]}")
        if system:  # the system turn says what to do, the user turn is what to do it with
            return self.with_input.format(instruction=system[0], input=user)
        return self.without_input.format(instruction=user)

    def finish(self, completion: str, tokenizer) -> str:
        """Text that the model shall produce, with its end token."""
        if self.name == RELEASED:
            header = role_header(tokenizer)
            return header + completion.strip() + tokenizer.eos_token + "\n" + header
        return completion.strip() + tokenizer.eos_token

    def jinja(self) -> str:
        """The same as a chat template for transformers; '' for the model's own. One user turn, as `render`."""
        if not self.with_input:
            return ""

        def text(form: str, **named: str) -> str:
            parts = re.split(r"\{(instruction|input)\}", form)
            return " + ".join(named[p] if p in named else json.dumps(p) for p in parts if p)

        system = text(self.with_input, instruction="messages[0]['content']", input="messages[1]['content']")
        plain = text(self.without_input, instruction="messages[0]['content']")
        answer = "{% if messages[-1]['role'] == 'assistant' %}{{ messages[-1]['content'] + eos_token }}{% endif %}"
        return f"{{% if messages[0]['role'] == 'system' %}}{{{{ {system} }}}}{{% else %}}{{{{ {plain} }}}}{{% endif %}}{answer}"

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


def hints_wording(config=None) -> str:
    """Hash of what questions ask for, for the keys of stages that make messages of questions and render nothing."""
    return hashlib.sha256(repr(HINTS).encode()).hexdigest()[:12]


def wording(config=None) -> str:
    """Hash of every text above; part of the key of each stage that renders prompts (a model's chat template is part of
    the model's own artifact)."""
    return hashlib.sha256(repr((HINTS, TEMPLATES)).encode()).hexdigest()[:12]


# ---------------------------------------------------------------------------------------------------- rows to messages


def question_text(row: dict) -> str:
    """Context (if any), question and lettered options."""
    context = f"{row['context']}\n\n" if row.get("context") else ""
    return context + row["question"] + "\n" + "\n".join(f"{k}. {v}" for k, v in row["options"].items())


def question_prompt(row: dict, answer_form: str) -> list[dict]:
    """Messages that ask a multiple-choice question and name the wanted form of the answer."""
    return [{"role": "system", "content": HINTS[answer_form]}, {"role": "user", "content": question_text(row)}]


def names_option(prompt: list[dict], letter: str | None, reply: str) -> bool:
    """Whether the reply holds the text that `letter` stands for in the question's list of options."""
    found = re.search(rf"^{letter}\. (.+)$", prompt[-1]["content"], re.MULTILINE) if letter else None
    return bool(found) and found[1].casefold() in reply.casefold()


def answer_text(row: dict, answer_form: str) -> str:
    """The gold answer. letter_first is MedAlpaca's form ('B: text'); content_first is what a small model can learn."""
    letter, text = row["gold"], row["options"][row["gold"]]
    return f"{letter}: {text}" if answer_form == "letter_first" else f"{text} ({letter})"


def said(text: str) -> list[dict]:
    """A completion: one assistant message."""
    return [{"role": "assistant", "content": text}]


def as_instruction(row: dict, answer_form: str) -> dict:
    """A training row of any canonical row: instruction rows as they are, questions with their gold answer."""
    if "options" not in row:
        return {k: row[k] for k in ("id", "source", "prompt", "completion")}
    answer = said(answer_text(row, answer_form))
    return {"id": row["id"], "source": row["source"], "prompt": question_prompt(row, answer_form), "completion": answer}


# ----------------------------------------------------------------------------------------------------- rows to tokens


class TemplateError(ValueError):
    """A rendered conversation with a defect that would be trained into the model."""


def encode(row: dict, tokenizer, template: Template, max_length: int, train_on_inputs: bool = False) -> dict | None:
    """`input_ids`, `completion_mask` (1 on completion tokens) and `labels` of one row.

    What goes beyond `max_length` is cut off at the end, as MedAlpaca does; `truncated` says so. None if that leaves
    nothing of the completion.
    """
    prompt = tokenizer(template.render(row["prompt"], tokenizer), add_special_tokens=False)["input_ids"]
    text = template.finish(row["completion"][0]["content"], tokenizer)
    completion = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = (prompt + completion)[:max_length]
    if len(ids) <= len(prompt):
        return None
    mask = [0] * len(prompt) + [1] * (len(ids) - len(prompt))
    labels = ids if train_on_inputs else [t if m else LABEL_IGNORED for t, m in zip(ids, mask, strict=True)]
    truncated = len(prompt) + len(completion) > max_length
    return {"input_ids": ids, "completion_mask": mask, "labels": labels, "truncated": truncated}


def lint(ids: list[int], mask: list[int], tokenizer, truncated: bool = False) -> None:
    """Refuse what UltraMedical's released template does and double-BOS bugs do. Raises TemplateError.

    Checked: no token of a turn's header directly repeated (double BOS, doubled role header), no role header among the
    trained tokens or dangling at the end, an end token as the last trained one, and some but not all tokens trained.
    """
    header = role_header(tokenizer)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    text = tokenizer.decode(ids)
    if bos is not None and bos != eos and any(a == b == bos for a, b in pairwise(ids)):
        raise TemplateError(f"begin-of-sequence token twice in a row: {text[:80]!r}")
    if header and header + header in text:
        raise TemplateError(f"doubled role header {header!r}: ...{text[-120:]!r}")
    trained = [t for t, m in zip(ids, mask, strict=True) if m]
    if not trained or (len(trained) == len(ids)):
        raise TemplateError(f"{len(trained)} of {len(ids)} tokens are completion; wanted some, not all")
    tail = tokenizer.decode(trained)
    if header and header.strip() in tail:
        raise TemplateError(f"role header inside or dangling after the completion: {tail[-120:]!r}")
    if not truncated and trained[-1] != eos:
        raise TemplateError(f"the completion does not end with {tokenizer.eos_token!r}: ...{tail[-60:]!r}")


def role_header(tokenizer) -> str:
    """What the chat template puts before an assistant turn, e.g. '<|im_start|>assistant\\n'; '' without a template."""
    if not tokenizer.chat_template:
        return ""
    turn = [{"role": "user", "content": "x"}]
    without = tokenizer.apply_chat_template(turn, tokenize=False)
    return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True).removeprefix(without)


def preview(encoded: list[dict], tokenizer, limit: int = 3):
    """Tokens of the first rows, one box each: blue is trained on, grey is only read. An IPython HTML object."""
    from IPython.display import HTML

    box = '<span style="background:{};color:#111;border-radius:2px;margin:1px;padding:0 1px;white-space:pre">{}</span>'
    rows = []
    for row in encoded[:limit]:
        spans = []
        for token, label in zip(row["input_ids"], row["labels"], strict=True):
            shown = html.escape(tokenizer.decode([token])).replace("\n", "⏎\n")
            spans.append(box.format("#9ecae1" if label != LABEL_IGNORED else "#eeeeee", shown))
        trained = sum(label != LABEL_IGNORED for label in row["labels"])
        head = f"{len(row['input_ids'])} tokens, {trained} trained on (blue)"
        rows.append(
            f'<div style="margin:6px 0"><small>{head}</small><div style="font-family:monospace;font-size:12px;'
            f'line-height:1.6;white-space:pre-wrap">{"".join(spans)}</div></div>'
        )
    return HTML("".join(rows))
