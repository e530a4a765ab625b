import pandas as pd
import pytest
from rich.console import Console

from ultramed.book.sweep import run_sweep
from ultramed.core.config import home
from ultramed.core.errors import ConfigError
from ultramed.experiments.medalpaca import MedAlpaca

SWEEP = """
profile: smoke
arm: lora
seeds: [0, 1]
grid:
  train.lora.r: [2, 4]
  usmle.arms.lora.learning_rate: [1e-3]
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "ranks.yaml").write_text(SWEEP)
    return tmp_path / "ranks.yaml"


def test_one_row_a_run_and_the_second_time_is_free(file, monkeypatch):
    assert run_sweep(file, Console(quiet=True))
    table = pd.read_csv(home() / "figures" / "smoke" / "tables" / "sweep_ranks.csv")
    assert len(table) == 4
    assert set(table.state) == {"done"}
    assert table.trainable.nunique() == 2
    monkeypatch.setattr("ultramed.train.sft.load_for_training", lambda *a, **k: pytest.fail("trained again"))
    assert run_sweep(file, Console(quiet=True))


def test_a_failed_point_does_not_stop_the_others_and_is_tried_again(file, monkeypatch):
    file.write_text(SWEEP.replace("1e-3", "3e-3"))
    real = MedAlpaca.train_arm

    def breaks(self, arm, seed, **changes):
        if self.profile.train.lora.r == 4:
            raise RuntimeError("on purpose")
        return real(self, arm, seed, **changes)

    monkeypatch.setattr(MedAlpaca, "train_arm", breaks)
    assert not run_sweep(file, Console(quiet=True))
    table = pd.read_csv(home() / "figures" / "smoke" / "tables" / "sweep_ranks.csv")
    assert sorted(table.state) == ["done", "done", "failed", "failed"]
    monkeypatch.undo()
    assert run_sweep(file, Console(quiet=True))


def test_a_typo_in_a_sweep_costs_nothing(file, monkeypatch):
    file.write_text(SWEEP.replace("lora.r", "lora.rnak"))
    monkeypatch.setattr(MedAlpaca, "of", lambda *a: pytest.fail("something ran"))
    with pytest.raises(ConfigError, match=r"unknown key 'train\.lora\.rnak'"):
        run_sweep(file, Console(quiet=True))


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        (
            "arm: lora\ngrid: {train.learning_rate: [1e-3]}",
            "train.learning_rate changes nothing: usmle.arms.lora.learning_rate sets 0.006",
        ),
        (
            "experiment: policy\ngrid: {train.learning_rate: [1e-3]}",
            "changes nothing: ultramedical.sft.train.learning_rate sets 0.0002",
        ),
        (
            "experiment: preference\narm: dpo\ngrid: {ultramedical.preference.train.loss: [ipo]}",
            "changes nothing: ultramedical.preference.arms.dpo.loss sets 'dpo'",
        ),
    ],
)
def test_a_value_that_the_arm_sets_again_cannot_be_varied(tmp_path, text, hidden):
    from ultramed.book.sweep import read_sweep

    file = tmp_path / "rates.yaml"
    file.write_text(f"profile: laptop\n{text}\n")
    with pytest.raises(ConfigError, match=hidden):
        read_sweep(file)
