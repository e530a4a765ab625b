"""What the papers printed: every published cell, with its source (tables/*.csv; tables.yaml says how they are read)."""

from importlib.resources import files

import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict

FOLDER = files("ultramed.papers")


class PublishedTable(BaseModel):
    """How one CSV is read; see tables.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    source: str
    keys: list[str]
    notebook: str
    scale: float | None = None
    ours: dict[str, list[str]] = {}

    def label(self, row: pd.Series) -> str:
        """Name of a row: 'MedAlpaca 7b / 7b / full'."""
        return " / ".join(str(row[key]) for key in self.keys if pd.notna(row[key]))

    def can_be_ours(self, row: pd.Series) -> bool:
        return not self.ours or any(row[column] in values for column, values in self.ours.items())


TABLES = {name: PublishedTable(**entry) for name, entry in yaml.safe_load(FOLDER.joinpath("tables.yaml").read_text()).items()}


def table(name: str) -> pd.DataFrame:
    """One published table as printed. Raises KeyError for an unknown name."""
    if name not in TABLES:
        raise KeyError(f"no published table {name!r}; there are {', '.join(TABLES)}")
    return pd.read_csv(FOLDER / "tables" / f"{name}.csv")


def _number(value):
    """A plain number, also where a column is text because of one cell ('OOM'); other text stays text."""
    value = value.item() if hasattr(value, "item") else value
    try:
        number = float(value)
    except ValueError:
        return value
    return int(number) if number.is_integer() and "." not in str(value) else number


def cells(name: str = "") -> list[dict]:
    """Every published number (of one table): id, source, statement, published value, row, column, notebook, and whether
    it is `context`, a number about other people's models.

    A value that is text in the source ('OOM', '92 (test only)') is kept as text; an empty cell is no cell.
    """
    out = []
    for key, spec in TABLES.items() if not name else [(name, TABLES[name])]:
        frame = table(key)
        for _, row in frame.iterrows():
            label, ours = spec.label(row), spec.can_be_ours(row)
            for column in frame.columns.difference(spec.keys, sort=False):
                if pd.notna(row[column]):
                    value = _number(row[column])
                    out.append(
                        {
                            "id": f"{key}:{label}:{column}",
                            "source": spec.source,
                            "statement": f"{label}: {column}",
                            "published": value,
                            "row": label,
                            "column": column,
                            "notebook": spec.notebook,
                            "context": not ours,
                        }
                    )
    return out
