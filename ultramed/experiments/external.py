"""Where other papers measured UltraMedical's models (notebook 30): report text, the language of the reply, history taking.

Each measure returns a row a policy with `arm`, `subset` ('value'), `value`, its interval where it has one, and `n`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from ultramed.annotate.judge import LLMConfig
from ultramed.annotate.open_ended import correctness
from ultramed.core.profile import Profile
from ultramed.core.store import Artifact
from ultramed.data.rows import read_instructions
from ultramed.evaluate.history import HistoryConfig, histories, history_scores, read_histories
from ultramed.evaluate.open_ended import LanguageGuesser, ReplyConfig, bleu1, read_replies, replies
from ultramed.evaluate.stats import wilson

CURE_MED = {"temperature": 0.6, "top_p": 0.95, "repetition_penalty": 1.2}  # decoding of its repository


@dataclass(frozen=True)
class Measured:
    """A measure of every policy, as a reader wants it (`table`) and as numbers (`values`)."""

    table: pd.DataFrame
    values: pd.DataFrame
    artifacts: tuple[Artifact, ...]


def measure_report_text(profile: Profile, policies: Mapping[str, Artifact], notes: Artifact) -> Measured:
    """BLEU-1 of note sections written out of dialogues (MTS-Dialog); the dialogue itself, copied, is the least to beat."""
    config, rows, artifacts = ReplyConfig(limit=profile.open_rows, max_new_tokens=profile.open_tokens), [], [notes]
    for name, policy in policies.items():
        answered = replies(config, model=policy, data=notes)
        frame = read_replies(answered)
        rows.append({"arm": name, "subset": "value", "value": bleu1(list(frame.reply), list(frame.reference)), "n": len(frame)})
        artifacts += [policy, answered]
    copied = [prompt[-1]["content"].partition("\n\n")[2] for prompt in frame.prompt]
    values = pd.DataFrame(rows)
    rows.append({"arm": "the dialogue, copied", "value": bleu1(copied, list(frame.reference)), "n": len(frame)})
    table = pd.DataFrame(rows)[["arm", "value", "n"]].rename(columns={"arm": "text by", "value": "BLEU-1"})
    return Measured(table, values, tuple(artifacts))


def learn_languages(data: Artifact) -> LanguageGuesser:
    """The guesser, learned from the questions of the training side."""
    train = read_instructions(data / "train.parquet")
    return LanguageGuesser([row["prompt"][-1]["content"] for row in train], [row["meta"]["language"] for row in train])


def measure_language(
    profile: Profile, policies: Mapping[str, Artifact], data: Artifact, guess: LanguageGuesser, judge: LLMConfig | None
) -> Measured:
    """Share of replies whose guessed language is the question's (CURE-Med), in per cent; with a judge also the share that
    is right."""
    config = ReplyConfig(limit=profile.open_rows, max_new_tokens=profile.open_tokens, **CURE_MED)
    rows, values, artifacts = [], [], [data]
    for name, policy in policies.items():
        answered = replies(config, model=policy, data=data)
        frame = read_replies(answered)
        guesses = zip(frame.reply, guess(list(frame.reply)), frame.meta, strict=True)
        kept = wilson([bool(text) and found == meta["language"] for text, found, meta in guesses])
        row = {"replies by": name, "language kept": str(kept), "n": kept.n}
        if judge:
            m = correctness(judge, replies=answered).metrics
            right = wilson([True] * m["correct"] + [False] * (m["replies"] - m["correct"]))
            row |= {"correct": str(right), "not read": m["unread"]}
        rows.append(row)
        shares = {"value": 100 * kept.value, "low": 100 * kept.low, "high": 100 * kept.high, "n": kept.n}
        values.append({"arm": name, "subset": "value", **shares})
        artifacts += [policy, answered]
    return Measured(pd.DataFrame(rows), pd.DataFrame(values), tuple(artifacts))


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
        e = scores["precision"]
        shares = {"value": 100 * e.value, "low": 100 * e.low, "high": 100 * e.high, "n": e.n}
        values.append({"arm": name, "subset": "value", **shares})
        artifacts += [policy, talks]
    return Measured(pd.DataFrame(rows), pd.DataFrame(values), tuple(artifacts))


def first_talk(measured: Measured, turns: int = 3) -> str:
    """The beginning of the last policy's first history, to be looked at."""
    first = read_histories(measured.artifacts[-1]).iloc[0]
    told = zip(first.questions[:turns], first.answers[:turns], strict=True)
    lines = [f"doctor:  {question[:160]}\npatient: {answer[:160]}" for question, answer in told]
    return "\n".join([*lines, f"diagnoses: {'; '.join(first.diagnoses)} | right: {first.gold}"])


PUBLISHED_ROWS = {  # measure -> row of the table of other papers' measurements
    "report": "Clinical diagnostic report standardisation / English clinical diagnostic reports (test) / BLEU-1",
    "language": "Multilingual medical reasoning / CUREMED-BENCH (test) / language consistency",
    "history": "Medical history-taking / Avey / precision",
}


def as_cells(measured: Mapping[str, Measured]) -> pd.DataFrame:
    """The fine-tuned policy's values by measure, as cells: arm (the measure), subset, value, low, high, n."""
    rows = [{**found.values.iloc[-1].to_dict(), "arm": name} for name, found in measured.items()]
    return pd.DataFrame(rows, columns=["arm", "subset", "value", "low", "high", "n"])
