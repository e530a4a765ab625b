"""Anyone's model in the papers' tables: UltraMedical's nine medical tasks, reward benches, general abilities (notebook 40).

What is at hand is run, the rest is named with where it is to be had. Every number comes out of a stage, so an interrupted bench
goes on where it stopped.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from datetime import date
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import norm

from ultramed.core.client import spent
from ultramed.core.errors import ConfigError
from ultramed.core.ledger import read_lines
from ultramed.core.profile import BenchSection
from ultramed.core.schema import ASKED, EvalConfig, ExamConfig, SampleConfig, Strict
from ultramed.core.store import Artifact, file_name, stage
from ultramed.data import rows as canonical
from ultramed.data.catalog import get
from ultramed.data.exam import exam
from ultramed.data.messages import question_prompt
from ultramed.data.sources import at_hand
from ultramed.evaluate import stats
from ultramed.evaluate.accuracy import answers, read_answers, select_rows
from ultramed.evaluate.arms import Answers, artifacts_of
from ultramed.evaluate.generate import item_rng
from ultramed.evaluate.likelihood import lm_eval_prompt
from ultramed.evaluate.rerank import Votes
from ultramed.evaluate.sample import samples
from ultramed.evaluate.scorers import sensitivity
from ultramed.lm import models
from ultramed.lm.parsing import unread_by_reason
from ultramed.papers import published

TASKS = {  # column of UltraMedical's Table 2 -> (data set, subset)
    "medqa": ("medqa", "medqa"),
    "medmcqa": ("medmcqa", "medmcqa"),
    "pubmedqa": ("pubmedqa", "pubmedqa"),
    **{
        f"mmlu_{name}": ("mmlu_medical", name)
        for name in (
            "clinical_knowledge",
            "medical_genetics",
            "anatomy",
            "professional_medicine",
            "college_biology",
            "college_medicine",
        )
    },
}
EXAM_TASKS = {f"exam_{step}": ("exam", step) for step in ("step1", "step2", "step3")}  # where none of the nine is at hand
SUITES = ("medical", "reward", "general")


def named(text: str) -> tuple[str, str]:
    """(label, model) of 'my label=sft/0123abcd', or the model under its own name."""
    label, sign, model = text.partition("=")
    return (label.strip(), model.strip()) if sign and not set(label) & set("/:#") else (text, text)


def models_named(names: Iterable[str]) -> dict[str, Artifact]:
    """Label -> model. Raises ConfigError for two models of which one would take the other's place in tables and folders."""
    found: dict[str, Artifact] = {}
    for label, name in map(named, names):
        if taken := [other for other in found if file_name(other) == file_name(label)]:
            raise ConfigError(
                f"two models are called {taken[0]!r} and {label!r}: give each a name of its own, as in 'mine={name}'"
            )
        found[label] = models.resolve(name)
    return found


def told(config: BenchSection, suite: str) -> str:
    """The way of asking, with all that decides a number, as the leaderboard keeps it: rows asked otherwise stand beside."""
    parts = [config.protocol, f"{config.samples} samples" if config.samples else ""]
    writes = suite == "general" or config.protocol == "ultramedical"
    parts += [f"at most {config.max_new_tokens} tokens" if writes else ""]
    parts += [f"judge {config.judge}" if suite == "general" and config.judge else ""]
    return ", ".join(filter(None, parts))


def setting(config: BenchSection) -> EvalConfig:
    """How questions are asked: the harness's likelihood, 0-shot chain of thought, or the bare answer."""
    same = {"protocol": config.protocol, "batch_tokens": config.batch_tokens, "engine": config.engine}
    more = {"max_new_tokens": config.max_new_tokens} if config.protocol == "ultramedical" else {}
    return EvalConfig(**same, **ASKED[config.protocol] | more)


@dataclass(frozen=True)
class Questions:
    """The questions of some tasks of one data set, and which of them are asked."""

    name: str
    artifact: Artifact
    tasks: dict[str, str]  # subset -> task
    counts: dict[str, int]  # subset -> questions

    @property
    def select(self) -> dict[str, list[int]]:
        return {subset: [0, count] for subset, count in self.counts.items()}


