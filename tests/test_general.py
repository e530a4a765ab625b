"""General abilities: how GSM8K's numbers are read, what is asked, and that the answers are those of the model."""

import pandas as pd
import pytest
from faulty import Faulty
from handmade import given

from ultramed.data.rows import read_instructions
from ultramed.data.sources import SourceConfig, source
from ultramed.evaluate.arms import Answers, Arms, compare
from ultramed.evaluate.held_out import LossConfig, held_out_loss, read_losses
from ultramed.evaluate.likelihood import lm_eval_prompt
from ultramed.experiments import general
from ultramed.experiments.ultramedical_tables import PUBLISHED_GSM8K, general_cells
from ultramed.lm import models
from ultramed.report.beside import cell_entries


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 1,234.", 1234.0),
        ("3 + 4 = 7", 7.0),
        ("#### -12", -12.0),
        ("it is 0.5.", 0.5),
        ("it is .5", 0.5),
        ("none", None),
        ("5 apples, then 3 left", 3.0),
        ("between 10-12 hours", 12.0),
        ("12 - 5 = 7", 7.0),
        ("x-3", 3.0),
        ("(2)-3", 3.0),
        ("he owes -$1,250.50", -1250.5),
        ("\u22127 degrees", -7.0),
        ("it costs $18.00.", 18.0),
        ("1,2,3", 3.0),
        ("about 12,34", 34.0),
        ("50%", 50.0),
        (r"\boxed{42}", 42.0),
    ],
)
def test_the_last_number_counts(text, number):
    assert general.last_number(text) == number


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("2 + 3 = <<2+3=5>>5\n#### 5", (5.0, True)),
        ("#### 5\n\nQuestion: Tom has 7 cats.", (5.0, True)),
        ("#### 1,000 dollars", (1000.0, True)),
        ("#### 18.\n\nQuestion: Tom has 3 apples.", (18.0, True)),
        ("#### 1,234.\nB 5", (1234.0, True)),
        ("#### 18.5.\nA 3", (18.5, True)),
        ("#### 15,000. So he has 7 left.", (15000.0, True)),
        ("#### 18) She has 18", (18.0, False)),
        ("The answer is 5.", (5.0, False)),
        ("He has 8 ####", (8.0, False)),
        ("####", (None, False)),
        ("#### Step 1: eggs\n16 - 7 = 9\n#### Step 2: money\n9 * 2 = 18\n#### Final answer\n18", (18.0, False)),
        ("#### Count the eggs\nShe has 9.\n#### Answer: $18", (18.0, False)),
        ("#### 1. Eggs\n9\n#### 2. Money\nThe answer is 18.", (18.0, False)),
    ],
)
def test_a_stated_result_goes_before_the_last_number(text, read):
    assert general.final_number(text) == read


def test_every_solution_of_gsm8k_is_read(data):
    rows = read_instructions(source(SourceConfig(name="gsm8k")) / "test.parquet")
    for row in rows:
        text = row["completion"][0]["content"]
        number, strict = general.final_number(text)
        assert strict
        assert number == float(text.rpartition("####")[2].replace(",", ""))
    assert len(rows) == 1319


def problems(count, side):
    def row(n):
        asked, said = f"What is {n} + 1?", f"{n} + 1 = <<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"
        completion = [{"role": "assistant", "content": said}]
        return {"id": f"{side}{n}", "source": "gsm8k", "prompt": [{"role": "user", "content": asked}], "completion": completion}

    return [row(n) for n in range(count)]


@pytest.fixture
def both():
    from ultramed.core.store import stage
    from ultramed.data import rows as canonical

    @stage(version=1)
    def both_sides(out, config):
        for side in ("train", "test"):
            canonical.write_rows(out / f"{side}.parquet", problems(6, side))

    return both_sides(None)


