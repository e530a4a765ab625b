"""Arms: tables, paired comparisons, and the slices that seeds are examined on."""

import numpy as np
import pandas as pd
import pytest

from ultramed.core.config import arm_config, load_profile
from ultramed.evaluate.arms import Answers, Arms, artifacts_of, better, compare, joined, label, percent, pooled, wide
from ultramed.experiments.medalpaca import MedAlpaca, Tuning
from ultramed.lm import models


def answers(correct, seed=0, letters=True, artifacts=()) -> Answers:
    n = len(correct)
    frame = pd.DataFrame(
        {
            "id": [f"q{i}" for i in range(n)],
            "seed": seed,
            "correct": correct,
            "concept": [f"c{i // 2}" for i in range(n)],
            "letter": ["A" if letters else None] * n,
            "strict": [True] * n,
            "subset": ["step1"] * n,
        }
    )
    return Answers(frame, artifacts)


def test_compare_is_paired_and_takes_the_larger_p():
    a, b = answers([1] * 40 + [0] * 10), answers([0] * 30 + [1] * 10 + [0] * 10)
    c = compare(a, b)
    assert (c.n, c.seeds, c.difference) == (50, 1, pytest.approx(0.6))
    assert c.p == max(c.mcnemar, c.clustered) < 0.001
    assert c.low < 0.6 < c.high
    assert c.low < c.difference - c.se < c.difference + c.se < c.high
    with pytest.raises(ValueError, match="no question in common"):
        compare(a, b.assign(seed=1))


def test_arms_that_never_differ_are_not_known_to_be_equal():
    """No discordant concept among 30, of two questions each: the difference may still be as large as 3 / 30 (the rule of
    three)."""
    c = compare(answers([1, 0] * 30), answers([1, 0] * 30))
    assert (c.low, c.high) == pytest.approx((-0.1, 0.1))
    assert c.se > 0
    assert c.p == 1


def test_accuracy_counts_unparsed_as_wrong():
    table = Arms(x=answers([1] * 6 + [0] * 4, letters=False)).accuracy()
    assert list(table.subset) == ["step1", "all"]
    assert list(table.accuracy) == [0.6, 0.6]
    assert list(table.unparsed) == [10, 10]
    shown = wide(table).iloc[0]
    assert (shown.arm, shown.n, shown["all"]) == ("x", 10, shown.step1)
    assert shown["all"].startswith("60.0 [")


def test_several_seeds_show_their_spread():
    table = Arms(x=joined([answers([1] * 10, 0), answers([0] * 10, 1)])).accuracy()
    row = table[table.subset == "all"].iloc[0]
    assert (row.seeds, row.n) == (2, 20)
    assert row.seed_sd == pytest.approx(2**-0.5)
    assert (row.low, row.high) == (0, 1), "two seeds that far apart say nothing, and an accuracy stays within 0 and 1"


def test_one_verdict_from_the_interval_and_from_p_over_seeds():
    """Gains of 4, 6 and 8 of 10 questions: mean 0.6, standard error 0.2 / 3 ** 0.5 = 0.1155, t = 5.196, p = 0.0351 at 2."""
    made = joined(
        answers([1] * gain + [0] * (10 - gain), seed).assign(concept=str(seed)) for seed, gain in enumerate((4, 6, 8))
    )
    made = made.assign(concept=[f"c{i}" for i in range(30)])
    c = compare(made, made.assign(correct=0))
    assert (c.seeds, c.n, c.mcnemar, c.errors[0][1]) == (3, 30, None, pytest.approx(2))
    assert c.p == c.clustered == pytest.approx(0.03507, abs=1e-4)
    assert (c.low, c.high) == (pytest.approx(0.6 - 4.30265 * 0.11547, abs=1e-4), 1.0)


def test_pools_are_paired_by_arm_and_question():
    a, b = answers([1, 1, 0, 0]), answers([0, 1, 0, 1])
    c = compare(pooled([a, b]), pooled([b, b]))
    assert (c.n, c.difference, c.seeds) == (8, 0.0, 1)
    assert pooled([a, b]).frame.concept.nunique() == 2, "copies of a question stay in its concept"


