import re

import pytest
import yaml
from conftest import REPO
from hypothesis import given
from hypothesis import strategies as st

from ultramed.book.sweep import SweepConfig, _profile
from ultramed.core.config import (
    apply_override,
    arm_config,
    load_profile,
    merge,
    parse_override,
    profiles,
    read_yaml,
    resolved_values,
    validate,
)
from ultramed.core.errors import ConfigError
from ultramed.core.profile import ChangesToTrain, Profile, UltraMedicalConfig
from ultramed.core.schema import TrainConfig

PARAMS = sorted((REPO / "params").glob("*.yaml"))
SWEEPS = sorted((REPO / "params" / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "laptop"),
        (["train.lora.r=16"], "laptop+train.lora.r=16"),
        (["train.epochs=2", "limit=8"], "laptop+train.epochs=2+limit=8"),
        (["judge=http://localhost:8000/v1#m"], r"laptop\+judge=http-localhost-8000-v1-m-[0-9a-f]{6}"),
        (['models=[{name: "tiny:llama", label: ' + "x" * 200 + "}]"], r"laptop\+models=[\w.=-]{73}-[0-9a-f]{6}"),
    ],
)
def test_a_changed_profile_has_a_folder_of_its_own(overrides, name):
    made = load_profile("laptop", overrides).name
    assert made == name or re.fullmatch(name, made)


def test_a_profile_by_its_path_has_the_same_folder():
    assert load_profile(str(REPO / "params" / "laptop.yaml")).name == "laptop"


@pytest.mark.parametrize("path", PARAMS, ids=lambda p: p.stem)
def test_every_profile_loads_with_all_its_arms(path):
    profile = load_profile(path.stem)
    assert profile.name == path.stem
    for arm in profile.usmle.arms:
        arm_config(profile, arm)


def test_the_profiles_of_the_book_are_there():
    assert {"smoke", "laptop", "gpu", "medalpaca", "medalpaca-7b", "medalpaca-13b", "paper-8b", "paper-70b"} <= set(profiles())


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_every_sweep_loads_and_every_point_is_a_valid_profile(path):
    sweep = validate(SweepConfig, read_yaml(path), str(path))
    assert sweep.points()
    for point in sweep.points():
        for seed in sweep.seeds:
            _profile(sweep, point, seed)


@pytest.mark.parametrize(
    ("override", "named", "meant"),
    [
        ("train.lerning_rate=1", "train.lerning_rate", "train.learning_rate"),
        ("usmle.arms.full.lerning_rate=1", "lerning_rate", "learning_rate"),
        ("trian.epochs=1", "trian", "train"),
        ("train.lora.alhpa=1", "train.lora.alhpa", "train.lora.alpha"),
        ("models.0.nmae=x", "models.0.nmae", "models.0.name"),
    ],
)
def test_a_misspelt_key_is_an_error_that_names_it_and_the_nearest_known_one(override, named, meant):
    with pytest.raises(ConfigError) as err:
        load_profile("laptop", [override])
    assert repr(named) in str(err.value)
    assert f"did you mean {meant!r}?" in str(err.value)


def test_a_wrong_value_says_what_came():
    with pytest.raises(ConfigError, match=r"train\.epochs.*'many'"):
        load_profile("laptop", ["train.epochs=many"])


def test_unknown_profile_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'laptop'"):
        load_profile("labtop")


def test_override_without_equals_sign():
    with pytest.raises(ConfigError, match="key=value"):
        load_profile("laptop", ["train.epochs"])


def test_overrides_reach_values_lists_and_numbers_in_scientific_notation():
    p = load_profile("laptop", ["train.learning_rate=3e-5", "models.0.label=mine", "usmle.seeds=[4, 5, 6]"])
    assert (p.train.learning_rate, p.models[0].label, p.usmle.seeds) == (3e-5, "mine", [4, 5, 6])


