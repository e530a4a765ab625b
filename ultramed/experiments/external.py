"""Where other papers measured UltraMedical's models (notebook 30): questions, rewards, report text, languages, history taking.

Each measure returns a row a policy and published cell: `arm`, `cell` (a key of PUBLISHED_ROWS), `value`, its interval where it
has one, and `n`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from ultramed.annotate.judge import LLMConfig
from ultramed.annotate.open_ended import consistency, correctness
from ultramed.annotate.pair_sets import pairs_from
from ultramed.core.profile import Profile
from ultramed.core.store import Artifact
from ultramed.data.rows import read_instructions
from ultramed.data.sources import at_hand
from ultramed.evaluate import stats
from ultramed.evaluate.arms import artifacts_of
from ultramed.evaluate.history import HistoryConfig, histories, history_scores, read_histories
from ultramed.evaluate.language import ENGLISH, LanguageProxy, english_in, in_language
from ultramed.evaluate.open_ended import ReplyConfig, bleu1, read_replies, replies
from ultramed.evaluate.reward_bench import sections
from ultramed.experiments import bench, bench_reward

CURE_MED = {"temperature": 0.6, "top_p": 0.95, "repetition_penalty": 1.2}  # decoding of its repository
PROXY = "proxy"
QUESTIONS = ("medqa", "medmcqa", "pubmedqa")
REWARDS = {"rewardbench": "rewardbench average", "medical_rewardbench": "medical easy"}  # data set -> cell


@dataclass(frozen=True)
class Measured:
    """A measure of every policy, as a reader wants it (`table`) and as numbers (`values`). `protocol`: what was measured on
    which data, as the scorecard keeps it."""

    table: pd.DataFrame
    values: pd.DataFrame
    artifacts: tuple[Artifact, ...]
    protocol: str


def _value(arm: str, cell: str, e: stats.Estimate) -> dict:
    return {"arm": arm, "cell": cell, "value": 100 * e.value, "low": 100 * e.low, "high": 100 * e.high, "n": e.n}


def questions_at_hand(profile: Profile) -> list[bench.Questions]:
    """`open_rows` test questions of each of MedQA, MedMCQA and PubMedQA that is at hand."""
    there, _ = bench.medical_questions(profile.open_rows, fetch=profile.prefer == "hub")
    return [questions for questions in there if questions.name in QUESTIONS]


def measure_questions(profile: Profile, policies: Mapping[str, Artifact], asked: list[bench.Questions]) -> Measured:
    """Accuracy on each set of questions, asked in the bench's way, in per cent."""
    answered = {name: bench.ask(profile.bench, policy, asked) for name, policy in policies.items()}
    values = [
        _value(name, task, stats.wilson(part.correct))
        for name, made in answered.items()
        for task, part in made.frame.groupby("task", sort=False)
    ]
    protocol = f"questions: {profile.bench.protocol}, {profile.open_rows} of each set"
    return Measured(_shown(values), pd.DataFrame(values), artifacts_of(answered), protocol)


def rewards_at_hand(profile: Profile) -> dict[str, Artifact]:
    """The reward benches that others ran UltraMedRM on, as far as they are at hand: name -> pairs."""
    there = {name: at_hand(name, fetch=profile.prefer == "hub") for name in REWARDS}
    return {name: pairs_from(data, side="test") for name, data in there.items() if data}


def measure_rewards(profile: Profile, rewards: Mapping[str, Artifact]) -> Measured:
    """RewardBench's average over its sections and the easy part of Medical RewardBench, in per cent, where they are at hand.
    rewards: name -> reward model."""
    values, artifacts = [], []
    for arm, reward in rewards.items():
        for name, pairs in rewards_at_hand(profile).items():
            table, _, scored = bench_reward.score_reward(name, reward, pairs)
            artifacts += [reward, pairs, scored]
            if name == "rewardbench":
                mean = sections(table).iloc[-1]
                values.append({"arm": arm, "cell": REWARDS[name], "value": 100 * mean.accuracy, "n": int(mean.n)})
            else:
                easy = table[table.subset == "easy"].iloc[0]
                values.append(_value(arm, REWARDS[name], stats.Estimate(easy.accuracy, easy.low, easy.high, int(easy.n))))
    return Measured(_shown(values), pd.DataFrame(values), tuple(artifacts), "rewards: the benches' own pairs")


def _shown(values: list[dict]) -> pd.DataFrame:
    """A row an arm and a column a cell, as text."""

    def text(row: dict) -> str:
        interval = f" [{row['low']:.1f}, {row['high']:.1f}]" if "low" in row else ""
        return f"{row['value']:.1f}{interval} (n = {row['n']})"

    frame = pd.DataFrame([{"arm": row["arm"], "cell": row["cell"], "shown": text(row)} for row in values])
    return frame.pivot_table(index="arm", columns="cell", values="shown", aggfunc="first", sort=False).reset_index()


def measure_report_text(profile: Profile, policies: Mapping[str, Artifact], notes: Artifact) -> Measured:
    """BLEU-1 of note sections written out of dialogues (MTS-Dialog); the dialogue itself, copied, is the least to beat."""
    config, rows, artifacts = ReplyConfig(limit=profile.open_rows, max_new_tokens=profile.open_tokens), [], [notes]
    for name, policy in policies.items():
        answered = replies(config, model=policy, data=notes)
        frame = read_replies(answered)
        rows.append({"arm": name, "cell": "report", "value": bleu1(list(frame.reply), list(frame.reference)), "n": len(frame)})
        artifacts += [policy, answered]
    copied = [prompt[-1]["content"].partition("\n\n")[2] for prompt in frame.prompt]
    values = pd.DataFrame(rows)
    rows.append({"arm": "the dialogue, copied", "value": bleu1(copied, list(frame.reference)), "n": len(frame)})
    table = pd.DataFrame(rows)[["arm", "value", "n"]].rename(columns={"arm": "text by", "value": "BLEU-1"})
    return Measured(table, values, tuple(artifacts), "report text: MTS-Dialog, test 1")


