"""Human rankings become feedback and pairs; a reward model can be trained and judged on them."""

import pytest

from ultramed.annotate.human import HumanConfig, human_feedback, human_pairs
from ultramed.core.errors import ConfigError
from ultramed.core.schema import RewardConfig
from ultramed.data.public_pairs import SECTIONS, PublicConfig, public_pairs
from ultramed.data.rows import read_pairs
from ultramed.evaluate.sample import read_feedback
from ultramed.train.reward import reward


def test_without_the_data_it_says_what_is_missing(monkeypatch):
    monkeypatch.delenv("ULTRAMED_DATA", raising=False)
    with pytest.raises(ConfigError, match=r"ULTRAMED_DATA/mediqa2019_qa with validation.parquet"):
        human_feedback(HumanConfig(side="validation"))


def test_pairs_follow_the_expert(data, medalpaca):
    config = HumanConfig(side="validation", words=20)
    rows = read_feedback(human_feedback(config))
    assert (len(rows), sum(len(r["candidates"]) for r in rows)) == (25, 234)
    made = human_pairs(config, per_prompt=6)
    pairs = read_pairs(made / "pairs.parquet")
    assert all(p["meta"]["chosen_score"] > p["meta"]["rejected_score"] for p in pairs)
    assert {p["subset"] for p in pairs} == {"human"}
    setting = RewardConfig(learning_rate=1e-3, global_batch_size=5, max_length=256)
    assert reward(setting, model=medalpaca.base, pairs=made).metrics["prompts"] <= 25


def test_public_pairs_have_rewardbench_sections(data):
    made = public_pairs(PublicConfig(count=20, words=150))
    pairs = read_pairs(made / "pairs.parquet")
    by = {name: [p for p in pairs if p["subset"] == name] for name in SECTIONS}
    assert {name: len(part) for name, part in by.items()} == dict.fromkeys(SECTIONS, 20)
    for pair in by["reasoning"]:
        (steps, right), (same, wrong) = (pair[side][0]["content"].rsplit("#### ", 1) for side in ("chosen", "rejected"))
        assert steps == same
        assert int(right) != int(wrong)
    for pair in by["safety"]:
        assert [m["role"] for m in pair["prompt"]][::2] == ["user"] * (len(pair["prompt"]) // 2 + 1)
    assert made.metrics["sections"]["safety"]["of"] > 2000
    assert {p["id"] for p in read_pairs(public_pairs(PublicConfig(count=5, words=150)) / "pairs.parquet")}.issubset(
        {p["id"] for p in pairs}
    )


def test_public_pairs_say_what_is_missing(monkeypatch):
    monkeypatch.delenv("ULTRAMED_DATA", raising=False)
    with pytest.raises(ConfigError, match=r"need ULTRAMED_DATA with gsm8k/test.parquet"):
        public_pairs(PublicConfig())
