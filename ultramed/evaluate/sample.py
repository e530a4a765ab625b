"""Several sampled replies to every prompt: candidates for preferences, votes for self-consistency, food for re-ranking."""

import json
from pathlib import Path

from ultramed import models, prompts
from ultramed.data import rows as canonical
from ultramed.evaluate.accuracy import select_rows
from ultramed.evaluate.generate import Sampling, generate, item_rng
from ultramed.ledger import Ledger
from ultramed.parsing import parse
from ultramed.progress import bar as progress_bar
from ultramed.schema import SampleConfig
from ultramed.store import Artifact, stage


@stage(version=1, also=prompts.wording)
def samples(
    out: Path, config: SampleConfig, *, model: Artifact, questions: Artifact, side: str = "test",
    select: dict | None = None, template: str = "chat", dtype: str = "auto",
) -> dict:  # fmt: skip
    """`config.n` replies to each question of `questions/<side>.parquet`; `samples.jsonl` has a row a question.

    Reply k of a question depends on the seed, the question and k only: the first four of ten are the four of four.
    An interrupted run goes on after the last finished batch.
    """
    rows = select_rows(canonical.read_questions(questions / f"{side}.parquet"), select)
    place, shape = models.placement(dtype), prompts.TEMPLATES[template]
    with Ledger(out / "samples.jsonl", key="id") as ledger:
        todo = [(i, r) for i, r in enumerate(rows) if r["id"] not in ledger]
        if todo:
            tokenizer, net = models.load_tokenizer(model), models.load(model, dtype=place.dtype)
            with progress_bar(len(rows), f"{config.n} samples", "question", initial=len(ledger)) as bar:
                _sample(net, tokenizer, todo, config, shape, ledger, bar)
            del net
            models.free_memory()
        kept = list(ledger.rows.values())
    replies = [reply for row in kept for reply in row["replies"]]
    right = sum(reply["letter"] == row["gold"] for row in kept for reply in row["replies"])
    return {
        "prompts": len(kept), "samples": len(replies), "mean_sample_accuracy": right / len(replies),
        "unparsed": sum(r["letter"] is None for r in replies), "tokens": sum(r["tokens"] for r in replies),
        "template": template, "dtype": str(place.dtype), "device": place.device,
    }  # fmt: skip


@stage(version=1, also=prompts.wording)
def references(
    out: Path, config: SampleConfig, *, questions: Artifact, side: str = "train", select: dict | None = None
) -> dict:
    """The reference answers in the shape of samples: the strong models of the paper's pool, where there is none."""
    rows = select_rows(canonical.read_questions(questions / f"{side}.parquet"), select)
    with Ledger(out / "samples.jsonl", key="id") as ledger:
        for index, row in enumerate(rows):
            text = prompts.answer_text(row, config.answer_form)
            found = {"text": text, "letter": row["gold"], "rule": "reference", "strict": True, "tokens": len(text.split())}
            if row["id"] not in ledger:
                messages = prompts.question_prompt(row, config.answer_form)
                ledger.add({**_about(row, index, config), "prompt": messages, "replies": [{**found, "finished": True}]})
    return {"prompts": len(rows), "samples": len(rows)}


def _about(row: dict, index: int, config: SampleConfig) -> dict:
    return {
        "id": row["id"], "index": index, "subset": row["subset"], "concept": row["meta"].get("concept", row["id"]),
        "gold": row["gold"], "reference": prompts.answer_text(row, config.answer_form),
    }  # fmt: skip


def _sample(net, tokenizer, todo, config: SampleConfig, shape, ledger, bar) -> None:
    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_k, config.top_p, config.stop)
    messages = [prompts.question_prompt(row, config.answer_form) for _, row in todo]
    ids = [tokenizer(shape.render(m, tokenizer), add_special_tokens=False)["input_ids"] for m in messages]
    waiting: dict[int, dict[int, dict]] = {n: {} for n in range(len(todo))}

    def done(batch, made):
        for item, reply in zip(batch, made, strict=True):
            n, k = divmod(item, config.n)
            index, row = todo[n]
            found = parse(reply.text, row["options"], config.answer_form)
            waiting[n][k] = {
                "text": reply.text.strip(), "letter": found.letter, "rule": found.rule, "strict": found.strict,
                "tokens": reply.tokens, "finished": reply.finished,
            }  # fmt: skip
            if len(waiting[n]) == config.n:
                given = [waiting[n][k] for k in range(config.n)]
                ledger.add({**_about(row, index, config), "prompt": messages[n], "replies": given})
                bar.update(1)

    repeated = [p for p in ids for _ in range(config.n)]
    rngs = [item_rng(config.seed, row["id"], k) for _, row in todo for k in range(config.n)]
    generate(net, tokenizer, repeated, sampling, budget=config.batch_tokens, rngs=rngs, done=done)


def read_samples(artifact: Artifact) -> list[dict]:
    """Rows of `samples.jsonl` in the order of the questions."""
    with open(artifact / "samples.jsonl") as fh:
        return sorted((json.loads(line) for line in fh), key=lambda row: row["index"])


def read_feedback(artifact: Artifact) -> list[dict]:
    """Rows of `feedback.jsonl`, in the order of the prompts."""
    with open(artifact / "feedback.jsonl") as fh:
        return [json.loads(line) for line in fh]
