"""Artifacts and rows made by hand, for tests of what comes after them."""

from ultramed.core.ledger import write_lines
from ultramed.core.store import stage
from ultramed.data import rows as canonical


@stage(version=1)
def given(out, config, *, rows, side="train"):
    """`rows` as `{side}.parquet`."""
    canonical.write_rows(out / f"{side}.parquet", rows)


@stage(version=1)
def lines(out, config, *, rows, name):
    """`rows` as the JSON lines `name`."""
    write_lines(out / name, rows)


def prompt_row(name, text, **meta):
    prompt = [{"role": "user", "content": text}]
    return {"id": name, "source": "t", "prompt": prompt, "reference": "gold", "meta": {"x": 1, **meta}}
