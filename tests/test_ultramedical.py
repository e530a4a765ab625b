"""UltraMedical's experiments at `smoke`: what a seed decides, whose samples become pairs, and what the controls are."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from faulty import Faulty

from ultramed.annotate.feedback import score_agreement
from ultramed.core.config import load_profile
from ultramed.core.errors import ConfigError
from ultramed.data import rows as canonical
from ultramed.data.rows import read_instructions, read_pairs
from ultramed.evaluate.sample import read_feedback
from ultramed.experiments.iteration import Iteration, rounds_table
from ultramed.experiments.ultramedical import UltraMedical
from ultramed.experiments.ultramedical_jobs import jobs_of


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


def test_a_profile_names_the_mixtures_whose_policies_learn_from_pairs(experiment):
    both = {f"{mix}_{arm}": (mix, arm) for mix in ("ultramed", "ultramix") for arm in ("dpo", "kto")}
    assert experiment.preferred == both, "all, unless some are named"
    one = ["ultramedical.preference.mixtures=[ultramix]"]
    named = UltraMedical.of(load_profile("smoke", one))
    assert named.preferred == {key: both[key] for key in ("ultramix_dpo", "ultramix_kto")}
    learn = {job.what.split(",")[0] for job in jobs_of(named) if job.kind == "preference" and job.notebook == "22"}
    assert learn == {"dpo on ultramix", "kto on ultramix"}
    with pytest.raises(ConfigError, match=r"iterative\.mixture"):  # it goes on from a vanilla policy, which is not trained
        load_profile("smoke", ["ultramedical.preference.mixtures=[ultramed]"])
    with pytest.raises(ConfigError, match=r"preference\.mixtures"):
        load_profile("smoke", ["ultramedical.preference.mixtures=[ultramax]"])


def test_a_judge_ranks_in_the_oracles_place(experiment):
    """One that likes replies by a hash of theirs: pairs follow it, right or wrong, for the pool and for the policy's own
    samples."""

    def worth(text: str) -> int:
        return int(hashlib.md5(text.strip().encode()).hexdigest(), 16) % 10 + 1

    def answer(body):
        shown = re.split(r"\n\nReply \d+:\n", body["messages"][-1]["content"])[1:]
        return json.dumps({"scores": [worth(text) for text in shown]})

    with Faulty(answer=answer) as server:
        changes = [
            "ultramedical.annotator=judge",
            f"judge={server.config().url}#m",
            "ultramedical.preference.on_policy.margin=0",
        ]
        judged = UltraMedical.of(load_profile("smoke", changes))
        ranked = judged.rank_candidates("medical")
        made = judged.preference_pairs("ultramed", 1)
        asked = len(server.bodies)
        assert judged.preference_pairs("ultramed", 1).key == made.key
        assert len(server.bodies) == asked, "nothing is asked twice"
    assert ranked.metrics["annotator"] == "m"
    assert all(c["score"] == worth(c["text"]) for row in read_feedback(ranked) for c in row["candidates"])
    rows = read_pairs(made / "pairs.parquet")
    assert rows
    for row in rows:
        assert worth(row["chosen"][0]["content"]) == row["meta"]["chosen_score"] > row["meta"]["rejected_score"]
    assert np.isnan(score_agreement(ranked, ranked)), "a judge is not held to itself"
    assert -1 <= score_agreement(experiment.rank_candidates("medical"), ranked) < 0.5
    with pytest.raises(ConfigError, match="'judge' needs a server"):
        load_profile("smoke", ["ultramedical.annotator=judge"])


def test_prompts_begin_where_the_reward_models_end(experiment):
    own = {row["id"] for row in read_feedback(experiment._rank_own("ultramed", "medical", 0))}
    pool = {row["id"] for row in read_feedback(experiment.rank_candidates("medical"))}
    assert len(own) == 8
    assert not own & pool


@pytest.mark.parametrize("profile", ["laptop", "workstation", "replication", "gpu", "paper-8b", "smoke"])
def test_general_questions_to_choose_by_are_no_test_questions(profile, monkeypatch):
    experiment = UltraMedical.of(load_profile(profile))
    size = experiment.profile.exam.general_test
    monkeypatch.setattr(canonical, "subset_sizes", lambda path: {"general": size})
    monkeypatch.setattr("ultramed.experiments.ultramedical.dataset", lambda profile, name: Path(name))
    [held] = experiment.prompts(experiment.settings.candidates.held_prompts["general"], held=True)
    tests = [next(experiment.test_prompts("general", seed)) for seed in experiment.seeds]
    assert {where["side"] for where in (held, *tests)} == {"general_test"}
    for where in tests:
        start, stop = where["select"]["general"]
        assert held["select"]["general"][1] <= start < stop <= size


@pytest.mark.parametrize("profile", ["laptop", "workstation", "replication", "gpu", "smoke"])
def test_rows_of_sft_are_no_prompts_of_what_follows(profile):
    """Reward models, preference learning and every round of iteration begin where the ones before end, and SFT behind them
    all. (In the papers' profiles UltraMedical's rows are in both, as they were.)"""
    section = load_profile(profile).ultramedical
    last: dict[str, int] = {}

    def uses(counts: dict[str, int], first: int = 0) -> None:
        for name, count in counts.items():
            key = name.removesuffix(f":{name.partition(':')[0]}")  # 'medqa:medqa' is all of 'medqa'
            last[key] = max(last.get(key, 0), first + count)

    for counts in section.candidates.prompts.values():
        uses(counts)
    for counts in section.preference.prompts.values():
        uses(counts, section.preference.first)
    if section.iterative:
        step = max(section.iterative.prompts.values())
        for number in range(section.iterative.rounds + 1):
            uses(section.iterative.prompts, section.iterative.first + number * step)
    for name, mixture in section.sft.mixtures.items():
        for source in mixture:
            part, _, rows = source.partition("[")
            if rows and part in last and part != "exam:general":
                assert int(rows.partition(":")[0]) >= last[part], (name, source, last[part])


def test_policies_are_ranked_by_their_own_seeds_reward_model(experiment, monkeypatch):
    """One policy is ranked by the models of all reward seeds, several each by its own; a seed without one by the first."""
    made = []
    monkeypatch.setattr(
        "ultramed.experiments.ultramedical.reward_feedback", lambda config, reward, **samples: made.append(reward)
    )
    monkeypatch.setattr(UltraMedical, "train_reward_model", lambda self, arm, seed: f"{arm}{seed}")

    def of(reward: int, rerank: int) -> UltraMedical:
        changes = [f"ultramedical.reward.seeds={reward}", f"ultramedical.rerank.seeds={rerank}"]
        return UltraMedical.of(load_profile("smoke", changes))

    assert (of(2, 1).rankers, of(2, 2).rankers, of(1, 2).rankers) == ([0, 1], [], [])
    for seed in (0, 1):
        of(2, 2).score({}, seed)
    of(1, 2).score({}, 1)
    assert made == ["mixed0", "mixed1", "mixed0"]


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
