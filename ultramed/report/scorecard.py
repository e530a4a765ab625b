"""The scorecard: every claim and every published cell, with ours beside it and a verdict."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from ultramed.core.config import home
from ultramed.core.schema import Strict
from ultramed.core.store import environment, write_json
from ultramed.papers import published

Verdict = Literal["reproduced", "not reproduced", "differs in scale", "not run"]


class Entry(Strict):
    """One line of the scorecard. `ours` and `interval` are in the unit of `published`."""

    id: str
    kind: Literal["claim", "cell"]
    source: str
    statement: str
    published: Any = None
    ours: Any = None
    n: int | None = None
    interval: tuple[float, float] | None = None
    p: float | None = None
    verdict: Verdict
    reason: str | None = None
    protocol: str | None = None
    command: str | None = None
    notebook: str

    @model_validator(mode="after")
    def _complete(self):
        if self.verdict == "not run" and not self.reason:
            raise ValueError(f"{self.id}: 'not run' needs a reason")
        if self.verdict in ("reproduced", "not reproduced") and self.ours is None:
            raise ValueError(f"{self.id}: a verdict on a number needs the number")
        return self


def folder(profile: str) -> Path:
    """Where a profile's tables, figures and scorecard go."""
    return home() / "figures" / profile


def record(profile: str, notebook: str, entries: list[dict]) -> list[Entry]:
    """Check a notebook's entries and write them to `figures/<profile>/entries/<notebook>.json`."""
    command = f"ultramed run {notebook[:2]} --profile {profile}"
    checked = [Entry(**{"notebook": notebook, "command": command, **e}) for e in entries]
    ids = [e.id for e in checked]
    if len(set(ids)) < len(ids):
        raise ValueError(f"{notebook}: scorecard ids occur twice: {sorted({i for i in ids if ids.count(i) > 1})}")
    payload = {"entries": [e.model_dump() for e in checked], "git": environment()["git"]}
    write_json(folder(profile) / "entries" / f"{notebook}.json", payload)
    return checked


def claim_verdict(difference, p: float, alpha: float = 0.05) -> Verdict:
    """'reproduced' if the difference points the claimed way (positive) and its paired test says so."""
    return "reproduced" if difference > 0 and p < alpha else "not reproduced"


def paired_claim(name: str, statement: str, pair, *, source: str, protocol: str, published=None, verdict=None) -> dict:
    """Entry of a claim 'A beats B' from a paired comparison: `pair` has a, b, difference, low, high, n and p (fractions).

    The interval is that of the difference, in points. `verdict` overrides `claim_verdict`, for claims of equality.
    """
    return {
        "id": name,
        "kind": "claim",
        "source": source,
        "statement": statement,
        "published": published,
        "ours": f"{100 * pair['a']:.1f}% against {100 * pair['b']:.1f}%, difference {100 * pair['difference']:+.1f} points",
        "n": int(pair["n"]),
        "interval": (100 * pair["low"], 100 * pair["high"]),
        "p": float(pair["p"]),
        "protocol": protocol,
        "verdict": verdict or claim_verdict(pair["difference"], pair["p"]),
    }


def build(profile: str) -> list[Entry]:
    """All entries: what the notebooks recorded, then every published cell that none of them speaks of, as not run."""
    entries: dict[str, Entry] = {}
    for path in sorted((folder(profile) / "entries").glob("*.json")):
        for raw in json.loads(path.read_text())["entries"]:
            entries[raw["id"]] = Entry(**raw)
    for cell in published.cells():
        if cell["id"] not in entries:
            here = (home() / "notebooks" / f"{cell['notebook']}.ipynb").exists()
            missing = f"profile {profile} has no run of this cell" if here else f"{cell['notebook']} is not there yet"
            entries[cell["id"]] = Entry(**cell, verdict="not run", reason=missing)
    write_json(folder(profile) / "scorecard.json", [e.model_dump() for e in entries.values()])
    return list(entries.values())
