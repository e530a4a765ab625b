"""UltraMedical's experiments at `smoke`: what a seed decides, whose samples become pairs, and what the controls are."""

import json

import pytest

from ultramed.core.config import load_profile
from ultramed.data.rows import read_instructions, read_pairs
from ultramed.evaluate.sample import read_feedback
from ultramed.experiments.iteration import Iteration, rounds_table
from ultramed.experiments.ultramedical import UltraMedical


@pytest.fixture(scope="module")
def experiment(places):
    from ultramed.core.log import quiet_libraries

    quiet_libraries()
    return UltraMedical.of(load_profile("smoke"))


def ids(artifact) -> set[str]:
    return {row["id"] for row in read_instructions(artifact / "rows.parquet")}


def test_general_rows_are_added_to_the_same_medical_ones(experiment):
    medical, mixed = (ids(experiment.training_rows(name)) for name in ("ultramed", "ultramix"))
    assert medical < mixed
    assert {name.split(":")[0] for name in mixed - medical} == {"general"}
    longer = ids(experiment.training_rows("ultramed_longer"))
    assert medical < longer
    assert ids(experiment.training_rows("ultramed", 1)) != medical, "a seed draws rows of its own"


def test_pairs_are_of_the_policys_own_samples_and_the_best_is_chosen(experiment):
    made = experiment.preference_pairs("ultramed", 1)
    rows = read_pairs(made / "pairs.parquet")
    assert {row["meta"]["chosen_model"] for row in rows} == {row["meta"]["rejected_model"] for row in rows} == {"ultramed0"}
    assert all(row["meta"]["chosen_score"] > row["meta"]["rejected_score"] for row in rows)
    ranked = {row["id"]: row for row in read_feedback(experiment._rank_own("ultramed", "medical", 1))}
    for row in rows:
        scores = [c["score"] for c in ranked[row["meta"]["prompt_id"]]["candidates"]]
        assert (len(scores), row["meta"]["chosen_score"]) == (3, max(scores))
    assert made.key != experiment.preference_pairs("ultramed", 0).key


def test_prompts_begin_where_the_reward_models_end(experiment):
    own = {row["id"] for row in read_feedback(experiment._rank_own("ultramed", "medical", 0))}
    pool = {row["id"] for row in read_feedback(experiment.rank_candidates("medical"))}
    assert len(own) == 8
    assert not own & pool


def test_the_controls_spend_the_same_prompts_or_the_same_steps(experiment):
    pairs, policy = experiment.preference_pairs("ultramed"), experiment.train_preference("ultramed", "dpo")
    same_steps = experiment.train_control("ultramed", "same_steps")
    assert same_steps.metrics["rows"] == pairs.metrics["pairs"]
    assert same_steps.metrics["steps"] == policy.metrics["steps"]
    same_prompts = experiment.train_control("ultramed", "same_prompts")
    assert same_prompts.metrics["rows"] == 8
    assert same_prompts.manifest["inputs"]["model"]["key"] == same_steps.manifest["inputs"]["model"]["key"]


def test_iteration_goes_on_from_the_vanilla_policy_and_its_control_takes_as_many_steps(experiment):
    iteration = Iteration(experiment)
    assert iteration.arms == ["dpo"]
    rounds = iteration.train("dpo")
    assert [[r.number for r in each] for each in rounds] == [[0, 1]] * 2
    vanilla, last = rounds[1]
    assert vanilla.model.key == experiment.train_preference("ultramix", "dpo", 1).key
    longer = iteration.train_longer("dpo", rounds[1], 1)
    assert longer.metrics["steps"] == last.model.metrics["steps"]
    arms = iteration.answers_by_round({"dpo": rounds})
    assert list(arms) == ["dpo_round_0", "dpo_round_1", "dpo_last", "dpo_longer"]
    table = rounds_table({"dpo": rounds})
    assert table["n"].tolist() == [48, 48], "both seeds"
    assert 0 <= vanilla.dev_accuracy <= 1


def test_the_base_is_asked_in_the_way_that_dev_questions_favour(experiment):
    answered, how = experiment.examine_base()
    assert how in ("as asked", "likelihood of letters", "likelihood of texts")
    assert answered.frame.seed.tolist() == [0] * 24 + [1] * 24
    accuracy = {}
    for way, changes in {"as asked": {}, "likelihood of letters": {"protocol": "likelihood"}}.items():
        accuracy[way] = experiment.examine(experiment.base, dev=True, **changes).accuracy
    if how in accuracy:
        assert accuracy[how] == max(accuracy.values())


def test_replies_reason_and_the_manifest_says_so(experiment):
    answered = experiment.examine_policy("ultramed")
    asked = [a for a in answered.artifacts if a.stage == "answers"]
    assert {a.manifest["config"]["protocol"] for a in asked} == {"ultramedical"}
    row = read_instructions(experiment.training_rows("ultramed") / "rows.parquet")[0]
    reasons, last = row["completion"][0]["content"].split("\n")
    assert last.startswith("Answer: ")
    assert reasons.endswith(".")
    assert json.dumps(row["prompt"]).count("Think step by step") == 1
