"""The report: one HTML page that carries every table, figure and the scorecard, and links to the executed notebooks."""

import base64
import json
import logging
from importlib.resources import files
from pathlib import Path

import jinja2
import pandas as pd

from ultramed.core.errors import ConfigError
from ultramed.core.store import environment, write_text
from ultramed.report.scorecard import build, folder


def _records(profile: str) -> list[dict]:
    """Tables and figures in the order of their names, which begin with their notebook's number."""
    found = []
    for path in sorted([*folder(profile).glob("*.json"), *(folder(profile) / "tables").glob("*.json")], key=lambda p: p.stem):
        metadata = json.loads(path.read_text())
        if isinstance(metadata, dict) and metadata.get("kind") == "figure":
            picture = base64.b64encode(path.with_suffix(".png").read_bytes()).decode()
            found.append({**metadata, "src": f"data:image/png;base64,{picture}"})
        elif isinstance(metadata, dict) and metadata.get("kind") == "table":
            frame = pd.read_csv(path.with_suffix(".csv"), keep_default_na=False)
            found.append({**metadata, "columns": list(frame.columns), "rows": frame.values.tolist()})
    return found


def export_notebooks(profile: str) -> list[dict]:
    """HTML of every executed notebook, next to it."""
    from nbconvert import HTMLExporter

    exporter, out = HTMLExporter(exclude_input_prompt=True, exclude_output_prompt=True), []
    exporter.log.setLevel(logging.ERROR)
    for path in sorted((folder(profile) / "notebooks").glob("[0-9]*.ipynb")):
        page = path.with_suffix(".html")
        if not page.exists() or page.stat().st_mtime < path.stat().st_mtime:
            write_text(page, exporter.from_filename(str(path))[0])
        stamp = path.with_suffix(".json")
        metadata = json.loads(stamp.read_text()) if stamp.exists() else {}
        out.append(
            {"name": path.stem, "href": f"notebooks/{page.name}", "seconds": metadata.get("seconds"), "failed": not metadata}
        )
    return out


def write_report(profile: str) -> Path:
    """Rebuild `scorecard.json` and write `figures/<profile>/index.html`. Needs at least one notebook's results."""
    if not folder(profile).is_dir():
        raise ConfigError(f"nothing has run at profile {profile!r} yet: ultramed run --profile {profile}")
    entries = [e.model_dump() for e in build(profile)]
    template = jinja2.Environment(autoescape=True).from_string(files("ultramed.report").joinpath("page.html").read_text())
    verdicts = pd.Series([e["verdict"] for e in entries]).value_counts().to_dict()
    page = template.render(
        profile=profile,
        claims=[e for e in entries if e["kind"] == "claim"],
        cells=[e for e in entries if e["kind"] == "cell"],
        diagnostics=[e for e in entries if e["kind"] == "diagnostic"],
        records=_records(profile),
        notebooks=export_notebooks(profile),
        verdicts=verdicts,
        env=environment(),
    )
    target = folder(profile) / "index.html"
    write_text(target, page)
    return target
