"""Human rankings become feedback and pairs; a reward model can be trained and judged on them."""

import pytest

from ultramed.annotate.human import HumanConfig, human_feedback, human_pairs
from ultramed.data.rows import read_pairs
from ultramed.evaluate.sample import read_feedback
from ultramed.schema import ConfigError, RewardConfig
from ultramed.train.reward import reward


def test_without_the_data_it_says_what_is_missing(monkeypatch):
    monkeypatch.delenv("ULTRAMED_DATA", raising=False)
    with pytest.raises(ConfigError, match=r"ULTRAMED_DATA/mediqa2019_qa with validation.parquet"):
        human_feedback(HumanConfig(side="validation"))


def test_pairs_follow_the_expert(data, bench):
    config = HumanConfig(side="validation", words=20)
    rows = read_feedback(human_feedback(config))
    assert (len(rows), sum(len(r["candidates"]) for r in rows)) == (25, 234)
    made = human_pairs(config, per_prompt=6)
    pairs = read_pairs(made / "pairs.parquet")
    assert all(p["meta"]["chosen_score"] > p["meta"]["rejected_score"] for p in pairs)
    assert {p["subset"] for p in pairs} == {"human"}
    setting = RewardConfig(learning_rate=1e-3, global_batch_size=5, max_length=256)
    assert reward(setting, model=bench.model, pairs=made).metrics["prompts"] <= 25