def test_gsm8k_with_and_without_shots(both):
    seen, said = [], {0: "It is 1.\n#### 1", 1: "It is 5", 2: "no idea", 3: "3 + 1 = 4.0"}

    def answer(body):
        seen.append(body["messages"])
        return said.get(int(body["messages"][-1]["content"].split()[2]), "#### 99")

    with Faulty(answer=answer) as server:
        model = models.resolve(f"{server.config().url}#m")
        made = general.gsm8k(model, both)
        few = general.gsm8k(model, both, count=3, shots=2)
    frame = made.frame.set_index("id")
    assert frame.correct.tolist() == [True, False, False, True, False, False]
    assert frame.letter.tolist() == ["1", "5", None, "4", "99", "99"]
    assert frame.gold.tolist() == ["1", "2", "3", "4", "5", "6"]
    assert frame.strict.tolist() == [True, False, False, False, True, True]
    assert made.accuracy == pytest.approx(2 / 6)
    (row,) = Arms(x=made).accuracy().query("subset == 'all'").to_dict("records")
    assert (row["n"], row["unparsed"]) == (6, 1)
    assert compare(made, few).n == len(few.frame) == 3
    shown = [[m["content"] for m in messages] for messages in seen if len(messages) > 1]
    assert len(shown) == 3
    assert all(
        turns[:4] == ["What is 0 + 1?", "0 + 1 = <<0+1=1>>1\n#### 1", "What is 3 + 1?", "3 + 1 = <<3+1=4>>4\n#### 4"]
        for turns in shown
    )
    assert made.artifacts[0] == model


def test_gsm8k_fills_the_papers_cells_in_per_cent():
    """Three of four right is 75, beside the paper's 79.6 of the base and 75.9 of UltraMix."""
    about = {"id": list("abcd"), "seed": 0, "subset": "gsm8k", "concept": list("abcd"), "letter": "1", "strict": True}
    arms = Arms(
        {
            name: Answers(pd.DataFrame({**about, "correct": right}))
            for name, right in (("base_gsm8k", [True] * 3 + [False]), ("ultramix_gsm8k", [True] * 4), ("base_mmlu", [True] * 4))
        }
    )
    how = {"same_scale": True, "protocol": "p", "size": "8B"}
    made = cell_entries("ultramedical_general", general_cells(arms), PUBLISHED_GSM8K, **how)
    assert [(e["published"], e["ours"], e["n"]) for e in made] == [(79.6, 75.0, 4), (75.9, 100.0, 4)]
    assert made[0]["interval"][0] < 75 < made[0]["interval"][1]


def test_mmlu_is_asked_as_the_harness_asks():
    row = {"id": "1", "question": " Which organ hears? ", "options": {"A": "eye", "B": "ear"}, "gold": "B"}
    row |= {"dataset": "mmlu", "subset": "high_school_biology"}
    context, endings = lm_eval_prompt(row)
    assert context == (
        "The following are multiple choice questions (with answers) about high school biology.\n\n"
        "Which organ hears?\nA. eye\nB. ear\nAnswer:"
    )
    assert endings == [" A", " B"]


def test_mmlu_by_subject(medalpaca):
    def row(n):
        subset = ("anatomy", "virology")[n % 2]
        question = {"id": str(n), "question": f"Which organ is number {n}?", "options": {"A": "eye", "B": "ear"}, "gold": "A"}
        return question | {"dataset": "mmlu", "subset": subset}

    data = given(rows=[row(n) for n in range(9)], side="test")
    made = general.mmlu(medalpaca.base, data)
    assert made.frame.subset.value_counts().to_dict() == {"anatomy": 5, "virology": 4}
    few = general.mmlu(medalpaca.base, data, per_subject=2)
    assert set(few.frame.id) == {"0", "1", "2", "3"}
    same = made.frame.set_index("id").letter
    assert few.frame.set_index("id").letter.equals(same.loc[few.frame.id])


def test_losses_of_several_models_stand_beside_the_bases(medalpaca):
    data = given(rows=problems(8, "test"), side="test")
    trained = medalpaca.train_arm("full", learning_rate=1e-3)
    table, artifacts = general.held_out_losses({"base": medalpaca.base, "sft": trained}, {"sums": data}, LossConfig())
    base, sft = table.to_dict("records")
    made = read_losses(held_out_loss(LossConfig(), model=trained, data=data))
    assert sft["value"] == pytest.approx(made.nll.sum() / made.tokens.sum())
    assert sft["more"] == pytest.approx(sft["value"] - base["value"])
    assert sft["more_low"] <= sft["more"] <= sft["more_high"]
    assert pd.isna(base["more"])
    assert (base["n"], base["tokens"]) == (8, made.tokens.sum())
    assert {medalpaca.base, trained, data} < set(artifacts)
