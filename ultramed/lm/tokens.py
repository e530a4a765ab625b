"""From rows to tokens: the completion mask, a lint for malformed conversations, and a coloured preview."""

import html
from itertools import pairwise

from ultramed.core.errors import UserError
from ultramed.lm.templates import Template, role_header

LABEL_IGNORED = -100


class TemplateError(UserError):
    """A rendered conversation with a defect that would be trained into the model."""


def encode_row(row: dict, tokenizer, template: Template, max_length: int, train_on_inputs: bool = False) -> dict | None:
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
