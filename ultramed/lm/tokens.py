"""From rows to tokens: the completion mask, a lint for malformed conversations, and a coloured preview."""

import functools
import html

from ultramed.core.errors import UserError
from ultramed.lm.templates import Template, role_header

LABEL_IGNORED = -100


class TemplateError(UserError):
    """A rendered conversation with a defect that would be trained into the model."""


def encode_rows(rows: list[dict], tokenizer, template: Template, max_length: int, checked: bool = False) -> list[dict | None]:
    """`input_ids`, `prompt_length` (tokens before the completion) and `truncated` of each row, tokenised together.

    What goes beyond `max_length` is cut off at the end, as MedAlpaca does; `truncated` says so. None if that leaves
    nothing of the completion. checked: lint each row, which may raise TemplateError.
    """
    prompts = [template.render(row["prompt"], tokenizer) for row in rows]
    completions = [template.finish(row["completion"][0]["content"], tokenizer) for row in rows]
    ids = tokenizer([*prompts, *completions], add_special_tokens=False)["input_ids"]
    out: list[dict | None] = []
    for prompt, completion, *texts in zip(ids[: len(rows)], ids[len(rows) :], prompts, completions, strict=True):
        whole = (prompt + completion)[:max_length]
        truncated = len(prompt) + len(completion) > max_length
        if len(whole) <= len(prompt):
            out.append(None)
            continue
        if checked:
            lint(whole, len(prompt), tokenizer, truncated, None if truncated else texts)
        out.append({"input_ids": whole, "prompt_length": len(prompt), "truncated": truncated})
    return out


def end_tokens(tokenizer, named: int | list[int] | None) -> set[int]:
    """Tokens at which a reply ends: the tokenizer's, and those that a generation config names."""
    return {tokenizer.eos_token_id, *(named if isinstance(named, list | tuple) else [named])} - {None}


def labels(ids: list[int], prompt_length: int, train_on_inputs: bool = False) -> list[int]:
    """What the loss of a row is taken on: every token, or those of the completion."""
    return list(ids) if train_on_inputs else [LABEL_IGNORED] * prompt_length + list(ids[prompt_length:])


def lint(ids: list[int], prompt_length: int, tokenizer, truncated: bool = False, texts: list[str] | None = None) -> None:
    """Refuse what UltraMedical's released template does and double-BOS bugs do. Raises TemplateError.

    Checked: no token of a turn's header directly repeated (double BOS, doubled role header), no role header among the
    trained tokens or dangling at the end, an end token as the last trained one, and some but not all tokens trained.
    texts: prompt and completion, where they are at hand; else the tokens are decoded.
    """
    header = _header(tokenizer, tokenizer.chat_template)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if not 0 < prompt_length < len(ids):
        raise TemplateError(f"{len(ids) - prompt_length} of {len(ids)} tokens are completion; wanted some, not all")
    prompt, completion = texts or (tokenizer.decode(ids[:prompt_length]), tokenizer.decode(ids[prompt_length:]))
    if bos is not None and bos != eos and tokenizer.bos_token * 2 in prompt + completion:
        raise TemplateError(f"begin-of-sequence token twice in a row: {prompt[:80]!r}")
    if header and header + header in prompt + completion:
        raise TemplateError(f"doubled role header {header!r}: ...{(prompt + completion)[-120:]!r}")
    if header and header.strip() in completion:
        raise TemplateError(f"role header inside or dangling after the completion: {completion[-120:]!r}")
    if not truncated and ids[-1] != eos:
        raise TemplateError(f"the completion does not end with {tokenizer.eos_token!r}: ...{completion[-60:]!r}")


@functools.lru_cache(maxsize=8)
def _header(tokenizer, chat_template: str | None) -> str:
    """`role_header`, which renders two conversations, once a template."""
    return role_header(tokenizer)


def preview(encoded: list[dict], tokenizer, train_on_inputs: bool = False):
    """Tokens of rows (`encode_rows`), one box each: blue is trained on, grey is only read. An IPython HTML object."""
    from IPython.display import HTML

    box = '<span style="background:{};color:#111;border-radius:2px;margin:1px;padding:0 1px;white-space:pre">{}</span>'
    rows = []
    for row in encoded:
        spans, wanted = [], labels(row["input_ids"], row["prompt_length"], train_on_inputs)
        for token, label in zip(row["input_ids"], wanted, strict=True):
            shown = html.escape(tokenizer.decode([token])).replace("\n", "⏎\n")
            spans.append(box.format("#9ecae1" if label != LABEL_IGNORED else "#eeeeee", shown))
        trained = sum(label != LABEL_IGNORED for label in wanted)
        head = f"{len(row['input_ids'])} tokens, {trained} trained on (blue)"
        rows.append(
            f'<div style="margin:6px 0"><small>{head}</small><div style="font-family:monospace;font-size:12px;'
            f'line-height:1.6;white-space:pre-wrap">{"".join(spans)}</div></div>'
        )
    return HTML("".join(rows))
