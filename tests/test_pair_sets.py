"""Released sets of pairs become what training takes, alone or together, by hand and from the hub's own columns."""

import hub
import pytest
from handmade import given

from ultramed.annotate.pair_sets import JoinConfig, join_pairs, pairs_from
from ultramed.core.errors import ConfigError
from ultramed.core.schema import PreferenceConfig, RewardConfig
from ultramed.data.adapters import ordered_pairs, preference, ultrainteract, ultrasafety
from ultramed.data.rows import read_pairs
from ultramed.data.sources import SourceConfig, source
from ultramed.train.preference import preference as train_preference
from ultramed.train.reward import reward


@pytest.fixture
def from_hub(tmp_path_factory, monkeypatch, fresh_store):
    monkeypatch.setenv("ULTRAMED_HUB", str(hub.build(tmp_path_factory.mktemp("hub"), 14)))
    monkeypatch.delenv("ULTRAMED_DATA", raising=False)
    return lambda name: source(SourceConfig(name=name, prefer="hub"))


def says(text):
    return [{"role": "assistant", "content": text}]


def pair(name, prompt, chosen, rejected, *scores):
    meta = {"prompt_id": prompt} | dict(zip(("chosen_score", "rejected_score"), scores, strict=False))
    asked = [{"role": "user", "content": prompt}]
    return {"id": name, "source": "t", "subset": "s", "prompt": asked, "chosen": says(chosen), "rejected": says(rejected)} | {
        "meta": meta
    }


MEDICAL = [
    pair("1", "p", "best", "good", 5.0, 4.0),
    pair("2", "p", "best", "bad", 5.0, 1.0),
    pair("3", "p", "good", "bad", 4.0, 1.0),
    pair("4", "q", "yes", "never", 3.0, 2.0),
]
GENERAL = [pair("1", "p", "two and two is four", "five"), pair("2", "r", "six", "seven")]


def read(artifact):
    return read_pairs(artifact / "pairs.parquet")


def test_all_pairs_of_a_set_are_used_as_they_are(fresh_store):
    made = pairs_from(given(None, rows=MEDICAL))
    assert [(row["id"], row["chosen"][0]["content"], row["meta"]["chosen_score"]) for row in read(made)] == [
        ("1", "best", 5.0),
        ("2", "best", 5.0),
        ("3", "good", 4.0),
        ("4", "yes", 3.0),
    ]
    m = made.metrics
    assert (m["pairs"], m["sources"]) == (4, {"data": {"prompts": 2, "pairs": 4, "without_pair": 0}})
    assert m["chosen_is_longer"] == 0.5, "best and good are longer than bad: two of four"


def test_xpo_takes_the_best_against_a_random_lower_one(fresh_store):
    data, seen = given(None, rows=MEDICAL), set()
    for seed in range(12):
        rows = read(pairs_from(data, rule="best_random", seed=seed))
        assert [row["meta"]["prompt_id"] for row in rows] == ["p", "q"]
        assert rows[0]["chosen"] == says("best")
        seen.add(rows[0]["rejected"][0]["content"])
    assert seen == {"good", "bad"}
    with pytest.raises(ConfigError, match="'data' has none for prompt 'p'"):
        pairs_from(given(None, rows=GENERAL), rule="best_random")


def test_sets_are_joined_with_a_count_of_prompts_each(fresh_store):
    sets = {"medical": given(None, rows=MEDICAL), "general": given(None, rows=GENERAL)}
    made = join_pairs(JoinConfig(take={"medical": 1, "general": 0}), **sets)
    rows = read(made)
    assert {row["source"] for row in rows} == {"medical", "general"}
    assert [row["id"] for row in rows if row["source"] == "general"] == ["general:1", "general:2"]
    prompts = {row["meta"]["prompt_id"] for row in rows}
    assert len(prompts) == 3, "a prompt of the same name in another set is another prompt"
    assert made.metrics["sources"]["medical"]["prompts"] == 1
    with pytest.raises(ConfigError, match="3 prompts of 'medical' asked for, it has 2"):
        join_pairs(JoinConfig(take={"medical": 3}), **sets)
    with pytest.raises(ConfigError, match="names 'x'"):
        join_pairs(JoinConfig(take={"x": 1}), **sets)
    with pytest.raises(ConfigError, match="no side 'dev'; it has train"):
        pairs_from(sets["medical"], side="dev")


def test_adapters_by_hand():
    row = preference(hub.preference(3, "test"), 3)
    assert row["subset"] == "human"
    assert row["meta"] == {
        "prompt_id": "test3",
        "chosen_score": 5.0,
        "rejected_score": 4.0,
        "chosen_model": "gpt-4",
        "rejected_model": "llama",
    }
    replies = [
        ("a", 4.0, "m"),
        ("b", 2.0, "m"),
        ("c", 2.0, "m"),
        ("d", 5.0, "m"),
        ("a", 4.0, "n"),
        ("e", None, "m"),
        (" ", 1.0, "m"),
    ]
    made = ordered_pairs("x:1", "s", "Why?", replies)
    pairs = [(p["chosen"][0]["content"], p["rejected"][0]["content"]) for p in made]
    assert pairs == [("d", "a"), ("d", "b"), ("d", "c"), ("a", "b"), ("a", "c")], "no pair of equals, blanks or unscored"
    (safe,) = ultrasafety(hub.ultrasafety(1, "train"), 1)
    assert (safe["chosen"], safe["rejected"]) == (says("a says 1"), says("b says 1"))
    step = ultrainteract(hub.ultrainteract(1, "train"), 1)
    assert [turn["role"] for turn in step["prompt"]] == ["user", "assistant", "user"]
    assert step["subset"] == "Coding"


def test_the_papers_sets_train_policies_and_reward_models(from_hub, medalpaca):
    """UltraMedical-Preference for the policy; the same and general pairs together for the reward model."""
    medical = from_hub("ultramedical_preference")
    policy = train_preference(
        PreferenceConfig(learning_rate=1e-3, max_steps=2, global_batch_size=4),
        model=medalpaca.base,
        pairs=pairs_from(medical, rule="best_random", count=8),
    )
    assert policy.metrics["pairs"] == 8
    general = {name: from_hub(name) for name in ("ultrafeedback", "ultrainteract", "ultrasafety")}
    together = join_pairs(JoinConfig(take={"medical": 0, **dict.fromkeys(general, 5)}), medical=medical, **general)
    assert {name: part["pairs"] for name, part in together.metrics["sources"].items()} == {
        "medical": 13,
        "ultrafeedback": 25,
        "ultrainteract": 5,
        "ultrasafety": 5,
    }
    made = reward(RewardConfig(learning_rate=1e-3, max_steps=2, global_batch_size=4), model=medalpaca.base, pairs=together)
    assert (made.metrics["prompts"], made.metrics["pairs"]) == (28, 48)
