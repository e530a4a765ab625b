"""Sweeps: one experiment of a profile over a grid (or a list) of overrides and seeds; one tidy row a run, and a figure."""

import itertools
import json
import logging
from pathlib import Path
from typing import Literal

import pandas as pd
from pydantic import BaseModel, Field, model_validator
from rich.console import Console

from ultramed.core import config
from ultramed.core.errors import ConfigError
from ultramed.core.profile import Profile
from ultramed.core.schema import Strict
from ultramed.core.store import Artifact, write_json
from ultramed.evaluate.arms import Answers, artifacts_of
from ultramed.evaluate.rerank import Votes
from ultramed.evaluate.stats import clustered
from ultramed.experiments.medalpaca import MedAlpaca
from ultramed.experiments.ultramedical import UltraMedical
from ultramed.report import figures
from ultramed.report.scorecard import folder
from ultramed.report.tables import save_table

log = logging.getLogger(__name__)


class SweepConfig(Strict):
    """`grid`: dotted key -> values, all combinations. `runs`: a list of {key: value} instead of (or added to) it.

    experiment: 'sft' trains an arm of the section `usmle`; the others belong to `ultramedical`: 'policy' fine-tunes on
    the mixture `mix`, 'preference' adds the arm to it, 'reward' trains a reward model and measures it on the medical
    bench, 'vote' takes the majority of samples of the policy `mix`.
    """

    profile: str = "laptop"
    experiment: Literal["sft", "policy", "preference", "reward", "vote"] = "sft"
    arm: str = "full"
    mix: str = "ultramed"
    seeds: list[int] = Field(default=[0], min_length=1)
    grid: dict[str, list] = Field(default_factory=dict)
    runs: list[dict] = Field(default_factory=list)

    @model_validator(mode="after")
    def _something(self):
        if not self.grid and not self.runs:
            raise ValueError("a sweep needs a `grid` or `runs`")
        return self

    def points(self) -> list[dict]:
        grid = (
            [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]
            if self.grid
            else []
        )
        return [*grid, *self.runs]


def read_sweep(file: Path) -> tuple[SweepConfig, list[tuple[dict, int]]]:
    """The sweep and its (point, seed) list, every one checked: a typo in the last should not cost the run of the first."""
    sweep = config.validate(SweepConfig, config.read_yaml(file), str(file))
    points = [(point, seed) for point in sweep.points() for seed in sweep.seeds]
    for point, seed in points:
        _profile(sweep, point, seed)
    return sweep, points


def run_point(file: Path, number: int, console: Console) -> None:
    """Run one point (counted from 0) and keep its stages in the store: a task of a cluster."""
    from ultramed.core.log import quiet_libraries

    quiet_libraries()
    sweep, points = read_sweep(file)
    if not 0 <= number < len(points):
        raise ConfigError(f"{file} has the points 0 to {len(points) - 1}, not {number}")
    point, seed = points[number]
    answers, _ = _run(sweep, _profile(sweep, point, seed), seed)
    frame = answers.frame
    console.print(f"{number}: {point}, seed {seed}: {clustered(frame.correct, frame.concept)}")


def run_sweep(file: Path, console: Console) -> bool:
    """Run every point and seed; True if none failed. Call it again to try failed ones; finished ones cost nothing.

    The arm is trained at each point's own learning rate, not at a tuned one. Stages that points share (base model,
    exam, rows) are made once. Writes `sweep_<name>` as table and figure.
    """
    from ultramed.core.log import quiet_libraries

    quiet_libraries()
    figures.style()
    sweep, points = read_sweep(file)
    rows, made = [], []
    for number, (point, seed) in enumerate(points, 1):
        label = ", ".join(f"{k.split('.')[-1]}={_short(v)}" for k, v in point.items())
        row = {**{k: _short(v) for k, v in point.items()}, "seed": seed}
        try:
            profile = _profile(sweep, point, seed)
            answers, model = _run(sweep, profile, seed)
        except Exception as err:  # one bad point must not stop the others; it is reported and tried again next time
            log.error("%d/%d %s seed %d failed: %s", number, len(points), label, seed, err)
            rows.append({**row, "state": "failed", "error": f"{type(err).__name__}: {err}"})
            continue
        e, m = clustered(answers.frame.correct, answers.frame.concept), model.metrics
        made.append(answers)
        rows.append(
            {
                **row,
                "state": "done",
                **e.row(),
                "train_loss": m["train_loss"],
                "trainable": m["trainable_parameters"],
                "seconds": m["train_seconds"],
            }
        )
        console.print(f"{number}/{len(points)} {label} seed {seed}: {e}")
    table = pd.DataFrame(rows)
    name, where = f"sweep_{file.stem}", config.raw_profile(sweep.profile)["name"]
    save_table(
        table, name, profile=where, caption=f"Sweep {file.stem}: arm {sweep.arm}, one row a run.", artifacts=artifacts_of(made)
    )
    done = table[table.state == "done"]
    if len(done):
        keys = list(sweep.points()[0])
        shown = done.assign(point=[", ".join(f"{k.split('.')[-1]} {r[k]}" for k in keys if k in r) for _, r in done.iterrows()])
        shown = shown.assign(arm=sweep.arm, seed="seed " + shown.seed.astype(str))
        fig = figures.intervals(shown, row="point", facet="arm", hue="seed")
        figures.save_figure(
            fig, name, profile=where, caption=f"Sweep {file.stem}, 95% intervals.", artifacts=artifacts_of(made)
        )
    write_json(folder(where) / "tables" / f"{name}_config.json", json.loads(sweep.model_dump_json()))
    console.print(f"{len(done)} of {len(points)} runs done; {folder(where) / 'tables' / f'{name}.csv'}", soft_wrap=True)
    return len(done) == len(points)