def test_answers_that_are_kept_tell_the_same_again(tmp_path):
    a, b = answers([1, 1, 0, 1], letters=False), joined([answers([0, 1, 0, 1]), answers([1, 1], seed=1)])
    scored = a.assign(concept=range(4)).frame.drop(columns=["letter", "strict"])  # a reward model's have no letters
    weighted = Answers(scored.assign(weight=[1.0, 2.0, 3.0, 4.0]))
    made = Arms(a=a, b=b, pool=pooled([a, b]), scored=Answers(scored), weighted=weighted)
    made.write(tmp_path / "tables" / "11_questions.parquet")
    again = Arms.read(tmp_path / "tables" / "11_questions.parquet")
    assert list(again) == list(made)
    pd.testing.assert_frame_equal(Arms(a=again["a"], b=again["b"]).accuracy(), Arms(a=a, b=b).accuracy())
    assert compare(again["a"], again["b"]) == compare(a, b)
    assert set(again["scored"].frame) == {"id", "seed", "subset", "concept", "correct"}
    assert list(again["scored"].frame.correct) == list(scored.correct)
    assert compare(again["weighted"], again["weighted"]).a == compare(weighted, weighted).a == pytest.approx((1 + 2 + 4) / 10)
    with pytest.raises(ValueError, match=r"cannot be kept: \['none'\]"):
        Arms(a=a, none=a.only(a.frame.correct > 1)).write(tmp_path / "none.parquet")
    assert [path.name for path in (tmp_path / "tables").iterdir()] == ["11_questions.parquet"]


def test_results_carry_their_artifacts_each_once(exam, medalpaca):
    a, b = answers([1], artifacts=(exam, medalpaca.base)), answers([1], artifacts=(exam,))
    assert Arms(a=a, b=b).artifacts == (exam, medalpaca.base)
    assert artifacts_of([b, {"x": a}, exam]) == (exam, medalpaca.base)
    assert a.right_where("strict").assign(subset="x").only(a.frame.correct == 1).artifacts == a.artifacts


def test_the_better_of_two_and_labels():
    assert better(Arms(a=answers([0, 1]), b=answers([1, 1]), c=answers([1, 1]))) == "b", "the first of equals"
    assert label("ultramix_iterative_dpo") == "UltraMix iterative DPO"
    frame = pd.DataFrame({"accuracy": [0.5], "low": [0.25], "high": [0.751]})
    assert list(percent(frame)) == ["50.0 [25.0, 75.1]"]


def test_seeds_are_examined_on_distinct_questions(medalpaca):
    seen = [set(medalpaca.examine(medalpaca.base, s, protocol="likelihood").frame.id) for s in medalpaca.settings.seeds]
    assert all(len(s) == 18 for s in seen)
    assert len(set.union(*seen)) == 54


def test_rows_of_a_seed_are_the_same_for_every_arm_that_shares_the_mixture(medalpaca):
    rows = {medalpaca.training_rows(arm_config(medalpaca.profile, arm, seed=1)).key for arm in ("full", "lora", "lora_8bit")}
    assert len(rows) == 1
    assert medalpaca.training_rows(arm_config(medalpaca.profile, "full", seed=2)).key not in rows


def test_tuning_uses_a_part_of_the_rows_and_asks_every_rate_the_dev_questions(medalpaca):
    tuning = medalpaca.tune_rates()
    assert len(tuning.frame) == 2 * len(medalpaca.settings.arms)
    assert tuning.frame.dev_loss.notna().all()
    assert set(tuning.frame.n) == {sum(medalpaca.settings.dev_counts.values())}
    assert list(tuning.table().columns) == ["arm", "learning_rate", "accuracy", "n", "dev_loss", "train_seconds"]
    assert set(tuning.best) == set(medalpaca.settings.arms)
    assert sum(medalpaca.tuning_config("full", 1e-3).mixture.values()) == 12, "half of the rows"
    assert set(tuning.chosen()["from"]) == {"best on dev questions"}


