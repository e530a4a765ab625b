"""The stage that asks a model questions and reads its answers, one ledger row an item."""

from pathlib import Path

import pandas as pd

from ultramed.core.errors import ConfigError
from ultramed.core.ledger import Ledger, read_lines
from ultramed.core.schema import EvalConfig
from ultramed.core.store import Artifact, digest, stage
from ultramed.data import rows as canonical
from ultramed.data.messages import question_prompt
from ultramed.evaluate.engine import asking, weights
from ultramed.evaluate.generate import Sampling, generate, item_rng
from ultramed.evaluate.likelihood import encode_pair, lm_eval_prompt, score
from ultramed.evaluate.stats import wilson
from ultramed.evaluate.vllm import checks
from ultramed.lm import models
from ultramed.lm.device import placement
from ultramed.lm.parsing import accepted, parse, unread_by_reason
from ultramed.lm.templates import wording
from ultramed.train.launch import clear

TOO_LONG = "too long"  # in place of a parser's rule: the question did not fit into the model's context
PREFIX = "The Answer to the question is:"  # what MedAlpaca puts into the model's mouth


@stage(version=6, also=wording)
def answers(
    out: Path,
    config: EvalConfig,
    *,
    model: Artifact,
    questions: Artifact,
    side: str = "test",
    select: dict | None = None,
    template: str | None = None,
    dtype: str = "auto",
    quantize: str | None = None,
) -> dict:
    """Ask `model` the question rows in `questions/<side>.parquet` and write `answers.jsonl`.

    select: {'subset': [start, stop]} takes a slice of each named subset; None takes all. An interrupted run goes on
    after its last finished item. Returns accuracy and outcome counts: correct + wrong + unparsed = n. Questions that do not
    fit into the model's context are not asked and not among the n; their number is `too_long`.
    """
    rows = select_rows(canonical.read_questions(questions / f"{side}.parquet"), select)
    place = placement(dtype)
    clear(out)
    with Ledger(out / "answers.jsonl", key="id") as ledger:
        todo = [r for r in rows if r["id"] not in ledger]
        if todo:
            opening = {"budget": config.batch_tokens, "dtype": place.dtype, "quantize": quantize}
            opening |= {"engine": config.engine, "tensor_parallel": config.tensor_parallel}
            what = (len(rows), f"{config.protocol} answers", "question")
            with asking(ledger, *what, model, template, out, **opening) as (engine, bar):

                def unfit(indices: list[int]) -> None:
                    ledger.add(*(record(todo[i], None, TOO_LONG, False) for i in indices))
                    bar.update(len(indices))

                ASK[config.protocol](engine, todo, config, ledger, bar, unfit)
        result = [ledger.rows[r["id"]] for r in rows]
    metadata = {
        "protocol": config.protocol,
        "template": models.template_of(model, template).name,
        "dtype": str(place.dtype),
        "device": place.device,
    }
    return {**summary(result), **metadata, "quantize": quantize, **checks(out)}


def select_rows(rows: list[dict], select: dict | None) -> list[dict]:
    """Slices of subsets, in the order of the file. Raises ConfigError for a slice that is not all there."""
    if select is None:
        return rows
    out = []
    for subset, (start, stop) in select.items():
        part = [r for r in rows if r["subset"] == subset]
        if stop > len(part):
            raise ConfigError(f"questions {start} to {stop} of {subset!r} asked for, but it has {len(part)}")
        out += part[start:stop]
    return out


def summary(result: list[dict]) -> dict:
    """n, accuracy and outcome counts of ledger rows; `truncated` and `refused` are among the unparsed. `bounds`: accuracy if
    all unparsed replies were wrong, and if all were right."""
    outcome = {"correct": 0, "wrong": 0, "unparsed": 0}
    long = sum(row["rule"] == TOO_LONG for row in result)
    result = [row for row in result if row["rule"] != TOO_LONG]
    for row in result:
        outcome["unparsed" if row["letter"] is None else "correct" if row["correct"] else "wrong"] += 1
    n = len(result)
    why = unread_by_reason((row["reply"], row["finished"]) for row in result if row["letter"] is None and "reply" in row)
    bounds = [outcome["correct"] / n, (outcome["correct"] + outcome["unparsed"]) / n] if n else None
    strict = sum(r["strict"] for r in result)
    return {
        "n": n,
        "accuracy": outcome["correct"] / n if n else None,
        **outcome,
        **why,
        "bounds": bounds,
        "well_formed": strict,
        "too_long": long,
    }


def record(row: dict, letter: str | None, rule: str, strict: bool, **more) -> dict:
    """A ledger row: a question's answer by a named rule, and whether it is right."""
    return {
        "id": row["id"],
        "subset": row["subset"],
        "concept": row["meta"].get("concept", row["id"]),
        "gold": row["gold"],
        "letter": letter,
        "correct": letter == row["gold"],
        "rule": rule,
        "strict": strict,
        **more,
    }


