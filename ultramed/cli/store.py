"""Command line of the store: everything that was built, trained and answered."""

import json
from typing import Annotated

import typer
from rich.table import Table

from ultramed.cli.common import console
from ultramed.core import store

store_app = typer.Typer(no_args_is_help=True, help="Look after the artifacts: everything that was built, trained and answered.")


@store_app.command("ls")
def store_ls(stage: Annotated[str, typer.Argument(help="Only this stage.")] = "") -> None:
    """Artifacts: stage, key, size, time it took, what it was made from."""
    table = Table()
    for column in ("artifact", "MB", "seconds", "made from"):
        table.add_column(column)
    for art in store.artifacts():
        if stage in ("", art.stage):
            m = art.manifest
            inputs = ", ".join(f"{k} {v['key'][:6]}" for k, v in m["inputs"].items())
            table.add_row(f"{art.stage}/{art.key}", f"{store.size(art.path) / 1e6:.1f}", f"{m['wall_seconds']:.0f}", inputs)
    console.print(table)


@store_app.command("show")
def store_show(key: Annotated[str, typer.Argument(help="Key or its beginning, or stage/key.")]) -> None:
    """Manifest and lineage of an artifact."""
    art = store.find(key)
    console.print_json(json.dumps({k: v for k, v in art.manifest.items() if k != "files"}))
    for depth, m in enumerate(art.lineage()):
        console.print(f"{'made from ' if depth else ''}{m['stage']}/{m['key']} ({m['wall_seconds']:.0f} s)")
    console.print(str(art.path), soft_wrap=True)


@store_app.command("verify")
def store_verify(key: Annotated[str, typer.Argument(help="Key or its beginning; all artifacts if none.")] = "") -> None:
    """Read every byte of the artifacts and compare with the hashes in their manifests."""
    bad = 0
    for art in [store.find(key)] if key else store.artifacts():
        problems = store.check(art.path)
        bad += bool(problems)
        console.print(f"{art.stage}/{art.key} " + ("[green]fine[/]" if not problems else f"[red]{'; '.join(problems)}[/]"))
    if bad:
        console.print(f"{bad} damaged; each is made again when it is next asked for.")
        raise typer.Exit(1)


@store_app.command("gc")
def store_gc(
    unused_for: Annotated[
        float | None, typer.Option("--unused-for", help="Also artifacts that nothing asked for in so many days.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Delete unfinished work and damaged artifacts (and old ones, if asked)."""
    from ultramed.core.garbage import gc

    paths, freed = gc(unused_for, dry_run)
    for path in paths:
        console.print(f"{path.parent.name}/{path.name}")
    console.print(f"{len(paths)} folders, {freed / 1e6:.0f} MB {'would be freed' if dry_run else 'freed'}")
