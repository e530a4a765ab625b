"""Command line of the data half: data sets, collections, decontamination, and annotation by a model behind a URL."""

import json
import os
import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ultramed.core import config, schema, store
from ultramed.core.errors import ConfigError

console = Console()
ProfileOption = Annotated[str, typer.Option("--profile", "-p", help="A file of params/, without .yaml, or a path to one.")]
SetOption = Annotated[list[str], typer.Option("--set", "-s", help="Override a value: --set train.epochs=2 (repeatable).")]


def _processes(count: int) -> int:
    if count:
        os.environ[config.PROCESSES] = str(count)
    return count


ProcessesOption = Annotated[
    int,
    typer.Option(
        min=0, callback=_processes, show_default="one a GPU, else one",
        help="Processes that train together (accelerate launch); all weights trained: sharded over them by FSDP2.",
    ),
]  # fmt: skip
data_app = typer.Typer(no_args_is_help=True, help="Data sets: what there is, what is at hand, collections, decontamination.")
annotate_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown",
    help="Score, judge and write data with a language model behind a URL.\n\nEvery answer is kept as it comes: after "
    "Ctrl-C, a crash or a spent budget the same command goes on where it stopped. The key is read from OPENAI_API_KEY.",
)  # fmt: skip


def new(out: Path) -> Path:
    """`out`, if nothing is there: asked before the work, not after it."""
    if out.exists():
        raise ConfigError(f"{out} exists; give a new folder")
    return out


def publish(art: store.Artifact, out: Path) -> None:
    """The artifact's files in a new folder `out`, which appears whole or not at all."""
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(art.path, part)
    part.rename(out)


@data_app.command("list")
def data_list() -> None:
    """Named data sets, their sizes, licences, and whether they are at hand."""
    from ultramed.data.catalog import SOURCES
    from ultramed.data.sources import local_files

    table = Table()
    for column in ("name", "kind", "sides", "at hand", "licence"):
        table.add_column(column)
    table.add_row("exam", "questions", "train 18000, dev 900, test 3000 (laptop)", "[green]bundled[/]", "see DATA_LICENSES.md")
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
        console.print(f"{name}: {art.metrics['counts']}  {art.stage}/{art.key}", highlight=False)


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
    from ultramed.data.sources import own

    setting = config.validate(schema.CheckConfig, config.overridden({}, overrides), "check")
    given = {"train": own(train, side="train"), "test": own(test)}
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


# ----------------------------------------------------------------------------------------------------------- annotation

RowsOption = Annotated[Path, typer.Option("--data", help="JSONL or Parquet of questions, instructions or prompts.")]
ServerOption = Annotated[str, typer.Option("--server", help="url#model, e.g. http://localhost:8000/v1#my-model.")]
OutOption = Annotated[Path, typer.Option("--out", "-o", callback=new, help="New folder for the result and requests.jsonl.")]
MoreOption = Annotated[
    list[str],
    typer.Option("--set", "-s", help="More of the configuration: --set server.max_requests=500 --set temperature=0.3."),
]


def _setting(model: type, server: str, overrides: list[str]):
    from ultramed.core.client import ServerConfig

    where = ServerConfig.of(server)
    data = {"server": {"url": where.url, "model": where.model}}
    return config.validate(model, config.overridden(data, overrides), "annotate")


def _told(art: store.Artifact, out: Path) -> None:
    publish(art, out)
    console.print_json(json.dumps(art.metrics))
    console.print(str(out), highlight=False, soft_wrap=True)


@annotate_app.command("score")
def annotate_score(data: RowsOption, server: ServerOption, out: OutOption, overrides: MoreOption = []) -> None:  # noqa: B006
    """Complexity of every instruction, 1 to 10: `scores.jsonl`."""
    from ultramed.annotate.judge import LLMConfig, complexity
    from ultramed.data.sources import own

    setting = _setting(LLMConfig, server, overrides)
    _told(complexity(setting, data=own(data, side="train")), out)


@annotate_app.command("feedback")
def annotate_feedback(
    data: Annotated[Path, typer.Option("--data", help="Rows with prompt and candidates (a list of texts); reference if known.")],
    server: ServerOption, out: OutOption, overrides: MoreOption = [],  # noqa: B006
) -> None:  # fmt: skip
    """Scores and ranks of every prompt's candidates, shown in a shuffled order: `feedback.jsonl`."""
    from ultramed.annotate.judge import LLMConfig, llm_feedback
    from ultramed.data.sources import own

    setting = _setting(LLMConfig, server, overrides)
    _told(llm_feedback(setting, candidates=own(data, "candidates")), out)


@annotate_app.command("compare")
def annotate_compare(
    pairs: Annotated[Path, typer.Option(help="JSONL or Parquet of pairs: prompt, chosen, rejected (texts or messages).")],
    server: ServerOption, out: OutOption, overrides: MoreOption = [],  # noqa: B006
) -> None:  # fmt: skip
    """Which of two replies is better, judged in both orders: `verdicts.jsonl`."""
    from ultramed.annotate.judge import LLMConfig, pairwise
    from ultramed.data.sources import own

    setting = _setting(LLMConfig, server, overrides)
    _told(pairwise(setting, pairs=own(pairs, "pairs", "pairs")), out)


@annotate_app.command("write")
def annotate_write(
    what: Annotated[str, typer.Argument(help="textbook: paragraphs to four-option questions. topic: topics to instructions. "
                                             "evolve: harder instructions or questions. solve: checked answers to questions.")],
    data: RowsOption, server: ServerOption, out: OutOption, overrides: MoreOption = [],  # noqa: B006
) -> None:  # fmt: skip
    """New training rows: `train.parquet`, and `rejected.jsonl` with what failed and why."""
    from ultramed.annotate.synthesize import STAGES, SynthesisConfig
    from ultramed.data.sources import own

    config.known(what, STAGES, "what can be written")
    setting = _setting(SynthesisConfig, server, overrides)
    _told(STAGES[what](setting, data=own(data, side="train")), out)