def medical_questions(limit: int = 0, fetch: bool = False) -> tuple[list[Questions], list[str]]:
    """(questions of the tasks at hand, what is missing with where it is to be had); the bundled exam where none is. fetch: also
    from the hub, which nothing asks otherwise."""
    found, missing = [], []
    wanted: dict[str, dict[str, str]] = {}
    for task, (name, subset) in TASKS.items():
        wanted.setdefault(name, {})[subset] = task
    for name, tasks in wanted.items():
        if data := at_hand(name, fetch):
            found.append(_questions(name, data, tasks, limit))
        else:
            missing.append(get(name).where())
    if not found:
        tasks = {subset: task for task, (_, subset) in EXAM_TASKS.items()}
        found.append(_questions("exam", exam(ExamConfig()), tasks, limit))
    return found, missing


def _questions(name: str, artifact: Artifact, tasks: dict[str, str], limit: int) -> Questions:
    there = pd.Series([row["subset"] for row in canonical.read_questions(artifact / "test.parquet")]).value_counts()
    counts = {subset: min(int(there.get(subset, 0)), limit or 1 << 60) for subset in tasks}
    return Questions(name, artifact, tasks, {subset: n for subset, n in counts.items() if n})


def ask(config: BenchSection, model: Artifact, questions: Sequence[Questions]) -> Answers:
    """One model's answers to all questions, with a column `task`. With `samples` the majority of so many reasoned samples
    (UltraMedical's ensemble: T 0.7, top-p 0.9)."""
    frames, artifacts = [], [model]
    for part in questions:
        given = {"model": model, "questions": part.artifact, "select": part.select}
        if config.samples:
            asked = {name: getattr(config, name) for name in ("max_new_tokens", "batch_tokens", "engine")}
            drawn = samples(SampleConfig(n=config.samples, answer_form="reasoned", **asked), **given)
            made = Votes({0: {"model": drawn}}).select("self_consistency", Answers(pd.DataFrame(), (part.artifact,)))
        else:
            answered = answers(setting(config), **given)
            made = Answers(read_answers(answered).assign(seed=0), (answered, part.artifact))
        frames.append(made.frame.assign(task=made.frame.subset.map(part.tasks)))
        artifacts += artifacts_of([made])
    frame = pd.concat(frames, ignore_index=True)
    return Answers(frame.assign(id=frame.task + ":" + frame.id.astype(str)), tuple(dict.fromkeys(artifacts)))


def too_long(answered: Answers, questions: Sequence[Questions]) -> dict[str, int]:
    """Task -> questions that did not fit into the model's context: not asked, and not among the n."""
    left = {
        part.tasks[subset]: n - (answered.frame.task == part.tasks[subset]).sum()
        for part in questions
        for subset, n in part.counts.items()
    }
    return {task: int(n) for task, n in left.items() if n}


# ------------------------------------------------------------------------------------------------------------ summaries


def by_task(answered: Mapping[str, Answers]) -> pd.DataFrame:
    """A row a model and task, and a row 'mean of tasks': accuracy with its 95% interval, n, and the unparsed (truncated and
    refused replies are among them), which count as wrong; `upper` is the accuracy if all of them were right."""
    rows = []
    for name, made in answered.items():
        parts = []
        for task in [t for t in (*TASKS, *EXAM_TASKS) if (made.frame.task == t).any()]:
            part = made.frame[made.frame.task == task]
            parts.append({"model": name, "task": task, **numbers(stats.wilson(part.correct)), **outcomes_of(part)})
        mean = numbers(over_tasks(made.frame.correct.astype(float), made.frame.task).within(0, 1))
        upper = {"upper": np.mean([p["upper"] for p in parts])}
        rows += [*parts, {"model": name, "task": "mean of tasks", **mean, **outcomes_of(made.frame), **upper}]
    return pd.DataFrame(rows)


def outcomes_of(frame: pd.DataFrame) -> dict:
    """What became of replies without an answer; votes and likelihoods have no reply to look at."""
    left = frame[frame.letter.isna()]
    told = zip(left.reply, left.finished, strict=True) if {"reply", "finished"} <= {*frame} else ()
    return {"unparsed": len(left), **unread_by_reason(told), "upper": float((frame.correct | frame.letter.isna()).mean())}


def numbers(e: stats.Estimate) -> dict:
    return {**e.row(), "se": e.se}