def test_which_rate_the_main_table_has_is_the_profiles_choice():
    """Rates of the grid against MedAlpaca's one for all, and the other one beside it; a method without a grid is not tuned."""
    fixed = MedAlpaca.of(load_profile("smoke", ["usmle.grid={}", "usmle.arms.lora.learning_rate=3e-3"]))
    tuning = fixed.tune_rates()
    assert tuning.frame.empty
    assert tuning.best == {"full": 2e-4, "lora": 3e-3, "lora_8bit": 2e-4, "alpaca": 2e-4}
    assert set(tuning.chosen()["from"]) == {"set in the profile"}
    assert fixed.main_rates(tuning) == tuning.best
    assert fixed.other_rates(tuning) == {"full": 2e-5}
    paper = MedAlpaca.of(load_profile("smoke", ["usmle.main_rate=paper", "usmle.other_rate_arms=[full, lora]"]))
    assert paper.tuned_arms == ["full", "lora"]
    tried = {"arm": ["full"] * 3 + ["lora"], "learning_rate": [1, 2, 4, 3]}
    found = Tuning(pd.DataFrame(tried | {"accuracy": [0.5, 0.6, 0.6, 0.2], "dev_loss": [0.3, 0.4, 0.5, 9.0]}))
    assert set(paper.main_rates(found).values()) == {2e-5}
    assert paper.other_rates(found) == {"full": 2, "lora": 3}
    assert [paper._rate("full", found, main) for main in (True, False)] == ["2e-05, MedAlpaca's", "2, tuned"]


def test_sizes_of_a_profile_have_rows_and_published_rows_of_their_own():
    both = MedAlpaca.all_of(load_profile("medalpaca"))
    small, large = (each.published_rows() for each in both)
    assert small["full"] == "MedAlpaca 7b / 7b / full"
    assert small["alpaca_lora"] == "Alpaca 7b LoRA / 7b / alpaca lora"
    assert large["LLaMA-13B_lora_8bit"] == "MedAlpaca 13b LoRA 8bit / 13b / lora 8bit"
    assert "LLaMA-13B_alpaca_lora" not in large, "the paper has no such row"
    assert {"curated", "unfiltered"} & {*small, *large} == set()
    gpu = MedAlpaca.all_of(load_profile("gpu"))
    assert [each.arm_names for each in gpu[1:]] == [["full"], ["full"]]
    assert gpu[1].published_rows() == {}
    assert gpu[2].published_rows()["SmolLM2-1.7B_full"] == "MedAlpaca 13b / 13b / full"


def test_the_likelihood_is_chosen_on_dev_questions_and_sizes_are_paired(smoke):
    first, larger = MedAlpaca.all_of(smoke)
    dev = first.examine_dev()
    assert {key: len(arm.frame) for key, arm in dev.items()} == {"letter": 12, "text": 12}
    rows = first.examine_base(better(dev))
    assert list(rows) == ["base", "base_likelihood"]
    tested = set(rows["base"].frame.id)
    assert set(rows["base_likelihood"].frame.id) == tested
    assert not tested & set(dev["letter"].frame.id)
    small, large = (each.train_and_examine("full", 1e-3)[0] for each in (first, larger))
    pair = compare(large, small)
    assert (pair.n, pair.seeds) == (54, 3), "the same questions"
    sizes = [sum(p.numel() for p in models.load(each.base).parameters()) for each in (first, larger)]
    assert sizes[0] < sizes[1]


def test_a_policy_is_chosen_on_dev_questions(smoke):
    from ultramed.experiments.ultramedical import UltraMedical

    experiment = UltraMedical.of(smoke)
    chosen, dev = experiment.choose_policy("ultramix")
    assert list(dev) == ["sft", *smoke.ultramedical.preference.arms]
    assert chosen == better(dev)
    tested = experiment.examine_policy("ultramix").frame
    assert not set(tested.id) & set(dev["sft"].frame.id)
    assert (len(dev["sft"].frame), len(tested), tested.id.nunique()) == (2 * 12, 2 * 24, 48), (
        "each seed has questions of its own"
    )


def test_votes_carry_samples_and_the_greedy_answers(smoke):
    from ultramed.evaluate.rerank import Votes
    from ultramed.experiments.ultramedical import UltraMedical

    experiment = UltraMedical.of(smoke)
    sampled, greedy = (
        experiment.sample_test(lambda seed: experiment.train_sft("ultramed", seed)),
        experiment.examine_policy("ultramed"),
    )
    votes = Votes(sampled)
    chosen = votes.select("self_consistency", like=greedy)
    assert set(chosen.artifacts) == {*greedy.artifacts, *artifacts_of(sampled)}
    assert {tuple(row) for row in chosen.frame[["id", "seed"]].values} == {
        tuple(row) for row in greedy.frame[["id", "seed"]].values
    }
    assert compare(chosen, greedy).seeds == 2
    assert votes.rewards is None
    assert votes.sizes == [1, 2, 3, 4]
    assert (votes.passes()["pass@N"] <= 1).all()
    assert np.isfinite(votes.curves().accuracy).all()
