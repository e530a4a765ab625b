"""Categories and sections of the reward benches, worked by hand."""

import pandas as pd
import pytest
from handmade import lines

from ultramed.core.errors import ConfigError
from ultramed.data.rows import read_pairs
from ultramed.evaluate.arms import Answers, compare
from ultramed.evaluate.reward_bench import PAPER, REWARDBENCH, BenchConfig, bench, by_section, category, sections, table


def candidate(text, score, letter="A", strict=True):
    return {"text": text, "score": score, "letter": letter, "strict": strict, "model": "m"}


def test_categories_go_by_the_annotators_scores_and_by_length():
    chosen = candidate("the heart (A)", 9.0)
    assert category(chosen, candidate("the liver (B)", 3.0), wide=6.0) == "easy", "in form, and far apart"
    assert category(chosen, candidate("the liver", 3.5, strict=False), wide=6.0) == "hard", "not in form, and close"
    assert category(chosen, candidate("the left kidney or so", 0.0), wide=6.0) == "length"
    assert len("the left kidney ") / len("the heart (A)") < 1.25, "a little longer is not length"
    assert category(chosen, candidate("the left kidney ", 0.0), wide=6.0) == "easy"


def test_a_bench_cuts_at_its_median_difference(fresh_store):
    asked = [{"role": "user", "content": "Which?\nA. heart\nB. liver\nC. lung\nD. eye"}]
    found = [
        candidate("heart (A)", 9.0, "A"),
        candidate("liver (B)", 4.0, "B"),
        candidate("lung (C)", 3.0, "C"),
        candidate("eye (D)", 1.0, "D"),
        candidate("eye, no doubt about it (D)", None, "D"),
    ]
    rows = [{"id": "q", "subset": "s", "gold": "A", "prompt": asked, "candidates": found}]
    made = bench(BenchConfig(per_prompt=9), feedback=lines(None, rows=rows, name="feedback.jsonl"))
    assert made.metrics["median_gap"] == 6.0, "of 5, 6 and 8"
    assert made.metrics["categories"] == {"easy": 1, "hard": 1}, "two easy ones, cut to the paper's proportion of 238 to 196"
    by_subset = {row["subset"]: row for row in read_pairs(made / "pairs.parquet")}
    assert by_subset["hard"]["rejected"][0]["content"] == "liver (B)"
    assert by_subset["hard"]["meta"]["rejected_score"] == 4.0
    right = [{**rows[0], "candidates": found[:1]}]
    with pytest.raises(ConfigError, match="both a right and a wrong"):
        bench(BenchConfig(), feedback=lines(None, rows=right, name="feedback.jsonl"))


def frame(**accuracies):
    """Two pairs a subset's tenth: `accuracies` is subset -> (right, all)."""
    rows = [
        {"subset": name.replace("_", "-"), "correct": k < right, "concept": f"{name}{k}"}
        for name, (right, count) in accuracies.items()
        for k in range(count)
    ]
    return pd.DataFrame(rows)


def test_rewardbench_has_23_subsets_of_2985_pairs():
    assert sum(map(len, REWARDBENCH.values())) == 23
    assert sum(sum(members.values()) for members in REWARDBENCH.values()) == 2985 - 447 + 984
    assert [sum(members.values()) for members in REWARDBENCH.values()] == [358, 456, 740, 1968]


def test_a_section_weighs_its_subsets_by_size_and_the_score_is_the_mean_of_sections():
    """chat: (1.0 x 100 + 0.5 x 28) / 128. reasoning: math 0.2 x 984, code (0.8 + 1.0) x 164, of 984 + 328."""
    given = [("alpacaeval-easy", 1.0, 100, 0.0), ("mt-bench-easy", 0.5, 28, 0.1)]
    given += [("math-prm", 0.2, 447, 0.02), ("hep-cpp", 0.8, 164, 0.03), ("hep-go", 1.0, 164, 0.0)]
    made = sections(pd.DataFrame(given, columns=["subset", "accuracy", "n", "se"])).set_index("subset")
    assert list(made.index) == ["chat", "reasoning", "average"], "what is not there is no zero"
    assert made.accuracy["chat"] == pytest.approx(114 / 128)
    assert made.accuracy["reasoning"] == pytest.approx((0.2 * 984 + 0.8 * 164 + 164) / 1312)
    assert made.accuracy["average"] == pytest.approx((made.accuracy["chat"] + made.accuracy["reasoning"]) / 2)
    assert made.se["chat"] == pytest.approx(0.1 * 28 / 128)
    assert made.high["chat"] - made.low["chat"] == pytest.approx(2 * 1.96 * 0.1 * 28 / 128)
    assert made.n["average"] == 903


def test_a_table_has_subsets_then_sections_then_the_score():
    made = table(frame(mt_bench_hard=(3, 4), llmbar_natural=(1, 2), donotanswer=(2, 2)))
    assert list(made.subset) == ["mt-bench-hard", "llmbar-natural", "donotanswer", "chat_hard", "safety", "average"]
    hard = (0.75 * 37 + 0.5 * 100) / 137
    assert made.accuracy.tolist() == pytest.approx([0.75, 0.5, 1.0, hard, 1.0, (hard + 1) / 2])
    other = table(frame(easy=(3, 4), hard=(1, 2)))
    assert other.accuracy.tolist() == pytest.approx([0.75, 0.5, 0.625]), "other benches: the mean of subsets"
    assert set(PAPER) == {"easy", "hard", "length", "human"}


def test_sections_and_the_score_vary_as_the_seeds_do():
    """Three reward models at 60, 70 and 80% of everything: what they differ by does not shrink with the number of pairs."""
    right = {seed: 12 + 2 * seed for seed in range(3)}
    parts = [frame(mt_bench_hard=(n, 20), donotanswer=(n, 20)).assign(seed=seed) for seed, n in right.items()]
    made = table(pd.concat(parts, ignore_index=True)).set_index("subset")
    assert made.accuracy.tolist() == pytest.approx([0.7] * 5)
    widths = made.high - made.low
    assert widths["chat_hard"] == pytest.approx(widths["mt-bench-hard"]), "a section of one subset is that subset"
    assert widths["average"] >= 2 * 4.3 * 0.1 / 3**0.5 - 1e-2, "of three values 10 points apart, by Student's t"


def test_a_comparison_over_sections_is_of_the_tables_scores():
    """Within a section subsets count by their official sizes, whatever the number of pairs at hand."""
    one = frame(math_prm=(1, 4), hep_cpp=(1, 2), donotanswer=(1, 2))
    other = frame(math_prm=(3, 4), hep_cpp=(0, 2), donotanswer=(1, 2))
    sides = [by_section(Answers(part.assign(seed=0, id=part.concept))) for part in (one, other)]
    found = compare(*sides)
    for side, value in zip((one, other), (found.a, found.b), strict=True):
        assert value == pytest.approx(table(side).set_index("subset").accuracy["average"])
    assert found.a == pytest.approx(((0.25 * 984 + 0.5 * 164) / 1148 + 0.5) / 2)
    unnamed = Answers(frame(easy=(1, 2)).assign(seed=0))
    assert by_section(unnamed) is unnamed
