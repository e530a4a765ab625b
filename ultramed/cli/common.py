"""What all commands share: the console, options, and folders that appear whole or not at all."""

import os
import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ultramed.core.config import PROCESSES, is_path
from ultramed.core.errors import ConfigError
from ultramed.core.store import Artifact

console = Console(emoji=False, highlight=False)  # tiny:llama: is no animal


def _whole_path(profile: str) -> str:
    """Notebooks and cluster tasks run in other folders."""
    return str(Path(profile).resolve()) if is_path(profile) else profile


ProfileOption = Annotated[
    str, typer.Option("--profile", "-p", callback=_whole_path, help="A file of params/, without .yaml, or a path to one.")
]
SetOption = Annotated[list[str], typer.Option("--set", "-s", help="Override a value: --set train.epochs=2 (repeatable).")]


MapOption = Annotated[
    list[str],
    typer.Option("--map", "-m", help="What is in which column, where its name does not tell: --map gold=label, --map base=1."),
]


PairMapOption = Annotated[
    list[str],
    typer.Option(
        "--map", help="What is in which column, where its name does not tell: --map chosen=winner, --map rejected=loser."
    ),
]


EngineOption = Annotated[
    str, typer.Option(help="Who writes the replies: transformers, openvino, or vllm (ULTRAMED_VLLM_ENV; replies only).")
]


def _processes(count: int) -> int:
    if count:
        os.environ[PROCESSES] = str(count)
    return count


ProcessesOption = Annotated[
    int,
    typer.Option(
        min=0,
        callback=_processes,
        show_default="one a GPU, else one",
        help="Processes that train or ask together (accelerate launch); all weights trained: sharded over them by FSDP2.",
    ),
]


def new(out: Path) -> Path:
    """`out`, if nothing is there: asked before the work, not after it."""
    if out.exists():
        raise ConfigError(f"{out} exists; give a new folder")
    return out


def publish(art: Artifact, out: Path) -> None:
    """The artifact's files in a new folder `out`, which appears whole or not at all."""
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(art.path, part)
    part.rename(out)
