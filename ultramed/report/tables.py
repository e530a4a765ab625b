"""Tables as CSV, Markdown and LaTeX, each with a note of where its numbers come from."""

import pandas as pd

from ultramed.core.store import Artifact, environment, write_json, write_text
from ultramed.report.scorecard import folder


def provenance(profile: str, name: str, caption: str, artifacts: list[Artifact], kind: str) -> dict:
    """What a table or figure rests on: the artifacts' keys."""
    return {
        "name": name,
        "kind": kind,
        "caption": caption,
        "profile": profile,
        "git": environment()["git"],
        "versions": environment()["versions"],
        "artifacts": [f"{a.stage}/{a.key}" for a in artifacts],
    }


def save_table(frame: pd.DataFrame, name: str, *, profile: str, caption: str, artifacts: list[Artifact] = ()) -> pd.DataFrame:
    """Write `figures/<profile>/tables/<name>.{csv,md,tex,json}` and return the frame, to be shown."""
    base = folder(profile) / "tables"
    write_text(base / f"{name}.csv", frame.to_csv(index=False))
    write_text(base / f"{name}.md", f"{caption}\n\n{markdown(frame)}\n")
    write_text(base / f"{name}.tex", latex(frame, caption))
    write_json(base / f"{name}.json", provenance(profile, name, caption, list(artifacts), "table"))
    return frame


def markdown(frame: pd.DataFrame) -> str:
    """A GitHub table; numbers to the right."""
    right = [pd.api.types.is_numeric_dtype(frame[c]) for c in frame]

    def line(values) -> str:
        return "| " + " | ".join(_plain(v).replace("|", "\\|") for v in values) + " |"

    rule = "|" + "|".join("---:" if r else "---" for r in right) + "|"
    return "\n".join([line(frame.columns), rule, *(line(row) for row in frame.itertuples(index=False))])


def latex(frame: pd.DataFrame, caption: str) -> str:
    """A booktabs table; numbers to the right."""
    special = str.maketrans({c: f"\\{c}" for c in "&%$#_{}"} | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}"})
    right = "".join("r" if pd.api.types.is_numeric_dtype(frame[c]) else "l" for c in frame)
    text = frame.map(lambda v: _plain(v).translate(special)).rename(columns=lambda c: str(c).translate(special))
    return text.style.hide(axis="index").to_latex(hrules=True, column_format=right, caption=caption.translate(special))


def _plain(value) -> str:
    if value is None or (isinstance(value, float) and value != value) or value is pd.NA:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