def over_tasks(values: pd.Series, tasks: pd.Series) -> stats.Estimate:
    """The mean over tasks, as Table 2 averages, of a value a question, with a normal interval from the tasks' own errors: how
    many questions a task has is no chance. Where a task's values are all alike, its error is the rule of three's
    (stats.unseen)."""
    parts = [part for _, part in values.groupby(tasks)]
    errors = [part.sem() if part.nunique() > 1 else stats.unseen(np.ones(len(part)), np.arange(len(part)))[0] for part in parts]
    value, se = np.mean([part.mean() for part in parts]), np.sqrt(np.square(errors).sum()) / len(parts)
    width = norm.isf(0.025) * se
    return stats.Estimate(value, value - width, value + width, len(values), ((se, np.inf),))


def compare_models(answered: Mapping[str, Answers]) -> pd.DataFrame:
    """Every two models on the same questions, stratified by task (each task counts alike): difference with its interval, the
    smallest detectable at 80% power, p of a sign-flip test, Holm's over all pairs."""
    rows = []
    for a, b in combinations(answered, 2):
        both = answered[a].frame.merge(answered[b].frame, on=["id", "task"], suffixes=("_a", "_b"), validate="one_to_one")
        found = over_tasks(both.correct_a.astype(float) - both.correct_b.astype(float), both.task).within(-1, 1)
        p = stats.sign_flip(both.correct_a, both.correct_b, both.id, weights=stats.task_weights(both.task))
        interval = {"difference": found.value, "low": found.low, "high": found.high}
        rows.append({"A": a, "B": b, **interval, "detectable": stats.detectable(found.errors), "p": p, "n": len(both)})
    frame = pd.DataFrame(rows, columns=["A", "B", "difference", "low", "high", "detectable", "p", "n"])
    return frame.assign(p_holm=stats.holm(frame.p.tolist()))


def win_matrix(pairs: pd.DataFrame) -> pd.DataFrame:
    """Difference in points of the row's model over the column's; starred where Holm's p is below 0.05."""
    names = list(dict.fromkeys([*pairs.A, *pairs.B]))
    table = pd.DataFrame("", index=names, columns=names)
    for row in pairs.itertuples():
        star = "*" if row.p_holm < 0.05 else ""
        table.loc[row.A, row.B] = f"{100 * row.difference:+.1f}{star}"
        table.loc[row.B, row.A] = f"{-100 * row.difference:+.1f}{star}"
    return table.rename_axis("row less column").reset_index()


def beside_table2(table: pd.DataFrame) -> pd.DataFrame:
    """Table 2 as printed, and below it a row for each of ours."""
    printed = published.table("ultramedical_table2")
    shown = table.assign(task=table.task.replace("mean of tasks", "avg"), score=(100 * table.accuracy).round(1))
    ours = shown.pivot_table(index="model", columns="task", values="score", sort=False).reset_index()
    return pd.concat([printed, ours.assign(segment="measured here")], ignore_index=True)[printed.columns]


def timeline(table: pd.DataFrame) -> pd.DataFrame:
    """Figure 1: published MedQA accuracies by month, and ours today (`access` 'here')."""
    printed = published.table("ultramedical_medqa_timeline")
    mine = table[table.task == "medqa"]
    ours = pd.DataFrame({"model": mine.model, "released": f"{date.today():%Y-%m}", "access": "here"})
    return pd.concat([printed, ours.assign(medqa_usmle=100 * mine.accuracy)], ignore_index=True)


def rescored(answered: Answers, questions: Sequence[Questions]) -> pd.DataFrame:
    """Stored replies under other projects' rules (evaluate/scorers.py); empty where there are no replies (likelihood)."""
    if "reply" not in answered.frame:
        return pd.DataFrame()
    options = {}
    for part in questions:
        for row in canonical.read_questions(part.artifact / "test.parquet"):
            if row["subset"] in part.tasks:
                options[f"{part.tasks[row['subset']]}:{row['id']}"] = row["options"]
    frame = answered.frame
    form = next(a.manifest["config"]["answer_form"] for a in answered.artifacts if a.stage == "answers")
    return sensitivity(((r.reply, options[r.id], r.gold) for r in frame.itertuples()), form)


# ---------------------------------------------------------------------------------------------------------- option order


class ShuffleConfig(Strict):
    seed: int = 0


