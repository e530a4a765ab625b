"""The experiment's own arithmetic: slices, tables and comparisons."""

import pandas as pd
import pytest

from ultramed.experiments import medalpaca as usmle


def _frame(correct, seed=0, letters=True):
    n = len(correct)
    return pd.DataFrame(
        {
            "id": [f"q{i}" for i in range(n)],
            "seed": seed,
            "correct": correct,
            "concept": [f"c{i // 2}" for i in range(n)],
            "letter": ["A" if letters else None] * n,
            "strict": [True] * n,
            "subset": ["step1"] * n,
            "arm": "full",
        }
    )


def test_compare_is_paired_and_takes_the_larger_p():
    a, b = _frame([1] * 40 + [0] * 10), _frame([0] * 30 + [1] * 10 + [0] * 10)
    c = usmle.compare(a, b)
    assert (c["n"], c["difference"]) == (50, pytest.approx(0.6))
    assert c["p"] == max(c["mcnemar"], c["clustered"]) < 0.001
    assert c["low"] < 0.6 < c["high"]
    with pytest.raises(ValueError, match="no question in common"):
        usmle.compare(a, b.assign(seed=1))


def test_accuracy_table_counts_unparsed_as_wrong():
    t = usmle.accuracy_table(_frame([1] * 6 + [0] * 4, letters=False), ["arm"])
    assert list(t.subset) == ["step1", "all"]
    assert list(t.accuracy) == [0.6, 0.6]
    assert list(t.unparsed) == [10, 10]


def test_seeds_are_examined_on_distinct_questions(bench):
    seen = [set(bench.examine(bench.model, s, protocol="likelihood")[0].id) for s in bench.profile.usmle.seeds]
    assert all(len(s) == 18 for s in seen)
    assert len(set.union(*seen)) == 54


def test_rows_of_a_seed_are_the_same_for_every_arm_that_shares_the_mixture(bench):
    from ultramed.core.config import arm_config

    keys = {bench.rows(arm_config(bench.profile, arm, seed=1)).key for arm in ("full", "lora", "lora_8bit")}
    assert len(keys) == 1
    assert bench.rows(arm_config(bench.profile, "full", seed=2)).key not in keys


def test_tuning_uses_a_part_of_the_rows_and_gives_every_rate_a_loss(bench):
    t = bench.tune(["full", "lora"])
    assert len(t) == 4
    assert t.dev_loss.notna().all()
    assert set(usmle.best_rates(t)) == {"full", "lora"}
