"""The scorecard: every claim of the papers and every published cell, with ours beside it and a verdict."""

import json
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import model_validator

from ultramed.core.config import home
from ultramed.core.schema import Strict
from ultramed.core.store import environment, write_json
from ultramed.evaluate import stats
from ultramed.evaluate.arms import Comparison
from ultramed.papers import published
from ultramed.papers.claims import Claim, claims

Verdict = Literal[
    "reproduced",
    "contradicted",
    "inconclusive",  # of claims: neither the one nor the other
    "not reproduced",  # of cells at the paper's own scale
    "differs in scale",  # of cells: another model or other questions, so that the numbers cannot be compared
    "context",  # of cells about other people's models
    "not run",
    "no verdict",  # of diagnostics, which the papers do not claim
]


class Entry(Strict):
    """One line of the scorecard. `ours`, `interval`, `difference`, `se` and `detectable` are in the unit of `published`;
    a claim's are of the difference A - B.

    p: raw, of the claim's own test; p_holm: corrected over the paper's tested claims that A beats B. detectable: the smallest
    true difference that this run would have found in four of five cases. holds_published: whether the interval holds the
    published difference.
    """

    id: str
    kind: Literal["claim", "cell", "diagnostic"]
    source: str
    statement: str
    notebook: str
    test: str | None = None
    published: Any = None
    published_difference: float | None = None
    ours: Any = None
    difference: float | None = None
    n: int | None = None
    interval: tuple[float, float] | None = None
    se: float | None = None
    p: float | None = None
    p_holm: float | None = None
    detectable: float | None = None
    holds_published: bool | None = None
    verdict: Verdict
    reason: str | None = None
    protocol: str | None = None
    command: str | None = None

    @model_validator(mode="after")
    def _complete(self):
        if self.verdict == "not run" and not self.reason:
            raise ValueError(f"{self.id}: 'not run' needs a reason")
        if self.verdict in ("reproduced", "not reproduced", "contradicted", "inconclusive") and self.ours is None:
            raise ValueError(f"{self.id}: a verdict on a number needs the number")
        return self


def folder(profile: str) -> Path:
    """Where a profile's tables, figures and scorecard go."""
    return home() / "figures" / profile


def record(profile: str, notebook: str, entries: list[dict], command: str = "") -> list[Entry]:
    """Check entries of a notebook and add them to `figures/<profile>/entries/<notebook>.json`; newer ones replace older
    ones of the same id. Raises ValueError for an id that stands twice among them."""
    command = command or f"ultramed run {notebook[:2]} --profile {profile}"
    checked = [Entry(**{"notebook": notebook, "command": command, **e}) for e in entries]
    ids = [e.id for e in checked]
    if len(set(ids)) < len(ids):
        raise ValueError(f"{notebook}: scorecard ids occur twice: {sorted({i for i in ids if ids.count(i) > 1})}")
    path = folder(profile) / "entries" / f"{notebook}.json"
    before = json.loads(path.read_text())["entries"] if path.exists() else []
    kept = [entry for entry in before if entry["id"] not in ids]
    payload = {"entries": [*kept, *(e.model_dump() for e in checked)], "git": environment()["git"]}
    write_json(path, payload)
    return checked


def forget(profile: str, notebook: str) -> None:
    """Drop what an earlier run of the notebook recorded: a claim that it no longer tests must not stay."""
    (folder(profile) / "entries" / f"{notebook}.json").unlink(missing_ok=True)


def claim_p(claim: Claim, pair: Comparison) -> float:
    """Raw p of the claim's own test: of no difference (`beats`), of non-equivalence (`level`), of inferiority."""
    if claim.kind == "beats":
        return pair.p
    margin = claim.margin / 100
    return (
        stats.equivalence(pair.difference, pair.errors, margin)
        if claim.kind == "level"
        else stats.not_below(pair.difference, pair.errors, -margin)
    )


def claim_entry(claim: Claim, pair: Comparison, protocol: str) -> dict:
    """Entry of a tested claim. Its verdict is of the uncorrected p until `build` corrects it over the paper."""
    measured, p, published_difference = _measured(pair), claim_p(claim, pair), claim.published_difference
    low, high = measured["interval"]
    return {
        **_claim_facts(claim),
        **measured,
        "p": p,
        "holds_published": None if published_difference is None else low <= published_difference <= high,
        "verdict": claim.decide(low, high, p),
        "protocol": protocol,
    }


