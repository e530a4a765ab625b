"""General abilities of anyone's model: GSM8K, MMLU, and MT-Bench and AlpacaEval through a judge."""

from collections.abc import Mapping

import pandas as pd

from ultramed.annotate.judge import GeneralConfig, LLMConfig, pairwise
from ultramed.annotate.open_ended import as_pairs, grades, outcomes, win_rate
from ultramed.core.client import ServerConfig
from ultramed.core.errors import ConfigError, ServerError
from ultramed.core.profile import BenchSection
from ultramed.core.store import Artifact
from ultramed.data import rows as canonical
from ultramed.data.catalog import get
from ultramed.data.sources import at_hand
from ultramed.evaluate import stats
from ultramed.evaluate.arms import Answers
from ultramed.evaluate.open_ended import ReplyConfig, read_replies, replies
from ultramed.experiments import general as abilities
from ultramed.experiments.bench import Load, Questions, estimate, numbers, outcomes_of, setting


def gsm8k(config: BenchSection, model: Artifact, data: Artifact) -> tuple[dict, Artifact]:
    """0-shot, greedy (experiments/general.py)."""
    asked = {"count": config.limit, "max_new_tokens": config.max_new_tokens, "batch_tokens": config.batch_tokens}
    return _of("gsm8k", abilities.gsm8k(model, data, **asked))


def mmlu(config: BenchSection, model: Artifact, data: Artifact) -> tuple[dict, Artifact]:
    """All 57 subjects, by the bench's protocol (experiments/general.py)."""
    return _of("mmlu", abilities.mmlu(model, data, per_subject=config.limit, config=setting(config)))


def _of(task: str, made: Answers) -> tuple[dict, Artifact]:
    return {"task": task, **numbers(stats.wilson(made.frame.correct)), **outcomes_of(made.frame)}, made.artifacts[-1]


def mt_bench(config: BenchSection, model: Artifact, data: Artifact) -> tuple[dict, Artifact]:
    """Both turns graded from 1 to 10 by the judge; the row holds tenths, with an interval over questions."""
    asked = ReplyConfig(max_new_tokens=config.max_new_tokens, batch_tokens=config.batch_tokens, limit=config.limit, turns=True)
    marked = grades(LLMConfig(server=ServerConfig.of(config.judge)), replies=replies(asked, model=model, data=data))
    frame = pd.read_json(marked / "grades.jsonl", lines=True)
    read = frame.dropna(subset="score")
    e = stats.clustered(read.score / 10, read.question).within(0, 1)
    return {"task": "mt_bench, of 10", **numbers(e), "unparsed": marked.metrics["unread"]}, marked


def alpaca_eval(config: BenchSection, model: Artifact, data: Artifact) -> tuple[dict, Artifact]:
    """Replies against AlpacaEval 2's baseline, judged in both orders; the row holds the length-controlled win rate, and the
    plain one beside it."""
    asked = ReplyConfig(max_new_tokens=config.max_new_tokens, batch_tokens=config.batch_tokens, limit=config.limit)
    said = replies(asked, model=model, data=data)
    frame = read_replies(said)
    empty, same = frame[frame.reply.str.strip() == ""], frame.reply == frame.reference  # no judge need be asked about these
    settled = pd.DataFrame({"worth": 0.0, "longer": -empty.reference.str.len()})
    parts, unread, artifact = [settled, pd.DataFrame({"worth": [0.5] * same.sum(), "longer": 0})], 0, said
    if len(empty) + same.sum() < len(frame):
        pairs = as_pairs(None, ours=said)
        artifact = pairwise(GeneralConfig(server=ServerConfig.of(config.judge), see_reference=False), pairs=pairs)
        parts, unread = [outcomes(artifact, pairs)[["worth", "longer"]], *parts], artifact.metrics["unread"]
    won = pd.concat([part for part in parts if len(part)] or parts)
    if won.empty:
        raise ServerError(f"no verdict of {config.judge} on AlpacaEval could be read: is it a model that answers in JSON?")
    controlled = numbers(stats.length_controlled(won.worth, won.longer))
    name, plain = "alpaca_eval, length-controlled", win_rate(won).value
    return {"task": name, **controlled, "unparsed": unread, "plain win rate": plain}, artifact


GENERAL = {"gsm8k": gsm8k, "mmlu": mmlu, "mt_bench": mt_bench, "alpaca_eval": alpaca_eval}
JUDGED = ("mt_bench", "alpaca_eval")


def general_tasks(config: BenchSection) -> tuple[dict[str, Artifact], list[str]]:
    """(task at hand -> its data, what is missing with where it is to be had). Raises ConfigError where nothing is at hand."""
    found, missing = {}, []
    for name in GENERAL:
        if name in JUDGED and not config.judge:
            missing.append(f"{name}: needs a judge (--judge http://host/v1#name)")
        elif data := at_hand(name, config.fetch):
            found[name] = data
        else:
            missing.append(get(name).where())
    if not found:
        raise ConfigError("no general task is at hand (--fetch gets what the hub has): " + "; ".join(missing))
    return found, missing


def general(config: BenchSection, model: Artifact, tasks: Mapping[str, Artifact]) -> tuple[pd.DataFrame, list[Artifact]]:
    """(a row a task, artifacts)."""
    rows, artifacts = zip(*(GENERAL[name](config, model, data) for name, data in tasks.items()), strict=True)
    return pd.DataFrame(rows), list(artifacts)


def general_estimate(config: BenchSection, tasks: Mapping[str, Artifact]) -> tuple[Load, Load]:
    """(the model's, the judge's) for the general suite, counted likewise."""
    asked = judged = Load(0, 0, 0)
    for name, data in tasks.items():
        if name == "mmlu":
            counts = {
                subject: min(n, config.limit or n) for subject, n in canonical.subset_sizes(data / "test.parquet").items()
            }
            asked += estimate(config, [Questions(name, data, {subject: subject for subject in counts}, counts)])
            continue
        rows = canonical.spread(canonical.read_instructions(data / "test.parquet"), config.limit)
        turns = 2 if name == "mt_bench" else 1
        prompt = round(turns * sum(len(turn["content"]) for row in rows for turn in row["prompt"]) / 4)
        asked += Load(len(rows), prompt, turns * len(rows) * config.max_new_tokens)
        if name in JUDGED:  # both turns are graded, or two replies compared in both orders
            read, write = 2 * (prompt + 2 * len(rows) * config.max_new_tokens), LLMConfig.model_fields["max_tokens"].default
            judged += Load(len(rows), read, 2 * len(rows) * write)
    return asked, judged