def test_a_mixture_is_replaced_not_merged():
    assert merge({"mixture": {"a": 1}}, {"mixture": {"b": 2}}, TrainConfig) == {"mixture": {"b": 2}}
    assert merge({"lora": {"r": 1}}, {"lora": {"alpha": 2}}, TrainConfig) == {"lora": {"r": 1, "alpha": 2}}
    arms = merge({"full": {"mixture": {"a": 1}, "epochs": 2}}, {"full": {"mixture": {"b": 2}}}, dict[str, ChangesToTrain])
    assert arms == {"full": {"mixture": {"b": 2}, "epochs": 2}}, "also in what an arm changes"
    questions = {"test": {"questions": {"medical": {"a": 1}, "general": {"c": 3}}}}
    merged = merge(questions, {"test": {"questions": {"medical": {"b": 2}}}}, UltraMedicalConfig)
    assert merged == {"test": {"questions": {"medical": {"b": 2}}}}
    assert merge({"sft": {"learning_rate": 1}, "x": 1}, {"sft": {}}, None) == {"sft": {}, "x": 1}
    assert merge({"cost": {"rows": 1}}, {"cost": None}, Profile) == {}
    assert list(arm_config(load_profile("smoke"), "alpaca").mixture) == ["exam:general"]


def test_extends_merges_deeply_and_refuses_circles(tmp_path):
    (tmp_path / "a.yaml").write_text(f"extends: {tmp_path}/b.yaml\n")
    (tmp_path / "b.yaml").write_text(f"extends: {tmp_path}/a.yaml\n")
    with pytest.raises(ConfigError, match="circle"):
        load_profile(str(tmp_path / "a.yaml"))
    (tmp_path / "c.yaml").write_text("extends: laptop\ntrain: {epochs: 7}\n")
    p = load_profile(str(tmp_path / "c.yaml"))
    assert p.train.epochs == 7
    assert p.train.max_length == load_profile("laptop").train.max_length


