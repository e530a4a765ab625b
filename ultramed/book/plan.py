"""What a profile would run before it runs: training and sampling of every notebook, with rows, steps, memory and hours.

An upper estimate to plan hardware by, out of the model's shape and the profile's counts (train/estimate.py); what is not
at hand is named. Nothing is started and nothing is fetched.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

from ultramed.core.config import arm_config, merge, preference_config
from ultramed.core.errors import ConfigError
from ultramed.core.schema import OptimConfig, PreferenceConfig, Profile, TrainConfig
from ultramed.data.catalog import SOURCES
from ultramed.data.sources import local_files
from ultramed.train import training
from ultramed.train.estimate import Shape, flops_per_token, memory, shape_of

UTILISATION = {"training": 0.4, "sampling": 0.05}  # of the device's peak; sampling is bound by memory, not by arithmetic
DEVICE_GB = 80  # an H100


@dataclass
class Run:
    """One training or sampling job. rows: training rows (pairs, prompts' replies) or sampled replies."""

    notebook: str
    what: str
    rows: int
    steps: int
    tokens: float
    gib: float  # of memory for each process
    hours: float  # of one device


@dataclass
class Plan:
    runs: list[Run] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def hours(self) -> float:
        return sum(r.hours for r in self.runs)


def rows_of(source: str, count: int | float) -> int:
    """Rows that a mixture takes of a source: a number, or a multiple of a known size. Raises ConfigError if unknown."""
    if isinstance(count, int):
        return count
    name = source.partition(":")[0].partition("[")[0]
    if "[" in source:
        first, last = source.partition("[")[2].rstrip("]").split(":")
        return round(count * (int(last) - int(first)))
    spec = SOURCES.get(name)
    size = (spec.hub.get("train", (None,) * 4)[3] or spec.files.get("train", ("", None))[1]) if spec else None
    if size is None:
        raise ConfigError(f"how many training rows {name!r} has is not known; give a number instead of {count}")
    return round(count * size)


class _Planner:
    def __init__(self, profile: Profile, gpus: int, tflops: float, row_tokens: int):
        self.profile, self.gpus, self.peak, self.row_tokens = profile, gpus, tflops * 1e12, row_tokens
        self.shape: Shape = shape_of(profile.models[0].name)
        self.plan = Plan()

    def train(self, notebook: str, what: str, config: OptimConfig, rows: int, replies: float = 1) -> None:
        """replies: sequences of a row (two of a pair, and two more through the reference)."""
        length = min(self.row_tokens, config.max_length)
        steps = training.step_count(config, rows)
        tokens = steps * min(config.global_batch_size, rows) * length * replies
        micro, accumulation = training.batch_plan(
            config.model_copy(update={"global_batch_size": config.global_batch_size * self.gpus}), length, self.gpus
        )
        about = {"accumulation": accumulation, "processes": self.gpus, "reference": isinstance(config, PreferenceConfig)}
        need = memory(self.shape, config, micro, length, labelled=micro * length // 2, **about)["total"]
        hours = tokens * flops_per_token(self.shape, config, length) / (self.peak * UTILISATION["training"]) / 3600
        self.plan.runs.append(Run(notebook, what, rows, steps, tokens, need / 2**30, hours))

    def sample(self, notebook: str, what: str, prompts: int, each: int, new_tokens: int) -> None:
        tokens = prompts * (self.row_tokens + each * new_tokens)
        hours = tokens * 2 * self.shape.parameters / (self.peak * UTILISATION["sampling"]) / 3600
        self.plan.runs.append(
            Run(notebook, what, prompts * each, 0, tokens, 2 * self.shape.parameters / self.gpus / 2**30, hours)
        )

    def mixture(self, counts: dict) -> int:
        return sum(rows_of(source, count) for source, count in counts.items())

    def usmle(self) -> None:
        own, profile = self.profile.usmle, self.profile
        asked = sum(own.questions.values())
        for arm in own.arms:
            config: TrainConfig = arm_config(profile, arm)
            rows, seeds = self.mixture(config.mixture), own.arm_seeds.get(arm, len(own.seeds))
            rates = len(own.grid.get(config.method, [])) if arm in ("full", "lora", "lora_8bit") else 0
            if rates:
                self.train("11", f"{arm}: {rates} learning rates", config, round(rows * own.tuning_fraction) * rates)
            self.train("11", f"{arm}: {seeds} seeds", config, rows * seeds)
            self.sample("11", f"{arm}: answers", asked * seeds, 1, profile.eval.max_new_tokens)

    def ultramedical(self) -> None:
        own, profile = self.profile.ultramedical, self.profile
        asked = sum(own.questions["medical"].values())
        sft = TrainConfig(**merge(profile.train.model_dump(mode="json"), own.sft))
        for mix, counts in own.mixtures.items():
            self.train("22", f"SFT {mix}", sft, self.mixture(counts))
            self.sample("22", f"SFT {mix}: answers", asked, 1, profile.eval.max_new_tokens)
        pool = sum(member.n for member in own.pool if member.policy not in ("reference", "guess"))
        for domain, spec in own.prompts.items():
            prompts = sum(spec.values()) + sum(own.held_prompts[domain].values())
            self.sample("21", f"candidates, {domain}", prompts, pool, own.sample.max_new_tokens)
        pairs = {d: own.preference_prompts.get(d) or sum(spec.values()) for d, spec in own.prompts.items()}
        for mix in own.mixtures:
            count = sum(pairs.values()) if mix == "ultramix" else pairs["medical"]
            for arm in own.preference_arms:
                self.train("22", f"{arm} on {mix}", preference_config(profile, arm), count, replies=2 + 2 / 3)
                self.sample("22", f"{arm} on {mix}: answers", asked, 1, profile.eval.max_new_tokens)
        for arm, domains in own.reward_arms.items():
            prompts = round(sum(sum(own.prompts[d].values()) for d in domains) / len(domains))
            self.train("24", f"reward model, {arm}", own.reward, prompts, replies=pool)
        self.sample("25", f"{own.selection_n} samples of every question", asked, own.selection_n, own.sample.max_new_tokens)
        for arm in own.iterative.arms:
            rounds, prompts = own.iterative.rounds, sum(own.iterative.prompts.values())
            self.sample("26", f"iterative {arm}: samples", prompts * rounds, own.iterative.n, own.sample.max_new_tokens)
            self.train("26", f"iterative {arm}", preference_config(profile, arm), prompts * rounds, replies=2 + 2 / 3)

    def look(self) -> None:
        """What is not at hand."""
        for run in self.plan.runs:
            if run.gib * 2**30 > DEVICE_GB * 1e9:
                self.plan.missing.append(
                    f"memory for {run.what} (notebook {run.notebook}): {run.gib:.0f} GiB on each device, which has {DEVICE_GB} GB; "
                    f"more --gpus (no help to adapters), gradient_checkpointing, fewer micro_batch_tokens"
                )
        name, names = self.profile.models[0].name, set()
        if ":" not in name and not Path(name).expanduser().is_dir():
            offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
            gated = "; gated: accept its licence on the hub first" if name.startswith("meta-llama/") else ""
            self.plan.missing.append(f"model {name}: from the hub{offline}{gated}")
        mixtures = [self.profile.train.mixture, self.profile.usmle.questions]
        if own := self.profile.ultramedical:
            mixtures = [*mixtures, *own.mixtures.values(), *own.questions.values(), *own.prompts.values()]
        for counts in mixtures:
            names |= {source.partition(":")[0].partition("[")[0] for source in counts}
        for name in sorted(names - {"exam"}):
            if not local_files(name):
                where = ", ".join(sorted({h[0] for h in SOURCES[name].hub.values()}))
                self.plan.missing.append(
                    f"data {name}: " + (f"from the hub ({where})" if where else "bring your own; " + SOURCES[name].note)
                )


def plan(profile: Profile, *, gpus: int = 1, tflops: float = 989.0, row_tokens: int = 512) -> Plan:
    """Runs of notebooks 11 and 21 to 26. tflops: the device's bf16 peak (H100: 989); row_tokens: mean length of a row."""
    planner = _Planner(profile, gpus, tflops, row_tokens)
    planner.usmle()
    if profile.ultramedical:
        planner.ultramedical()
    planner.look()
    return planner.plan
