"""What a model can do besides medicine: GSM8K, MMLU, and its loss on instructions that it was not trained on.

The papers' question is whether fine-tuning costs such abilities. A model that is too small to solve GSM8K's problems still
has a loss on their solutions.
"""

import re
from collections.abc import Mapping

import pandas as pd
from pydantic import Field

from ultramed.core.schema import EvalConfig, Strict
from ultramed.core.store import Artifact, stage
from ultramed.data import rows as canonical
from ultramed.evaluate.accuracy import answers, read_answers
from ultramed.evaluate.arms import Answers
from ultramed.evaluate.held_out import LossConfig, difference, held_out_loss, mean_loss, read_losses
from ultramed.evaluate.open_ended import ReplyConfig, read_replies, replies

LM_EVAL = EvalConfig(protocol="likelihood", likelihood_prompt="lm_eval")

# --------------------------------------------------------------------------------------------------------------- GSM8K

# A minus between two numbers or behind a word ("10-12", "x-3") is no sign; a comma separates thousands only.
_NUMBER = re.compile(r"(?:(?<![\w.)])([-\u2212]))?\$?((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)")
# GSM8K's own line: a whole number begins it, and is not that of a list's item or of a heading ('#### 1. Eggs').
_STATED = re.compile(
    r"####[ \t]*[^\w\n.\-\u2212]*(?!\d{1,2}[.)][ \t]*[A-Za-z])((?>[-\u2212]?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)))(?!\w)"
)


def last_number(text: str) -> float | None:
    """The last number of a text, without thousands' commas; None where there is none."""
    found = _NUMBER.findall(text)
    return float(found[-1][1].replace(",", "")) * (-1 if found[-1][0] else 1) if found else None


def final_number(text: str) -> tuple[float | None, bool]:
    """(the number that a solution ends in, whether it stands in GSM8K's own form '#### 18').

    A heading ('#### Step 1') is no such line. Where there is none the last number of the text counts, as in
    lm-evaluation-harness' flexible reading. What follows the first such line is another problem that the model made up.
    """
    found = _STATED.search(text)
    return (last_number(found[1]), True) if found else (last_number(text), False)


class ShotsConfig(Strict):
    shots: int = Field(ge=1)


@stage(version=1)
def with_shots(out, config: ShotsConfig, *, data: Artifact) -> dict:
    """The test rows of `data` with `shots` solved rows of its training side, evenly drawn, as turns before each prompt."""
    solved = canonical.spread(canonical.read_instructions(data / "train.parquet"), config.shots)
    shown = [turn for row in solved for turn in (*row["prompt"], *row["completion"])]
    rows = canonical.read_instructions(data / "test.parquet")
    canonical.write_rows(out / "test.parquet", [{**row, "prompt": [*shown, *row["prompt"]]} for row in rows])
    return {"rows": len(rows), "shots": len(solved)}


def gsm8k(
    model: Artifact, data: Artifact, *, count: int = 0, shots: int = 0, max_new_tokens: int = 512, batch_tokens: int = 8192
) -> Answers:
    """GSM8K's test questions, greedy, right where the reply ends in the solution's number (`final_number`).

    count: questions, drawn evenly, 0 for all. shots: solved training problems as earlier turns, which a template of one turn
    (Alpaca's) cannot show. `letter` and `gold` are numbers as text, `strict` says that the reply has the form '#### 18'.
    The summary of UltraMedical does not state its number of shots.
    """
    asked = ReplyConfig(max_new_tokens=max_new_tokens, batch_tokens=batch_tokens, limit=count)
    questions = with_shots(ShotsConfig(shots=shots), data=data) if shots else data
    answered = replies(asked, model=model, data=questions)
    frame = read_replies(answered)
    read = [final_number(text) for text in frame.reply]
    gold = [final_number(text)[0] for text in frame.reference]
    made = pd.DataFrame({"id": frame.id, "subset": "gsm8k", "concept": frame.id, "seed": 0, "reply": frame.reply})
    made["gold"], made["letter"] = [_shown(n) for n in gold], pd.Series([_shown(n) for n, _ in read], dtype=object)
    made["correct"] = [number == wanted for (number, _), wanted in zip(read, gold, strict=True)]
    made["strict"] = [strict for _, strict in read]
    ended = pd.read_json(answered / "turns.jsonl", lines=True, dtype={"key": str}).set_index("key").finished
    made["finished"] = ended.reindex(frame.id + "#0").to_numpy()
    return Answers(made, (model, data, answered))


def _shown(number: float | None) -> str | None:
    return None if number is None else f"{number:.10g}"


# ---------------------------------------------------------------------------------------------------------------- MMLU


def mmlu(model: Artifact, data: Artifact, *, per_subject: int = 0, config: EvalConfig = LM_EVAL) -> Answers:
    """MMLU's test questions, `subset` being the subject. per_subject: questions of each, the first; 0 for all.

    By default zero-shot, by the likelihood of the letters after lm-evaluation-harness' prompt. Pooled over questions, as the
    harness does, the mean of `correct` is MMLU's score.
    """
    subjects = canonical.subset_sizes(data / "test.parquet")
    select = {name: [0, min(n, per_subject or n)] for name, n in subjects.items()}
    answered = answers(config, model=model, questions=data, select=select)
    return Answers(read_answers(answered).assign(seed=0), (model, data, answered))


# ------------------------------------------------------------------------------------------------------- held-out loss


def held_out_losses(
    models: Mapping[str, Artifact], data: Mapping[str, Artifact], config: LossConfig, against: str = "base"
) -> tuple[pd.DataFrame, list[Artifact]]:
    """Loss of every model on the test side of every data set of instructions, or on the rows of a mixture, in nats a token,
    with 95% intervals over rows.

    A row a model and data set: arm, subset (the data set), value, low, high, n, tokens, and `more` with `more_low` and
    `more_high`, by how much it is above that of `against` on the same rows (NaN for that model itself). Also the artifacts.
    """
    rows, artifacts = [], [*models.values(), *data.values()]
    for name, held in data.items():
        side = "rows" if held.stage == "mixture" else "test"
        made = {arm: held_out_loss(config, model=model, data=held, side=side) for arm, model in models.items()}
        losses = {arm: read_losses(art) for arm, art in made.items()}
        for arm, frame in losses.items():
            e = mean_loss(frame)
            row = {"arm": arm, "subset": name, **e.row("value"), "tokens": int(frame.tokens.sum())}
            if arm != against:
                d = difference(frame, losses[against])
                row |= {"more": d.value, "more_low": d.low, "more_high": d.high}
            rows.append(row)
        artifacts += made.values()
    columns = ["arm", "subset", "value", "low", "high", "n", "tokens", "more", "more_low", "more_high"]
    return pd.DataFrame(rows, columns=columns), artifacts