def test_a_key_written_twice_is_an_error(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: laptop\ntrain: {epochs: 7, epochs: 8}\n")
    with pytest.raises(ConfigError, match="'epochs' is written twice"):
        load_profile(str(tmp_path / "a.yaml"))


def test_unequal_tuning_is_refused():
    with pytest.raises(ConfigError, match="as many learning rates"):
        load_profile("workstation", ["usmle.grid.lora=[1e-3]"])


@given(st.dictionaries(st.sampled_from("abc"), st.integers()), st.sampled_from("abcd"), st.integers())
def test_an_override_changes_its_key_and_nothing_else(data, key, value):
    before = dict(data)
    after = apply_override(data, [key], value)
    assert data == before
    assert after == {**before, key: value}


@given(st.one_of(st.integers(), st.booleans(), st.lists(st.integers()), st.text(alphabet="abc", min_size=1)))
def test_override_values_survive_the_round_trip(value):
    text = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
    assert parse_override(f"a.b={text}") == (["a", "b"], value)


def test_medalpacas_profile_is_the_papers():
    """train.py: 2e-5, three epochs, 128 rows, 100 warm-up steps, 10% held out, evaluated every 200 steps; both sizes."""
    p = load_profile("medalpaca")
    assert [m.label for m in p.models] == ["LLaMA-7B", "LLaMA-13B"]
    assert p.usmle.published_sizes == ["7b", "13b"]
    for arm in ("full", "lora", "lora_8bit"):
        c = arm_config(p, arm)
        assert (c.learning_rate, c.epochs, c.global_batch_size, c.max_length) == (2e-5, 3, 128, 256)
        assert (c.warmup_steps, c.warmup_ratio, c.held_out, c.eval_steps) == (100, 0, 0.1, 200)
    assert (p.usmle.main_rate, p.usmle.same_scale) == ("paper", True)
    assert len(p.train.mixture) == 16
    assert sum(p.train.mixture.values()) == 238_114
    assert 238_114 - 8_676 == 229_438, "README's table: without MedQA, and with its 10,178 rows for Health Advice"
    asked = p.eval
    assert (asked.protocol, asked.max_new_tokens, asked.temperature, asked.top_k, asked.top_p, asked.tries) == (
        *("medalpaca", 128, 0.4, 50),
        *(0.9, 5),
    )
    curated, unfiltered = (sum(p.usmle.arms[arm]["mixture"].values()) for arm in ("curated", "unfiltered"))
    assert curated == unfiltered
    for name, label in (("medalpaca-7b", "LLaMA-7B"), ("medalpaca-13b", "LLaMA-13B")):
        one = load_profile(name)
        assert [m.label for m in one.models] == [label]
        assert one.train == p.train


def test_a_profile_may_tune_nothing():
    p = load_profile("smoke", ["usmle.grid={}", "usmle.arms.full.learning_rate=3e-3"])
    assert p.usmle.grid == {}
    assert arm_config(p, "full").learning_rate == 3e-3
    with pytest.raises(ConfigError, match="as many learning rates as the others"):
        load_profile("smoke", ["usmle.grid.full=[1e-3]"])
    assert load_profile("smoke", ["usmle.grid.full=[]"]).usmle.grid["full"] == []


def test_limit_caps_every_count_and_nothing_else():
    whole, small = load_profile("gpu"), load_profile("gpu", ["limit=10"])
    assert set(small.train.mixture.values()) == {10}
    assert set(small.usmle.questions.values()) == {10}
    assert {n for counts in small.ultramedical.sft.mixtures.values() for n in counts.values()} == {10}
    assert {n for spec in small.ultramedical.test.questions.values() for n in spec.values()} == {10}
    assert {n for spec in small.ultramedical.candidates.prompts.values() for n in spec.values()} == {10}
    assert small.ultramedical.iterative.prompts == {"medqa:medqa": 10, "medmcqa:medmcqa": 10}
    assert set(small.usmle.arms["alpaca"]["mixture"].values()) == {10}
    assert (small.usmle.tuning_questions, small.usmle.tries_limit, small.open_rows) == (10, 10, 10)
    assert small.ultramedical.reward.public_pairs == 10, "a default, too"
    for kept in ("train.max_length", "train.epochs", "usmle.seeds", "usmle.grid", "ultramedical.sample.n", "exam", "cost"):
        one, two = whole, small
        for part in kept.split("."):
            one, two = getattr(one, part), getattr(two, part)
        assert one == two, kept
    paper = load_profile("paper-8b", ["limit=10"])  # multiples of a source, and 'all' as 0 or nothing, are limited, too
    assert paper.ultramedical.sft.mixtures["ultramed"] == {"ultramedical": 10}
    assert load_profile("gpu", ["limit=100000"]).usmle.questions == whole.usmle.questions


def test_every_value_says_who_set_it():
    rows = {
        key: (value, place)
        for key, value, place in resolved_values("smoke", ["train.epochs=3", "cost.arms.full={optim: adamw_8bit}"])
    }
    lines = {name: (REPO / "params" / f"{name}.yaml").read_text().splitlines() for name in ("smoke", "laptop")}

    def line(place: str) -> str:
        file, _, number = place.rpartition(":")
        return lines[file.removeprefix("params/").removesuffix(".yaml")][int(number) - 1]

    assert rows["train.epochs"] == (3.0, "--set train.epochs=3")
    assert rows["cost.arms.full.optim"] == ("adamw_8bit", "--set cost.arms.full={optim: adamw_8bit}")
    assert rows["train.save_steps"] == (0, "default")
    value, place = rows["ultramedical.rerank.n"]
    assert value == 4
    assert "rerank: {n: 4," in line(place)
    value, place = rows["ultramedical.preference.train.beta"]
    assert place.startswith("params/laptop.yaml:")
    assert "beta: 0.1" in line(place)
    assert len(rows) > 200