def _run(sweep: SweepConfig, profile: Profile, seed: int) -> tuple[Answers, Artifact]:
    """(what one point got right, the model that was trained)."""
    if sweep.experiment == "sft":
        medalpaca = MedAlpaca.of(profile)
        model = medalpaca.train_arm(sweep.arm, seed)
        return medalpaca.examine(model, seed), model
    experiment = UltraMedical.of(profile)
    if sweep.experiment == "reward":
        answers = experiment.score_pairs(sweep.arm, experiment.make_bench("medical"))
        return answers, answers.artifacts[0]
    if sweep.experiment == "preference":
        model = experiment.train_preference(sweep.mix, sweep.arm, seed)
        return experiment.examine(model, seed), model
    model = experiment.train_sft(sweep.mix, seed)
    greedy = experiment.examine(model, seed)
    if sweep.experiment == "vote":
        return Votes(experiment.sample_test(lambda _: model)).select("self_consistency", like=greedy), model
    return greedy, model


def _short(value) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def _profile(sweep: SweepConfig, point: dict, seed: int) -> Profile:
    overrides = [f"{key}={json.dumps(value)}" for key, value in point.items()]
    if sweep.experiment != "sft":
        overrides += [f"ultramedical.seeds=[{seed}]", "ultramedical.reward.seeds=1"]
    profile = config.load_profile(sweep.profile, overrides)
    if sweep.experiment == "sft":
        _not_hidden(point, "train", profile.train, config.arm_config(profile, sweep.arm), f"usmle.arms.{sweep.arm}")
        if seed not in profile.usmle.seeds:
            raise ConfigError(f"seed {seed} is not one of the profile's {profile.usmle.seeds}")
        return profile
    section = profile.ultramedical
    if section is None:
        raise ConfigError(f"profile {sweep.profile!r} has no section `ultramedical`")
    arms = {"preference": section.preference.arms, "reward": section.reward.arms}.get(sweep.experiment, [sweep.arm])
    config.known(sweep.arm, arms, f"profile {sweep.profile!r}")
    config.known(sweep.mix, section.sft.mixtures, f"profile {sweep.profile!r}, ultramedical.sft.mixtures")
    _not_hidden(point, "train", profile.train, UltraMedical.of(profile).sft_config(sweep.mix, seed), "ultramedical.sft.train")
    if sweep.experiment == "preference":
        used, arm = config.preference_config(profile, sweep.arm), f"ultramedical.preference.arms.{sweep.arm}"
        _not_hidden(point, "ultramedical.preference.train", section.preference.train, used, arm)
    return profile


def _not_hidden(point: dict, section: str, given: BaseModel, used: BaseModel, by: str) -> None:
    """Raises ConfigError where a point sets a value of `section` that another one (`by`) sets again: its runs would be the same
    under other names."""
    given, used = given.model_dump(mode="json"), used.model_dump(mode="json")
    for key in point:
        if key.startswith(f"{section}."):
            name, *rest = key.removeprefix(f"{section}.").split(".")
            if _inside(given[name], rest) != _inside(used[name], rest):
                there = ".".join([by, name, *rest])
                raise ConfigError(f"{key} changes nothing: {there} sets {_inside(used[name], rest)!r}; vary that")


def _inside(value, path: list[str]):
    for name in path:
        value = value[name] if isinstance(value, dict) else None
    return value