def _likelihood(engine, rows, config, ledger, bar, unfit):
    """The option whose letter (or text) is most likely after the prompt; ties go to the first, as in the harness."""
    local, items = weights(engine, "the likelihood protocol"), []
    for row in rows:
        if config.likelihood_prompt == "lm_eval":
            context, endings = lm_eval_prompt(row)
            pairs = [encode_pair(local.tokenizer, context, e) for e in endings]
            items.append((pairs[0][0], [p[1] for p in pairs]))
        else:
            closed = [{"role": "user", "content": row["question"]}]
            asked = closed if config.likelihood_prompt == "cloze" else question_prompt(row, config.answer_form)
            wanted = row["options"].keys() if config.likelihood_target == "letter" else row["options"].values()
            items.append((local.ids(local.shown(asked)), [local.ids(w) for w in wanted]))

    def done(batch, scores):
        made = []
        for i, logps in zip(batch, scores, strict=True):
            letter = list(rows[i]["options"])[max(range(len(logps)), key=logps.__getitem__)]
            made.append(record(rows[i], letter, "likelihood", True, logps=[round(x, 5) for x in logps]))
        ledger.add(*made)
        bar.update(len(made))

    fit = local.fitting([context + max(endings, key=len) for context, endings in items], 0, unfit)

    def tell(batch, scores):
        done([fit[i] for i in batch], scores)

    score(local.net, local.tokenizer, [items[i] for i in fit], budget=config.batch_tokens, done=tell)


def _greedy(engine, rows, config, ledger, bar, unfit):
    asked = [question_prompt(row, config.answer_form) for row in rows]

    def done(batch, replies):
        made = zip(batch, replies, strict=True)
        ledger.add(*(_reply(rows[i], r, config, engine.shown(asked[i]), 1) for i, r in made))
        bar.update(len(batch))

    engine.replies(asked, Sampling(config.max_new_tokens), done, unfit=unfit)


def _reply(row, reply, config, prompt, tries) -> dict:
    found = parse(reply.text, row["options"], config.answer_form)
    return record(
        row,
        found.letter,
        found.rule,
        found.strict,
        reply=reply.text,
        tokens=reply.tokens,
        finished=reply.finished,
        tries=tries,
        prompt_hash=digest(prompt),
    )


def _medalpaca(engine, rows, config, ledger, bar, unfit):
    """Sampled answers behind a forced beginning, asked again up to `tries` times until one is accepted as an answer; else the
    last one stays.

    MedAlpaca, eval/eval_usmle.py: prompt, beginning, T 0.4, top-k 50, top-p 0.9, 128 new tokens, and what is accepted. It
    saves the replies and scores none, so how they are read is ours (lm/parsing.py), whatever `answer_form` says.
    """
    config = config.model_copy(update={"answer_form": "medalpaca"})
    local = weights(engine, "MedAlpaca's forced beginning")
    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_k, config.top_p)
    # No space at the end: it belongs to the answer's first token, so that " B" is what the model is asked for.
    texts = [local.shown(question_prompt(row, "medalpaca")) + PREFIX for row in rows]
    ids = [local.ids(t) for t in texts]
    left, last = local.fitting(ids, config.max_new_tokens, unfit), {}
    for attempt in range(1, config.tries + 1):
        rngs = [item_rng(config.seed, rows[i]["id"], attempt) for i in left]
        given = [ids[i] for i in left]
        replies = generate(local.net, local.tokenizer, given, sampling, budget=config.batch_tokens, rngs=rngs)
        again = []
        for i, reply in zip(left, replies, strict=True):
            last[i] = _reply(rows[i], reply, config, texts[i], attempt)
            if accepted(reply.text) or attempt == config.tries:
                ledger.add(last[i])
                bar.update(1)
            else:
                again.append(i)
        left = again
        if not left:
            return


def _ultramedical(engine, rows, config, ledger, bar, unfit):
    """0-shot chain of thought, greedy: UltraMedical, section 4.1; how a reply is read is ours, its own was not released."""
    _greedy(engine, rows, config.model_copy(update={"answer_form": "reasoned"}), ledger, bar, unfit)


ASK = {"likelihood": _likelihood, "greedy": _greedy, "medalpaca": _medalpaca, "ultramedical": _ultramedical}


def by_likelihood(target: str) -> dict[str, str]:
    """Changes to an EvalConfig under which the options' letters or texts (`target`) are read instead of a reply. That takes the
    weights, whoever writes the replies."""
    return {"protocol": "likelihood", "likelihood_target": target, "engine": "transformers"}


def read_answers(artifact: Artifact) -> pd.DataFrame:
    """The ledger as a table, one row a question that was asked."""
    return pd.DataFrame([row for row in read_lines(artifact / "answers.jsonl") if row["rule"] != TOO_LONG])


def hit_scores(checked: Artifact, answers: pd.DataFrame) -> pd.DataFrame:
    """Accuracy on questions that a check hit and on the others: how, questions, accuracy, n.

    answers: columns id (which names its data set) and correct, one row a question. 'any': hit by at least one check.
    """
    hits = pd.read_parquet(checked / "hits.parquet")
    groups = {"any": set(hits.test_id), **{how: set(part.test_id) for how, part in hits.groupby("how", sort=False)}}
    out = []
    for how, ids in groups.items():
        for name, part in (("hit", answers[answers.id.isin(ids)]), ("clean", answers[~answers.id.isin(ids)])):
            shown = str(wilson(part.correct)) if len(part) else None
            out.append({"how": how, "questions": name, "accuracy": shown, "n": len(part)})
    return pd.DataFrame(out)
