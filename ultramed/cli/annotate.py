"""Command line of annotation: a language model behind a URL scores, judges and writes."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ultramed.cli.common import console, new, publish
from ultramed.core import config, store

annotate_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Score, judge and write data with a language model behind a URL.\n\nEvery answer is kept as it comes: after "
    "Ctrl-C, a crash or a spent budget the same command goes on where it stopped. The key is read from OPENAI_API_KEY.",
)

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
    console.print(str(out), soft_wrap=True)


@annotate_app.command("score")
def annotate_score(data: RowsOption, server: ServerOption, out: OutOption, overrides: MoreOption = []) -> None:  # noqa: B006
    """Complexity of every instruction, 1 to 10: `scores.jsonl`."""
    from ultramed.annotate.judge import LLMConfig, complexity
    from ultramed.data.sources import user_file

    setting = _setting(LLMConfig, server, overrides)
    _told(complexity(setting, data=user_file(data, side="train")), out)


@annotate_app.command("feedback")
def annotate_feedback(
    data: Annotated[
        Path, typer.Option("--data", help="Rows with prompt and candidates (a list of texts); reference if known.")
    ],
    server: ServerOption,
    out: OutOption,
    overrides: MoreOption = [],  # noqa: B006
) -> None:
    """Scores and ranks of every prompt's candidates, shown in a shuffled order: `feedback.jsonl`."""
    from ultramed.annotate.judge import LLMConfig, llm_feedback
    from ultramed.data.sources import user_file

    setting = _setting(LLMConfig, server, overrides)
    _told(llm_feedback(setting, candidates=user_file(data, "candidates")), out)


@annotate_app.command("compare")
def annotate_compare(
    pairs: Annotated[Path, typer.Option(help="JSONL or Parquet of pairs: prompt, chosen, rejected (texts or messages).")],
    server: ServerOption,
    out: OutOption,
    overrides: MoreOption = [],  # noqa: B006
) -> None:
    """Which of two replies is better, judged in both orders: `verdicts.jsonl`."""
    from ultramed.annotate.judge import LLMConfig, pairwise
    from ultramed.data.sources import user_file

    setting = _setting(LLMConfig, server, overrides)
    _told(pairwise(setting, pairs=user_file(pairs, "pairs", "pairs")), out)


@annotate_app.command("write")
def annotate_write(
    what: Annotated[
        str,
        typer.Argument(
            help="textbook: paragraphs to four-option questions. topic: topics to instructions. "
            "evolve: harder instructions or questions. solve: checked answers to questions."
        ),
    ],
    data: RowsOption,
    server: ServerOption,
    out: OutOption,
    overrides: MoreOption = [],  # noqa: B006
) -> None:
    """New training rows: `train.parquet`, and `rejected.jsonl` with what failed and why."""
    from ultramed.annotate.synthesize import STAGES, SynthesisConfig
    from ultramed.data.sources import user_file

    config.known(what, STAGES, "what can be written")
    setting = _setting(SynthesisConfig, server, overrides)
    _told(STAGES[what](setting, data=user_file(data, side="train")), out)
