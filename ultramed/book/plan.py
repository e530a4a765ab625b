"""What a profile would run before it runs: the experiments' own jobs, with rows, steps, memory and hours.

An estimate of the larger part (dev examinations, likelihoods of the base and a few samples are left out) to plan hardware by,
out of the model's shape and the profile's counts (train/estimate.py); what is not at hand is named. Nothing is started and
nothing is fetched.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ultramed.core.errors import ConfigError, UserError
from ultramed.core.profile import Profile
from ultramed.core.schema import PreferenceConfig
from ultramed.data.catalog import get
from ultramed.data.mixture import source_rows
from ultramed.data.sources import dataset, hub_root, local_files, names_in, stands_for
from ultramed.evaluate import vllm
from ultramed.experiments.jobs import Job
from ultramed.experiments.medalpaca import MedAlpaca
from ultramed.experiments.ultramedical import UltraMedical
from ultramed.experiments.ultramedical_jobs import jobs_of as jobs_of_ultramedical
from ultramed.lm.models import exceeds
from ultramed.train import training
from ultramed.train.estimate import Shape, flops_per_token, memory, shape_of

# Of the device's peak; sampling is bound by memory, not by arithmetic. Measured on an H200 with 7B and 8B shapes: 17 to 55% in
# training on rows of 2,048 tokens, 9 to 23% on four of 256 (8-bit weights least), and 7% in sampling (docs/PERFORMANCE.md).
UTILISATION = {"training": 0.4, "sampling": 0.05}
DEVICE_GB = 80  # an H100


@dataclass(frozen=True)
class Cost:
    """What a job takes. hours: of one device; gib: for each process."""

    job: Job
    steps: int
    tokens: float
    gib: float
    hours: float


@dataclass
class Plan:
    costs: list[Cost] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # what a run would fetch first
    wrong: list[str] = field(default_factory=list)  # what would stop it

    @property
    def hours(self) -> float:
        return sum(cost.hours for cost in self.costs)


@dataclass(frozen=True)
class Hardware:
    """gpus: devices that share a model. tflops: bf16 peak of one (H100: 989). row_tokens: mean length of a training row."""

    gpus: int = 1
    tflops: float = 989.0
    row_tokens: int = 512


def jobs_of(profile: Profile) -> list[tuple[Shape, Job]]:
    """Every job of notebooks 11, on all models, and 21 to 26, on the first, with the shape of its model."""
    found = [(shape_of(each.config.name), job) for each in MedAlpaca.all_of(profile) for job in each.jobs()]
    shape = shape_of(profile.models[0].name)
    return found + [(shape, job) for job in (jobs_of_ultramedical(UltraMedical.of(profile)) if profile.ultramedical else [])]


def plan(profile: Profile, hardware: Hardware = Hardware()) -> Plan:
    """The jobs with what each takes, and what is not at hand."""
    made = Plan([cost_of(job, shape, hardware) for shape, job in jobs_of(profile)])
    made.missing, made.wrong = _not_at_hand(profile), [*_too_large(made.costs), *_no_vllm(made.costs)]
    if made.missing and os.environ.get("HF_HUB_OFFLINE") == "1":
        made.wrong.append("HF_HUB_OFFLINE is set: what is not at hand cannot be fetched")
    return made


def rows_read(job: Job, hardware: Hardware) -> tuple[int, int]:
    """(rows that a training reads in an epoch, tokens of one of them); packed rows are full."""
    length = min(hardware.row_tokens, job.config.max_length)
    if not getattr(job.config, "packing", False):
        return job.rows, length
    return -(-job.rows * hardware.row_tokens // job.config.max_length), job.config.max_length


def work_of(job: Job, shape: Shape, hardware: Hardware) -> tuple[int, float, float]:
    """(optimiser steps, tokens, hours of a device) of a job."""
    peak = hardware.tflops * 1e12
    if not job.trains:
        tokens = job.prompts * hardware.row_tokens + job.rows * job.new_tokens
        return 0, tokens, tokens * 2 * shape.parameters / (peak * UTILISATION["sampling"]) / 3600
    config, (rows, length) = job.config, rows_read(job, hardware)
    steps = training.step_count(config, rows)
    tokens = steps * min(config.global_batch_size, rows) * length * job.sequences
    return steps, tokens, tokens * flops_per_token(shape, config, length) / (peak * UTILISATION["training"]) / 3600


def cost_of(job: Job, shape: Shape, hardware: Hardware) -> Cost:
    """Steps, tokens, memory and hours of a job."""
    steps, tokens, hours = work_of(job, shape, hardware)
    if not job.trains:
        return Cost(job, 0, tokens, _held(job, shape, hardware) / 2**30, hours)
    config, (_, length) = job.config, rows_read(job, hardware)
    whole = config.model_copy(update={"global_batch_size": config.global_batch_size * hardware.gpus})
    micro, accumulation = training.batch_plan(whole, length, hardware.gpus)
    need = memory(
        shape,
        config,
        micro,
        length,
        labelled=micro * length // 2,
        accumulation=accumulation,
        processes=hardware.gpus,
        reference=isinstance(config, PreferenceConfig),
    )
    return Cost(job, steps, tokens, need["total"] / 2**30, hours)


def _held(job: Job, shape: Shape, hardware: Hardware) -> float:
    """Bytes of bf16 weights on each device that writes replies: all of them, unless devices share a model."""
    whole = 2 * shape.parameters
    if job.engine == "vllm":
        return whole / (job.config.tensor_parallel or hardware.gpus)
    return whole / (hardware.gpus if exceeds(whole, int(DEVICE_GB * 1e9)) else 1)


def _too_large(costs: list[Cost]) -> list[str]:
    """Jobs that a device has no room for, each kind once."""
    large = {cost.job.what.partition(":")[0]: cost for cost in costs if cost.gib * 2**30 > DEVICE_GB * 1e9}
    return [
        f"memory for {what} (notebook {cost.job.notebook}): {cost.gib:.0f} GiB on each device, which has {DEVICE_GB} GB; "
        "more --gpus (no help to adapters), gradient_checkpointing, fewer micro_batch_tokens"
        for what, cost in large.items()
    ]


def _no_vllm(costs: list[Cost]) -> list[str]:
    """The program that some of the jobs need, if it is not there."""
    if any(cost.job.engine == "vllm" for cost in costs):
        try:
            vllm.command()
        except ConfigError as err:
            return [str(err)]
    return []


def _not_at_hand(profile: Profile) -> list[str]:
    """The models and the data sets that would have to be fetched or brought."""
    missing = []
    start = profile.ultramedical and profile.ultramedical.sft.model
    asked = [*(m.name for m in profile.models), *((start.name, start.tokenizer) if start else ())]
    for name in (n for n in dict.fromkeys(asked) if n and ":" not in n and not Path(n).expanduser().is_dir()):
        gated = "; gated: accept its licence on the hub first" if name.startswith("meta-llama/") else ""
        missing.append(f"model {name}: from the hub{gated}")
    for source in names_in(source for source, _ in requests(profile)):
        if source != "exam" and not local_files(source) and not (get(source).hub and hub_root()):
            missing.append(f"data {get(source).where()}")
    return missing


def _after(first: int, *specs: dict[str, int]) -> Iterator[dict[str, int]]:
    """What must be there for counts that begin after the first so many rows."""
    for spec in specs:
        yield {name: first + count for name, count in spec.items()}


def requests(profile: Profile) -> dict[tuple[str, str], float]:
    """(source as the profile names it, side) -> the most rows that something asks of it; a fraction is a multiple."""
    found: dict[tuple[str, str], float] = {}

    def ask(side: str, *counts: dict) -> None:
        for part in counts:
            for name, count in part.items():
                if name.partition(":")[2].startswith("general"):  # the bundled exam has them in files of their own
                    continue
                found[name, side] = max(found.get((name, side), 0), count)

    usmle = profile.usmle
    ask("train", profile.train.mixture, *(arm["mixture"] for arm in usmle.arms.values() if "mixture" in arm))
    ask("test", *_after(usmle.skip, usmle.questions))
    ask("dev", usmle.dev_counts)
    if section := profile.ultramedical:
        ask("train", *section.sft.mixtures.values(), *section.candidates.prompts.values())
        ask("train", *section.reward.sources.values())
        ask("train", *_after(section.preference.first, *section.preference.prompts.values()))
        if rounds := section.iterative:
            ask("train", *_after(rounds.first_of(rounds.rounds), rounds.prompts))
        ask("dev", *section.candidates.held_prompts.values())
        ask("test", *section.test.questions.values(), dict.fromkeys(section.reward.benches.values(), 0))
    return found


def open_data(profile: Profile) -> tuple[list[str], list[str]]:
    """(what was opened, what is wrong): every data set of a profile is read, as a run would read it, unless that would mean to
    fetch it; its sides and the numbers of rows asked of them are checked."""
    opened, wrong = [], []
    asked = requests(profile)
    for name in names_in(source for source, _ in asked):
        spec = None if name == "exam" else get(name)
        here = spec is None or local_files(name) or hub_root()
        sides = sorted({side for source, side in asked if names_in([source]) == [name]})
        if not here and not spec.hub:
            wrong.append(f"data {spec.where()}")
            continue
        if not here:
            lacking = [side for side in sides if side not in spec.sides]
            wrong += [f"data {name}: has no {side} side" for side in lacking]
            opened.append(f"data {name}: would be fetched from the hub, not opened ({spec.where()})")
            continue
        try:
            data = dataset(profile, name)
            for (source, side), count in sorted(asked.items()):
                if names_in([source]) == [name]:
                    counted = data.metrics["counts"].get(side) if source == name else None  # of a part, the rows must be read
                    rows = len(source_rows(source, side, {name: data})) if counted is None else counted
                    if isinstance(count, int) and count > rows and side != "test":
                        wrong.append(f"data {source}: {count} rows asked of its {side} side, it has {rows}")
            fewer = {} if spec is None else stands_for(name, profile.prefer)
            counts = {side: f"{side} {n:,}" for side, n in data.metrics["counts"].items()}
            counts |= {side: f"{counts[side]} (the hub has {whole:,})" for side, (_, whole) in fewer.items()}
            opened.append(f"data {name}: " + ", ".join(counts.values()))
        except UserError as err:
            wrong.append(f"data {name}: {err}")
    return opened, wrong
