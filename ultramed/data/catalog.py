"""The named data sets of both papers and their evaluations (catalog.yaml): where they are, how many rows, whose."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files

import yaml

from ultramed.core.config import known
from ultramed.data import adapters

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """`files`: side -> (file under ULTRAMED_DATA/<folder or name>, rows). `hub`: side -> (hub id, config, split, rows
    or None where their number was not at hand); for the rest see catalog.yaml. `was`: an older name, which still works and says
    so."""

    name: str
    kind: str  # questions, instructions, prompts or pairs
    licence: str
    cite: str
    adapter: str  # of data/adapters.py
    files: dict[str, tuple[str, int | None]] = field(default_factory=dict)
    hub: dict[str, tuple[str, str | None, str, int | None]] = field(default_factory=dict)
    hub_adapter: str = ""
    held: dict[str, tuple[str, int]] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)
    keep: dict[str, list[str]] = field(default_factory=dict)
    revision: str | None = None
    note: str = ""
    folder: str = ""
    was: str = ""

    def where(self) -> str:
        """Where to get it, in a line."""
        hub = next((entry[0] for entry in self.hub.values()), None)
        files = ", ".join(file for file, _ in self.files.values())
        own = f"$ULTRAMED_DATA/{self.folder or self.name}/{{{files}}}" if files else ""
        return f"{self.name}: " + " or ".join(part for part in (f"hub {hub}" if hub else "", own) if part)

    @property
    def sides(self) -> list[str]:
        """The sides that files or the hub give."""
        return list(dict.fromkeys([*self.files, *self.hub, *self.held]))

    def adapt(self, from_hub: bool) -> Callable[[dict, int], dict]:
        """The function that makes a canonical row of a raw one, of the files or of the hub."""
        return getattr(adapters, (self.hub_adapter if from_hub else "") or self.adapter)


LISTED = yaml.safe_load(files("ultramed.data").joinpath("catalog.yaml").read_text())
SOURCES = {name: Source(name=name, **entry) for name, entry in LISTED.items()}
ALIASES = {spec.was: name for name, spec in SOURCES.items() if spec.was}


def get(name: str) -> Source:
    """The data set of that name, or of that older name. Raises ConfigError, with the nearest name, for an unknown one."""
    if name in ALIASES:
        log.warning("data set %r is now called %r", name, ALIASES[name])
        name = ALIASES[name]
    known(name, SOURCES, "the data sets (ultramed data list)")
    return SOURCES[name]
