"""Several sampled replies to every prompt: candidates for preferences, votes for self-consistency, food for re-ranking."""

from pathlib import Path

from ultramed.core.ledger import Ledger, read_lines
from ultramed.core.schema import SampleConfig
from ultramed.core.store import Artifact, stage
from ultramed.data import rows as canonical
from ultramed.data.messages import answer_text, question_prompt
from ultramed.evaluate.accuracy import select_rows
from ultramed.evaluate.engine import asking
from ultramed.evaluate.generate import Sampling, item_rng
from ultramed.evaluate.vllm import checks
from ultramed.lm import models
from ultramed.lm.device import placement
from ultramed.lm.parsing import parse
from ultramed.lm.templates import wording
from ultramed.train.launch import clear


@stage(version=7, also=wording)
def samples(
    out: Path,
    config: SampleConfig,
    *,
    model: Artifact,
    questions: Artifact,
    side: str = "test",
    select: dict | None = None,
    template: str | None = None,
    dtype: str = "auto",
) -> dict:
    """`config.n` replies to each question of `questions/<side>.parquet`; `samples.jsonl` has a row a question.

    Reply k of a question depends on the seed, the question and k only: the first four of ten are the four of four. An
    interrupted run goes on after the last finished reply (`replies.jsonl`). Questions that do not fit into the model's context
    get no replies; `too_long` counts them.
    """
    rows = select_rows(canonical.read_questions(questions / f"{side}.parquet"), select)
    place = placement(dtype)
    clear(out)
    with Ledger(out / "samples.jsonl", key="id") as ledger:
        todo = [(i, r) for i, r in enumerate(rows) if r["id"] not in ledger]
        if todo:
            opening = {"budget": config.batch_tokens, "dtype": place.dtype}
            opening |= {"engine": config.engine, "tensor_parallel": config.tensor_parallel}
            what = (len(rows), f"{config.n} samples", "question")
            with asking(ledger, *what, model, template, out, **opening) as (engine, bar):
                _sample(engine, todo, config, ledger, out, bar)
        ledger.reorder(sorted(ledger.rows, key=lambda name: ledger.rows[name]["index"]))
        kept = [row for row in ledger.rows.values() if row["replies"]]
    (out / "replies.jsonl").unlink(missing_ok=True)  # all of it is in samples.jsonl
    replies = [reply for row in kept for reply in row["replies"]]
    right = sum(reply["letter"] == row["gold"] for row in kept for reply in row["replies"])
    return {
        "prompts": len(kept),
        "too_long": len(rows) - len(kept),
        "samples": len(replies),
        "mean_sample_accuracy": right / len(replies) if replies else None,
        "unparsed": sum(r["letter"] is None for r in replies),
        "tokens": sum(r["tokens"] for r in replies),
        "template": models.template_of(model, template).name,
        "dtype": str(place.dtype),
        "device": place.device,
        **checks(out),
    }


@stage(version=2, also=wording)
def references(
    out: Path,
    config: SampleConfig,
    *,
    questions: Artifact,
    side: str = "train",
    select: dict | None = None,
    guess: bool = False,
) -> dict:
    """`config.n` answers without a model, in the asked form: the reference answer, or guesses among all options.

    The reference stands where the paper's pool has GPT-4. The guesser is the pool's weakest member, and the only one
    that is wrong in perfect form: without it, wrong candidates differ from right ones in form, and that is all that a
    reward model learns.
    """
    rows = select_rows(canonical.read_questions(questions / f"{side}.parquet"), select)
    with Ledger(out / "samples.jsonl", key="id") as ledger:
        for index, row in enumerate(rows):
            if row["id"] in ledger:
                continue
            rng = item_rng(config.seed, row["id"], "guess")
            letters = [rng.choice(list(row["options"])) if guess else row["gold"] for _ in range(config.n)]
            texts = [answer_text({**row, "gold": letter}, config.answer_form) for letter in letters]
            how = {"rule": "guess" if guess else "reference", "strict": True, "finished": True}
            replies = [
                {"text": t, "letter": letter, "tokens": len(t.split()), **how} for t, letter in zip(texts, letters, strict=True)
            ]
            messages = question_prompt(row, config.answer_form)
            ledger.add({**_about(row, index, config), "prompt": messages, "replies": replies})
    return {"prompts": len(rows), "samples": config.n * len(rows)}


def _about(row: dict, index: int, config: SampleConfig) -> dict:
    return {
        "id": row["id"],
        "index": index,
        "subset": row["subset"],
        "concept": row["meta"].get("concept", row["id"]),
        "gold": row["gold"],
        "reference": answer_text(row, config.answer_form),
    }


def _sample(engine, todo, config: SampleConfig, ledger, out: Path, bar) -> None:
    """Ask for the replies of `todo` that `replies.jsonl` lacks; a question whose replies are all there goes into the ledger."""
    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_k, config.top_p, config.stop)
    messages = [question_prompt(row, config.answer_form) for _, row in todo]
    with Ledger(out / "replies.jsonl") as made:
        names = [f"{row['id']}#{k}" for _, row in todo for k in range(config.n)]
        asked = [item for item, name in enumerate(names) if name not in made]

        def keep(questions: set[int]) -> None:
            for n in sorted(questions):
                own = names[n * config.n : (n + 1) * config.n]
                if all(name in made for name in own):
                    index, row = todo[n]
                    given = [{k: v for k, v in made.rows[name].items() if k != "key"} for name in own]
                    ledger.add({**_about(row, index, config), "prompt": messages[n], "replies": given})
                    bar.update(1)

        def done(batch, replies):
            for i, reply in zip(batch, replies, strict=True):
                _, row = todo[asked[i] // config.n]
                found = parse(reply.text, row["options"], config.answer_form)
                read = {"letter": found.letter, "rule": found.rule, "strict": found.strict}
                how = {"tokens": reply.tokens, "finished": reply.finished}
                made.add({"key": names[asked[i]], "text": reply.text.strip(), **read, **how})
            keep({asked[i] // config.n for i in batch})

        def unfit(items: list[int]) -> None:
            for n in sorted({asked[i] // config.n for i in items}):
                index, row = todo[n]
                ledger.add({**_about(row, index, config), "prompt": messages[n], "replies": []})
                bar.update(1)

        keep({n for n in range(len(todo)) if all(names[n * config.n + k] in made for k in range(config.n))})
        rngs = [item_rng(config.seed, todo[item // config.n][1]["id"], item % config.n) for item in asked]
        if asked:
            engine.replies([messages[item // config.n] for item in asked], sampling, done, rngs, unfit)


def read_samples(artifact: Artifact) -> list[dict]:
    """Rows of `samples.jsonl` in the order of the questions, without those that did not fit into the model's context."""
    return sorted((row for row in read_lines(artifact / "samples.jsonl") if row["replies"]), key=lambda row: row["index"])


def read_feedback(artifact: Artifact) -> list[dict]:
    """Rows of `feedback.jsonl`, in the order of the prompts."""
    return read_lines(artifact / "feedback.jsonl")
