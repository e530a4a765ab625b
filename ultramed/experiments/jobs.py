"""A job: one training run or one set of replies that an experiment asks for, before it is run. A plan is a list of them."""

from dataclasses import dataclass
from typing import Any, Literal

from ultramed.core.errors import ConfigError
from ultramed.core.schema import EvalConfig, OptimConfig, PreferenceConfig, RewardConfig, SampleConfig, TrainConfig
from ultramed.data.catalog import ALIASES, SOURCES

Kind = Literal["sft", "preference", "reward", "replies"]


@dataclass(frozen=True)
class Job:
    """kind: the stage that does it ('replies': answers or samples). rows: training rows, pairs, prompts with ranked replies,
    or sampled replies. sequences: read for each row (a pair has two, and two more through the reference, a third of the
    work of training). new_tokens: of a reply; prompts: that the replies are to. config: of the stage.
    """

    notebook: str
    kind: Kind
    what: str
    config: Any
    rows: int
    sequences: float = 1
    new_tokens: int = 0
    prompts: int = 0

    @classmethod
    def sft(cls, notebook: str, what: str, config: TrainConfig) -> "Job":
        rows = sum(rows_of(source, count) for source, count in config.mixture.items())
        return cls(notebook, "sft", what, config, round(rows * (1 - config.held_out)))

    @classmethod
    def preference(cls, notebook: str, what: str, config: PreferenceConfig, pairs: int) -> "Job":
        return cls(notebook, "preference", what, config, pairs, sequences=2 + 2 / 3)

    @classmethod
    def reward(cls, notebook: str, what: str, config: RewardConfig, prompts: int, candidates: int) -> "Job":
        return cls(notebook, "reward", what, config, prompts, sequences=candidates)

    @classmethod
    def replies(cls, notebook: str, what: str, prompts: int, config: EvalConfig | SampleConfig, each: int = 1) -> "Job":
        return cls(notebook, "replies", what, config, prompts * each, new_tokens=config.max_new_tokens, prompts=prompts)

    @property
    def engine(self) -> str:
        """Who writes the replies; '' where something is trained."""
        return "" if self.trains else self.config.engine

    @property
    def trains(self) -> bool:
        return isinstance(self.config, OptimConfig)


def prompts_of(counts: dict[str, int]) -> int:
    """Prompts that are asked of sources; 0 means all of one."""
    return sum(rows_of(source, count or 1.0) for source, count in counts.items())


def rows_of(source: str, count: int | float) -> int:
    """Rows that a mixture takes of a source: a number, or a multiple of its size. Raises ConfigError if that is not known."""
    if isinstance(count, int):
        return count
    name, _, part = source.partition("[")
    if part:  # 'dataset:subset[0:32]'
        start, stop = part.rstrip("]").split(":")
        return round(count * (int(stop) - int(start)))
    name = name.partition(":")[0]
    spec = SOURCES.get(ALIASES.get(name, name))
    size = (spec.hub.get("train", (None,) * 4)[3] or spec.files.get("train", ("", None))[1]) if spec else None
    if size is None:
        raise ConfigError(f"how many training rows {name!r} has is not known; give a number instead of {count}")
    return round(count * size)