@stage(version=1)
def shuffled(out: Path, config: ShuffleConfig, *, questions: Artifact, select: dict) -> dict:
    """The selected questions with their options dealt to other letters; `meta.was` tells which letter each one had."""
    made = []
    for row in select_rows(canonical.read_questions(questions / "test.parquet"), select):
        letters = list(row["options"])
        order = item_rng("shuffle", config.seed, row["id"]).sample(letters, len(letters))
        options = {new: row["options"][old] for new, old in zip(letters, order, strict=True)}
        gold = letters[order.index(row["gold"])]
        made.append({**row, "options": options, "gold": gold, "meta": {"was": "".join(order)}})
    canonical.write_rows(out / "test.parquet", canonical.check_rows(canonical.Question, made, "shuffled"))
    return {"questions": len(made)}


def option_order(config: BenchSection, model: Artifact, questions: Sequence[Questions], first: Answers) -> dict:
    """Accuracy over `config.shuffle` other orders of the options, and what answers follow when an order changes.

    follows_letter: of questions where the two cannot both be kept, the share that keeps its letter and not its text. Prompts
    that show no options (PubMedQA's under likelihood) are no such questions.
    """
    accuracy, letter, text = [first.accuracy], 0, 0
    for seed in range(1, config.shuffle + 1):
        dealt = [
            Questions(q.name, shuffled(ShuffleConfig(seed=seed), questions=q.artifact, select=q.select), q.tasks, q.counts)
            for q in questions
        ]
        again = ask(config, model, dealt)
        accuracy.append(again.accuracy)
        was = {
            f"{q.tasks[row['subset']]}:{row['id']}": row["meta"]["was"]
            for q in dealt
            for row in canonical.read_questions(q.artifact / "test.parquet")
            if config.protocol != "likelihood" or lm_eval_prompt(row)[1][0] == " A"
        }
        both = first.frame.merge(again.frame, on="id", suffixes=("_a", "_b")).dropna(subset=["letter_a", "letter_b"])
        for row in both[both.id.isin(was)].itertuples():
            old = was[row.id]["ABCDEFGHIJ".index(row.letter_b)]  # the letter that today's choice had in the first order
            letter += row.letter_b == row.letter_a and old != row.letter_a
            text += old == row.letter_a and row.letter_b != row.letter_a
    moved = letter + text
    return {
        "orders": len(accuracy),
        "accuracy_min": min(accuracy),
        "accuracy_max": max(accuracy),
        "accuracy_sd": float(np.std(accuracy, ddof=1)) if len(accuracy) > 1 else 0.0,
        "follows_letter": letter / moved if moved else float("nan"),
        "n": moved,
    }


# -------------------------------------------------------------------------------------------------------------- estimate


@dataclass(frozen=True)
class Load:
    """What a bench of one model asks for before it starts: tokens read and, at most, written."""

    questions: int  # of reward benches: pairs
    prompt_tokens: int
    new_tokens: int

    def __add__(self, other: "Load") -> "Load":
        return Load(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def seconds(self, parameters: float, gflops: float, utilisation: float = 0.5) -> float:
        """Of weights here: two operations a parameter and token, at a part of the machine's matrix speed."""
        return 2 * parameters * (self.prompt_tokens + self.new_tokens) / (gflops * 1e9 * utilisation)


def paid(artifacts: Sequence[Artifact]) -> dict:
    """Requests and tokens of servers that results took, faults included; empty for weights."""
    ledgers = [art / "requests.jsonl" for art in artifacts if (art / "requests.jsonl").exists()]
    return spent(row for path in ledgers for row in read_lines(path)) if ledgers else {}


def estimate(config: BenchSection, questions: Sequence[Questions], shown: int = 200) -> Load:
    """Counted in characters (four a token) of some of each data set's questions; at most, since replies may end early."""
    total = prompt = 0
    for part in questions:
        count = sum(part.counts.values())
        rows = [row for row in canonical.read_questions(part.artifact / "test.parquet") if row["subset"] in part.tasks]
        some = canonical.spread(rows, shown)
        prompt += count * sum(len(question_prompt(row, "reasoned")[-1]["content"]) for row in some) / len(some) / 4
        total += count
    longest = {"likelihood": 1, "greedy": 32}.get(config.protocol, config.max_new_tokens)
    times = config.samples or 1
    return Load(total, round(prompt * times * (1 + config.shuffle)), total * longest * times * (1 + config.shuffle))
