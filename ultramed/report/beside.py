"""A published table beside ours: entries of the scorecard for every cell that was run, and a table to read."""

import re

import pandas as pd

from ultramed.papers import published


def cell_entries(
    table: str,
    results: pd.DataFrame,
    names: dict[str, str],
    columns: dict[str, str] | None = None,
    *,
    same_scale: bool,
    protocol: str,
    tolerance: float = 0.0,
    size: str = "",
) -> list[dict]:
    """One entry for each published cell that `results` fills.

    results: a row an arm and subset: the arm's key in the first column, `subset`, `accuracy` (a fraction) or `value` (in the
    table's own unit), and where they are known `low`, `high` and `n`. names: arm's key -> name of the published row (its keys
    joined by ' / '). columns: subset -> published column, where they differ in name. At the paper's own scale a cell is
    reproduced if the interval holds the published value; without an interval, if ours is within `tolerance` of it (relative);
    where the row names a model of another `size` ('8B', '70B'), the scale is not the paper's. Minutes are another machine's and
    never compared. Raises KeyError for a row that the table does not have.
    """
    spec, index, entries = published.TABLES[table], results.columns[0], []
    cells = {(cell["row"], cell["column"]): cell for cell in published.cells(table)}
    if unknown := set(names.values()) - {row for row, _ in cells}:
        raise KeyError(f"{table} has no rows {sorted(unknown)}")
    share = "accuracy" in results
    unit = 100 / spec.scale if share and spec.scale else 1.0
    for row in results.to_dict("records"):
        column = (columns or {}).get(row["subset"], row["subset"])
        cell = cells.get((names.get(row[index]), column))
        value = row["accuracy" if share else "value"]
        if cell is None or pd.isna(value):
            continue
        ours, low, high = (None if pd.isna(x) else round(float(unit * x), 4) for x in (value, row.get("low"), row.get("high")))
        interval = None if low is None else (low, high)
        alike = (
            same_scale
            and not column.startswith("minutes")
            and not (size and ({"8B", "70B"} - {size}) & set(re.findall(r"\d+B", cell["row"])))
        )
        entries.append(
            {
                "id": cell["id"],
                "kind": "cell",
                "source": spec.source,
                "statement": cell["statement"],
                "published": cell["published"],
                "ours": ours,
                "n": None if pd.isna(row.get("n")) else int(row["n"]),
                "interval": interval,
                "protocol": protocol,
                "verdict": _verdict(cell["published"], ours, interval, tolerance) if alike else "differs in scale",
            }
        )
    return entries


def _verdict(value, ours: float, interval: tuple[float, float] | None, tolerance: float) -> str:
    """Of a cell at the paper's own scale."""
    if isinstance(value, str):
        return "differs in scale"  # text such as 'OOM' or '92 (test only)' is no number to hold ours against
    inside = interval[0] <= value <= interval[1] if interval else abs(ours - value) <= tolerance * abs(value)
    return "reproduced" if inside else "not reproduced"


def beside(entries: list[dict], labels: dict[str, str]) -> pd.DataFrame:
    """The entries as a table: a published row a line, paper and ours for every column. labels: published row -> ours."""
    rows: dict[str, dict] = {}
    for entry in entries:
        _, row, column = entry["id"].split(":", 2)
        line = rows.setdefault(row, {"paper's row": row, "ours": labels.get(row, row)})
        interval = f" [{entry['interval'][0]:.3g}, {entry['interval'][1]:.3g}]" if entry["interval"] else ""
        line |= {f"paper: {column}": entry["published"], f"ours: {column}": f"{entry['ours']:.4g}{interval}"}
        line["n"] = max(line.get("n") or 0, entry["n"] or 0) or None
    frame = pd.DataFrame(rows.values())
    return frame[[c for c in frame if c != "n"] + ["n"]].dropna(axis="columns", how="all") if len(frame) else frame
