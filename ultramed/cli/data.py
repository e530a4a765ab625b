"""Command line of data: data sets, collections, decontamination."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ultramed.cli.common import ProfileOption, SetOption, console, new, publish
from ultramed.core import config, schema

data_app = typer.Typer(no_args_is_help=True, help="Data sets: what there is, what is at hand, collections, decontamination.")


@data_app.command("list")
def data_list() -> None:
    """Named data sets, their sizes, licences, and whether they are at hand."""
    from ultramed.data.catalog import SOURCES
    from ultramed.data.sources import local_files

    table = Table()
    for column in ("name", "kind", "sides", "at hand", "licence"):
        table.add_column(column)
    made = config.load_profile("laptop").exam
    counts = {"train": made.train_per_step, "dev": made.dev_per_step, "test": made.test_per_step}
    sides = ", ".join(f"{side} {3 * count}" for side, count in counts.items())
    table.add_row("exam", "questions", f"{sides} (laptop)", "[green]bundled[/]", "docs/DATA_LICENSES.md")
    for name, spec in SOURCES.items():
        local = local_files(name)
        sides = {s: n for s, (_, n) in spec.files.items()} or {s: h[-1] for s, h in spec.hub.items()}
        where = "[green]local[/]" if local else "hub" if spec.hub else "[red]no[/]"
        table.add_row(name, spec.kind, ", ".join(f"{s} {n}" for s, n in sides.items()), where, spec.licence)
    console.print(table)


@data_app.command("read")
def data_read(
    names: Annotated[list[str], typer.Argument(help="Names of `ultramed data list`, or 'exam'.")],
    profile: ProfileOption = "laptop",
) -> None:
    """Read data sets into canonical rows in the store and print their counts."""
    from ultramed.data.sources import dataset

    resolved = config.load_profile(profile)
    for name in names:
        art = dataset(resolved, name)
        console.print(f"{name}: {art.metrics['counts']}  {art.stage}/{art.key}")


@data_app.command("build")
def data_build(
    out: Annotated[Path, typer.Option("--out", "-o", callback=new, help="New folder for the collection.")],
    profile: ProfileOption = "laptop",
    overrides: SetOption = [],  # noqa: B006
    push: Annotated[str, typer.Option("--push", help="Hub id to publish it as; nothing is sent without it.")] = "",
) -> None:
    """Build the profile's collection of the sources at hand: filtered, checked against test sets, with its card."""
    from ultramed.data.collection import collect

    found = collect(config.load_profile(profile, overrides))
    publish(found.made, out)
    console.print(f"{found.made.metrics['rows']} rows in {out}; not at hand: {', '.join(found.missing) or 'nothing'}")
    if push:
        from huggingface_hub import HfApi

        HfApi().create_repo(push, repo_type="dataset", private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=push, folder_path=out, repo_type="dataset")


@data_app.command("decontaminate")
def data_decontaminate(
    train: Annotated[Path, typer.Argument(help="JSONL or Parquet of questions, instructions or prompts.")],
    test: Annotated[Path, typer.Argument(help="The test set: the same kinds of rows.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", callback=new, help="New folder: hits.parquet, report.json, clean.parquet.")
    ],
    overrides: Annotated[
        list[str], typer.Option("--set", "-s", help="Of the check: --set ngram=13 --set how='[exact,ngram]'.")
    ] = [],  # noqa: B006
) -> None:
    """Which training rows hold test questions, exactly, nearly or in other words; and the rows that do not."""
    import pandas as pd

    from ultramed.data import rows as canonical
    from ultramed.data.collection import contamination, read_report
    from ultramed.data.sources import user_file

    setting = config.validate(schema.CheckConfig, config.overridden({}, overrides), "check")
    given = {"train": user_file(train, side="train"), "test": user_file(test)}
    found = contamination(setting, sources={"train": "train"}, tests=["test"], **given)
    publish(found, out)
    hit = set(pd.read_parquet(found / "hits.parquet").id)
    clean = [row for row in canonical.read_rows(given["train"] / "train.parquet") if row["id"] not in hit]
    if clean:
        canonical.write_rows(out / "clean.parquet", clean)
    table = Table()
    for column in ("how", "rows", "questions", "share of rows"):
        table.add_column(column)
    for row in read_report(found).itertuples():
        table.add_row(row.how, str(row.rows), str(row.questions), f"{100 * row.share:.2f} %")
    console.print(table)
    console.print(f"{len(hit)} of {len(hit) + len(clean)} rows hit; the others are in {out / 'clean.parquet'}", soft_wrap=True)
