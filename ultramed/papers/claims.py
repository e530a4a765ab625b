"""The claims of both papers (claims.csv), which stand before a run, and the rule that decides each.

kind      claim about A - B                 reproduced                      contradicted
beats     above 0                           interval above 0, p below 0.05  interval below 0, p below 0.05
level     within the margin of 0            interval within the margin      interval wholly outside it
not_worse above minus the margin            interval above minus the margin interval below it

Anything else is inconclusive. p, corrected over all tested claims of a paper that A beats B (report/scorecard.py), belongs to
`beats` only; for the other kinds the interval decides, and their p is shown beside it, not corrected.
"""

from functools import cache
from importlib.resources import files
from typing import Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, model_validator

Kind = Literal["beats", "level", "not_worse"]
Decision = Literal["reproduced", "contradicted", "inconclusive"]
ALPHA = 0.05


class Claim(BaseModel):
    """One line of claims.csv. `a` and `b` are keys of arms; `margin` and the published values are in `unit`s.

    `needs` says what it takes to test a claim that a profile may leave out, and is the reason where it was not run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    id: str = Field(pattern=r"^(medalpaca|ultramedical):[a-z0-9-]+$")
    paper: Literal["MedAlpaca", "UltraMedical"]
    place: str = Field(min_length=1)
    notebook: str = Field(pattern=r"^\d\d_\w+$")
    statement: str = Field(min_length=10)
    a: str = Field(min_length=1)
    b: str = Field(min_length=1)
    kind: Kind
    margin: float = Field(ge=0)
    unit: Literal["points", "GB", "minutes"] = "points"
    published_a: float | None = None
    published_b: float | None = None
    published_note: str = Field(min_length=1)
    needs: str = ""

    @model_validator(mode="after")
    def _makes_sense(self):
        if (self.kind == "beats") != (self.margin == 0):
            raise ValueError(f"{self.id}: 'level' and 'not_worse' have a margin, 'beats' has none; got {self.margin}")
        if (self.published_a is None) != (self.published_b is None):
            raise ValueError(f"{self.id}: give both published values, or neither")
        if self.id.partition(":")[0] != self.paper.lower():
            raise ValueError(f"{self.id}: the id begins with the paper's name, which is {self.paper}")
        return self

    @property
    def published_difference(self) -> float | None:
        return None if self.published_a is None else round(self.published_a - self.published_b, 2)

    @property
    def published(self) -> str:
        """As a table shows it: '33.57 against 20.4 (7B, mean of Steps 1 to 3)'."""
        if self.published_a is None:
            return self.published_note
        return f"{self.published_a:g} against {self.published_b:g} ({self.published_note})"

    @property
    def sentence(self) -> str:
        """The statement, with its margin where it has one."""
        how = {"beats": "", "level": f": within {self.margin:g} {self.unit}"}
        return self.statement + how.get(self.kind, f": at most {self.margin:g} {self.unit} worse")

    def decide(self, low: float, high: float, p: float) -> Decision:
        """The verdict from a 95% interval of A - B, in the claim's unit, and a corrected p."""
        if self.kind == "beats":
            reproduced, contradicted = low > 0 and p < ALPHA, high < 0 and p < ALPHA
        elif self.kind == "level":
            reproduced, contradicted = -self.margin <= low and high <= self.margin, low > self.margin or high < -self.margin
        else:
            reproduced, contradicted = low >= -self.margin, high < -self.margin
        return "reproduced" if reproduced else "contradicted" if contradicted else "inconclusive"


@cache
def claims() -> tuple[Claim, ...]:
    """All claims, checked. Raises pydantic's ValidationError for a line that makes no sense, ValueError for an id that
    stands twice."""
    rows = pd.read_csv(files("ultramed.papers") / "claims.csv", dtype=str, keep_default_na=False).to_dict("records")
    made = tuple(Claim(**{name: value for name, value in row.items() if value}) for row in rows)
    ids = [claim.id for claim in made]
    if twice := sorted({name for name in ids if ids.count(name) > 1}):
        raise ValueError(f"claims.csv: ids occur twice: {twice}")
    return made


def claims_of(notebook: str) -> tuple[Claim, ...]:
    """The claims that a notebook tests."""
    return tuple(claim for claim in claims() if claim.notebook == notebook)