def _measured(pair: Comparison) -> dict:
    """What every entry of a comparison says, in points."""
    return {
        "ours": f"{100 * pair.a:.1f} against {100 * pair.b:.1f}",
        "difference": 100 * pair.difference,
        "n": pair.n,
        "interval": (100 * pair.low, 100 * pair.high),
        "se": 100 * pair.se,
        "detectable": 100 * stats.detectable(pair.errors),
    }


def _claim_facts(claim: Claim) -> dict:
    source = {"MedAlpaca": "MedAlpaca (arXiv 2304.08247)", "UltraMedical": "UltraMedical (arXiv 2406.03949)"}[claim.paper]
    return {
        "id": claim.id,
        "kind": "claim",
        "source": f"{source}, {claim.place}",
        "statement": claim.sentence,
        "notebook": claim.notebook,
        "test": claim.kind,
        "published": claim.published,
        "published_difference": claim.published_difference,
    }


def diagnostic_entry(name: str, statement: str, pair: Comparison, protocol: str) -> dict:
    """Entry of a comparison that the papers do not make: shown with its interval, without a verdict."""
    return {
        "id": f"diagnostic:{name}",
        "kind": "diagnostic",
        "source": "this repository",
        "statement": statement,
        **_measured(pair),
        "p": pair.p,
        "verdict": "no verdict",
        "protocol": protocol,
    }


def shown(entries: list[Entry]) -> pd.DataFrame:
    """Claims or diagnostics as a table: what each says, ours, the difference with its interval, and what could be seen."""
    rows = [
        {
            "statement": e.statement,
            "published": e.published,
            "ours, A against B": e.ours,
            "A - B, 95% interval": f"{e.difference:+.1f} [{e.interval[0]:.1f}, {e.interval[1]:.1f}]",
            "n": e.n,
            "standard error": f"{e.se:.1f}",
            "detectable": f"{e.detectable:.1f}",
            "p": f"{e.p:.2g}",
            "corrected p": None if e.p_holm is None else f"{e.p_holm:.2g}",
            "holds the published": {True: "yes", False: "no", None: None}[e.holds_published],
            "verdict": e.verdict,
        }
        for e in entries
    ]
    frame = pd.DataFrame(rows)
    return frame.drop(columns=[c for c in frame if frame[c].isna().all() or (frame[c] == "no verdict").all()]).fillna("")


def build(profile: str) -> list[Entry]:
    """All entries: what the notebooks recorded, with claims corrected over their paper; then the claims and the published
    cells that none of them speaks of. Writes `scorecard.json`."""
    entries: dict[str, Entry] = {}
    for path in sorted((folder(profile) / "entries").glob("*.json")):
        for raw in json.loads(path.read_text())["entries"]:
            entries[raw["id"]] = Entry(**raw)
    _correct(entries)
    for claim in claims():
        if claim.id not in entries:
            reason = f"needs {claim.needs}" if claim.needs else f"profile {profile} has no run of it"
            entries[claim.id] = Entry(**_claim_facts(claim), verdict="not run", reason=reason)
    for cell in published.cells():
        if cell["id"] not in entries:
            facts = {key: cell[key] for key in ("id", "source", "statement", "published", "notebook")}
            verdict = "context" if cell["context"] else "not run"
            reason = None if cell["context"] else f"profile {profile} has no run of this cell"
            entries[cell["id"]] = Entry(**facts, kind="cell", verdict=verdict, reason=reason)
    write_json(folder(profile) / "scorecard.json", [e.model_dump() for e in entries.values()])
    return list(entries.values())


def _correct(entries: dict[str, Entry]) -> None:
    """Holm's correction over the tested claims of each paper that A beats B, over all notebooks, and the verdicts that follow.
    The other kinds are decided by their interval: their p may not make that of a `beats` larger."""
    for paper in ("MedAlpaca", "UltraMedical"):
        tested = [claim for claim in claims() if (claim.paper, claim.kind) == (paper, "beats") and claim.id in entries]
        corrected = stats.holm([entries[claim.id].p for claim in tested])
        for claim, p in zip(tested, corrected, strict=True):
            entry = entries[claim.id]
            verdict = claim.decide(*entry.interval, p)
            entries[claim.id] = entry.model_copy(update={"p_holm": p, "verdict": verdict})
