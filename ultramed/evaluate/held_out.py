"""Loss on instructions that no training saw: what a model still knows, where it is too small to solve the task itself."""

from pathlib import Path

import pandas as pd
from pydantic import Field

from ultramed.core.ledger import Ledger
from ultramed.core.schema import Strict
from ultramed.core.store import Artifact, stage
from ultramed.data import rows as canonical
from ultramed.evaluate import stats
from ultramed.evaluate.engine import asking, weights
from ultramed.evaluate.likelihood import score
from ultramed.lm import models
from ultramed.lm.architecture import context_length
from ultramed.lm.device import at_most_on_cpu, placement
from ultramed.lm.templates import wording
from ultramed.lm.tokens import encode_rows
from ultramed.train.launch import clear

CPU_TOKENS = 4096  # of one reading: the logits of more would not fit beside the weights


class LossConfig(Strict):
    """`max_length`: tokens of prompt and completion, beyond which the completion is cut, as in training. `limit`: rows, drawn
    evenly over the file; 0 for all. `batch_tokens`: of one reading; each of a completion's has logits of the whole
    vocabulary."""

    max_length: int = Field(2048, ge=8)
    limit: int = Field(0, ge=0)
    batch_tokens: int = Field(8192, ge=64)


@stage(version=2, also=wording)
def held_out_loss(
    out: Path,
    config: LossConfig,
    *,
    model: Artifact,
    data: Artifact,
    side: str = "test",
    template: str | None = None,
    dtype: str = "auto",
) -> dict:
    """Negative log-likelihood of the completions of instruction rows (`{side}.parquet`; 'rows' for a mixture): `losses.jsonl`.

    A line a row: id, subset (the row's source), nll (in nats, summed over the completion and its end token) and tokens, which
    are the ones that training takes its loss on. `loss` is their mean in nats a token over all rows. Rows of whose completion
    nothing fits are not among them (`too_long`). An interrupted run goes on after its last finished row. Raises ConfigError
    for a model behind a URL.
    """
    rows, place = canonical.spread(canonical.read_instructions(data / f"{side}.parquet"), config.limit), placement(dtype)
    clear(out)
    with Ledger(out / "losses.jsonl", key="id") as ledger:
        todo = [row for row in rows if row["id"] not in ledger]
        if todo:
            opening = {"budget": config.batch_tokens, "dtype": place.dtype}
            with asking(ledger, len(rows), "held-out loss", "row", model, template, out, **opening) as (engine, bar):
                _read(weights(engine, "a held-out loss"), todo, config, ledger, bar)
        read = [ledger.rows[row["id"]] for row in rows if ledger.rows[row["id"]]["tokens"]]
    tokens = sum(row["tokens"] for row in read)
    return {
        "rows": len(read),
        "too_long": len(rows) - len(read),
        "tokens": tokens,
        "loss": sum(row["nll"] for row in read) / tokens if read else None,
        "template": models.template_of(model, template).name,
        "dtype": str(place.dtype),
        "device": place.device,
    }


def _read(local, rows: list[dict], config: LossConfig, ledger: Ledger, bar) -> None:
    longest = min(config.max_length, context_length(local.net))
    made = encode_rows(rows, local.tokenizer, local.template, longest)
    fit = [i for i, tokens in enumerate(made) if tokens]
    ledger.add(*(_entry(row, None, 0) for row, tokens in zip(rows, made, strict=True) if not tokens))
    bar.update(len(rows) - len(fit))
    items = []
    for i in fit:
        ids, start = made[i]["input_ids"], made[i]["prompt_length"]
        items.append((ids[:start], [ids[start:]]))

    def done(batch, scores):
        read = zip(batch, scores, strict=True)
        ledger.add(*(_entry(rows[fit[n]], round(-logp, 5), len(items[n][1][0])) for n, [logp] in read))
        bar.update(len(batch))

    score(local.net, local.tokenizer, items, budget=at_most_on_cpu(config.batch_tokens, CPU_TOKENS), done=done)


def _entry(row: dict, nll: float | None, tokens: int) -> dict:
    return {"id": row["id"], "subset": row["source"], "nll": nll, "tokens": tokens}


def read_losses(artifact: Artifact) -> pd.DataFrame:
    """`losses.jsonl` as a table, one row a row that was read: id, subset, nll (nats, of the whole completion), tokens."""
    frame = pd.read_json(artifact / "losses.jsonl", lines=True, dtype={"id": str, "nll": float})
    return frame[frame.tokens > 0].reset_index(drop=True)


def mean_loss(losses: pd.DataFrame) -> stats.Estimate:
    """Nats a token over all rows of `read_losses`, with its interval over rows; n counts rows."""
    return _per_token(losses.nll, losses.tokens)


def difference(a: pd.DataFrame, b: pd.DataFrame) -> stats.Estimate:
    """Loss of A less that of B in nats a token over the rows that both read (`read_losses`), with its interval over rows;
    below zero A is the better one. Raises ValueError for no row in common, and for models whose tokens differ, because
    a token is not the same piece of text to them then."""
    both = a.merge(b, on="id", suffixes=("_a", "_b"), validate="one_to_one")
    if both.empty:
        raise ValueError("the two models have no held-out row in common")
    if (unlike := both.tokens_a != both.tokens_b).any():
        raise ValueError(f"{unlike.sum()} of {len(both)} rows have other tokens for the two models: no loss a token to compare")
    return _per_token(both.nll_a - both.nll_b, both.tokens_a)


def _per_token(nll: pd.Series, tokens: pd.Series) -> stats.Estimate:
    """Sum of `nll` over that of `tokens`: the rows' means a token, weighted with their tokens."""
    return stats.clustered(nll / tokens, range(len(nll)), weights=tokens)