def learn_languages(data: Artifact) -> LanguageProxy:
    """The proxy, learned from the training side's questions and answers, and from its English chains of thought."""
    told = []
    for row in read_instructions(data / "train.parquet"):
        language = row["meta"]["language"]
        told += [(row["prompt"][-1]["content"], language), (row["completion"][0]["content"], language)]
        told.append((english_in(row["meta"]["reasoning"]), ENGLISH))
    return LanguageProxy(*map(list, zip(*told, strict=True)))


def measure_language(
    profile: Profile, policies: Mapping[str, Artifact], data: Artifact, proxy: LanguageProxy, judge: LLMConfig | None
) -> Measured:
    """CURE-Med's consistency, in per cent: replies that the judge finds in the question's language throughout, with a proper
    end. Without a judge the proxy stands in for it. With one also the share that is right; an unread verdict counts as a no."""
    config = ReplyConfig(limit=profile.open_rows, max_new_tokens=profile.open_tokens, **CURE_MED)
    rows, values, artifacts, asked = [], [], [data], in_language(None, data=data)
    for name, policy in policies.items():
        answered = replies(config, model=policy, data=asked)
        frame = read_replies(answered)
        told = zip(frame.reply, frame.meta, strict=True)
        kept = stats.wilson([proxy.consistent(text, meta["language"]) for text, meta in told])
        ended = _share(len(frame) - answered.metrics["cut_off"] - answered.metrics["too_long"], len(frame))
        row = {"replies by": name, PROXY: str(kept), "ended by themselves": str(ended), "n": kept.n}
        artifacts += [policy, answered]
        if judge:
            judged = {"consistent": consistency(judge, replies=answered), "correct": correctness(judge, replies=answered)}
            shares = {what: _share(art.metrics[what], art.metrics["replies"]) for what, art in judged.items()}
            kept = shares["consistent"]
            row |= {f"{what}, by the judge": str(e) for what, e in shares.items()}
            row["not read"] = sum(art.metrics["unread"] for art in judged.values())
            artifacts += judged.values()
        rows.append(row)
        values.append(_value(name, "language", kept))
    how = f"judged by {judge.server.model}" if judge else f"{PROXY}, no judge"
    table = pd.DataFrame(rows).rename(columns={PROXY: f"{PROXY}: all of it in the language"})
    return Measured(table, pd.DataFrame(values), tuple(artifacts), f"language: {how}; CURE-Med's training side")


def _share(count: int, total: int) -> stats.Estimate:
    return stats.wilson([True] * count + [False] * (total - count))


def measure_history(profile: Profile, policies: Mapping[str, Artifact], cases: Artifact, judge: LLMConfig | None) -> Measured:
    """Precision and coverage of a policy's questions to a patient, and its diagnoses, in per cent. The patient is scripted,
    or the judge."""
    config = HistoryConfig(limit=profile.open_rows, patient=judge.server if judge else None)
    rows, values, artifacts = [], [], [cases]
    for name, policy in policies.items():
        talks = histories(config, model=policy, data=cases)
        frame = read_histories(talks)
        scores = history_scores(frame)
        rows.append({"questions by": name, **{measure: str(e) for measure, e in scores.items()}, "n": len(frame)})
        values.append(_value(name, "history", scores["precision"]))
        artifacts += [policy, talks]
    patient = f"played by {judge.server.model}" if judge else "scripted"
    protocol = f"history taking: {config.questions} questions, patient {patient}"
    return Measured(pd.DataFrame(rows), pd.DataFrame(values), tuple(artifacts), protocol)


def first_talk(measured: Measured, turns: int = 3) -> str:
    """The beginning of the last policy's first history, to be looked at."""
    first = read_histories(measured.artifacts[-1]).iloc[0]
    told = zip(first.questions[:turns], first.answers[:turns], strict=True)
    lines = [f"doctor:  {question[:160]}\npatient: {answer[:160]}" for question, answer in told]
    return "\n".join([*lines, f"diagnoses: {'; '.join(first.diagnoses)} | right: {first.gold}"])


PUBLISHED_ROWS = {  # cell -> row of the table of other papers' measurements
    "medqa": "Medical question answering / MedQA / accuracy / size not stated",
    "medmcqa": "Medical question answering / MedMCQA / accuracy / size not stated",
    "pubmedqa": "Medical question answering / PubMedQA / accuracy / size not stated",
    "rewardbench average": "Reward modelling / RewardBench / average / 8B",
    "medical easy": "Reward modelling / UltraMedical (test) easy / accuracy / 8B",
    "report": (
        "Clinical diagnostic report standardisation / English clinical diagnostic reports (test) / BLEU-1 / size not stated"
    ),
    "language": "Multilingual medical reasoning / CUREMED-BENCH (test) / language consistency / 8B",
    "history": "Medical history-taking / Avey / precision / size not stated",
}


def as_cells(measured: Mapping[str, Measured]) -> pd.DataFrame:
    """The values of the last policy of every measure as cells of the published table: cell, subset, value, low, high, n."""
    columns = ["cell", "subset", "value", "low", "high", "n"]
    parts = [m.values[m.values.arm == m.values.arm.iloc[-1]].assign(subset="value") for m in measured.values()]
    return pd.concat(parts, ignore_index=True).reindex(columns=columns) if parts else pd.DataFrame(columns=columns)


def protocol(measured: Mapping[str, Measured]) -> str:
    """How everything was measured, for the scorecard."""
    return "; ".join(m.protocol for m in measured.values())
