"""The command line. Each command is also a Python call; heavy libraries are imported only by the commands that need them."""

import json
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ultramed.cli import data as cli_data
from ultramed.cli import models as cli_models
from ultramed.cli.data import ProcessesOption, ProfileOption, SetOption, console
from ultramed.core import config, schema, store
from ultramed.core.errors import ConfigError, ServerError, StoreError
from ultramed.lm.device import placement

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown",
    help="Rerun every table and figure of MedAlpaca and UltraMedical by changing a parameter file.\n\n"
    "Start with `ultramed doctor`, then `ultramed run`. Nothing leaves this machine unless you give a URL.",
)  # fmt: skip
store_app = typer.Typer(no_args_is_help=True, help="Look after the artifacts: everything that was built, trained and answered.")
app.add_typer(store_app, name="store")
app.add_typer(cli_data.data_app, name="data")
app.add_typer(cli_data.annotate_app, name="annotate")
app.add_typer(cli_models.models_app)
app.add_typer(cli_models.train_app, name="train")

ClusterOption = Annotated[str, typer.Option(help="slurm: submit a job array. local: the same script, here, one by one.")]
SbatchOption = Annotated[
    list[str], typer.Option("--sbatch", "-C", help="An option of sbatch: -C partition=gpu -C gres=gpu:8 -C time=12:00:00.")
]
WaitOption = Annotated[bool, typer.Option("--wait", help="With --cluster slurm: return when everything has ended.")]


def main() -> None:
    """Entry point: known errors become one line and exit status 2, Ctrl-C 130; only bugs show a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("ultramed").setLevel(logging.INFO)
    try:
        code = app(standalone_mode=False)  # Typer turns Ctrl-C into status 130 without a word
        if code == 130:
            print("\ninterrupted: what is finished is kept; run the same command again to go on", file=sys.stderr)
        sys.exit(code)
    except (ConfigError, ServerError, StoreError, FileNotFoundError, ValueError) as err:
        print(f"error: {err}", file=sys.stderr)
        sys.exit(2)
    except Exception as err:
        if not hasattr(err, "show"):
            raise
        err.show()  # Typer's own errors: a wrong option, a missing argument
        sys.exit(err.exit_code)


GpusOption = Annotated[int, typer.Option(min=0, help="Devices that the estimate shards a model over.")]
TflopsOption = Annotated[float, typer.Option(min=0.001, help="bf16 peak of a device: H100 989, A100 312, this CPU about 1.")]
RowTokensOption = Annotated[int, typer.Option(min=8, help="Mean tokens of a training row, for the estimate.")]


def _plan(resolved: schema.Profile, gpus: int, tflops: float, row_tokens: int) -> None:
    from ultramed.book.plan import UTILISATION, plan

    gpus = max(1, gpus)
    found = plan(resolved, gpus=gpus, tflops=tflops, row_tokens=row_tokens)
    table = Table(
        title=f"profile {resolved.name}: {resolved.models[0].label} on {gpus} of {tflops:g} TFLOP/s", title_justify="left"
    )
    for column in ("notebook", "what", "rows", "steps", "tokens, M", "GiB each", "device hours"):
        table.add_column(column, justify="left" if column in ("notebook", "what") else "right")
    for r in found.runs:
        cells = (f"{r.rows:,}", f"{r.steps:,}" if r.steps else "", f"{r.tokens / 1e6:,.1f}", f"{r.gib:.1f}", f"{r.hours:,.2f}")
        table.add_row(r.notebook, r.what, *cells)
    console.print(table)
    shares = ", ".join(f"{name} {100 * share:.0f}%" for name, share in UTILISATION.items())
    console.print(
        f"{found.hours:,.1f} device hours, {found.hours / gpus:,.1f} hours on {gpus}; assumed: {row_tokens} tokens a row, {shares} "
        "of the peak; activations at the profile's micro-batch. Notebook 12 shows how far such estimates are off.",
        highlight=False,
    )  # fmt: skip
    for what in found.missing:
        console.print(f"[yellow]not at hand[/]  {what}", highlight=False)


def _submit(name: str, tasks: list[str], last: str, profile: str, where: str, options: list[str], wait: bool) -> None:
    """Scripts and logs go to `figures/PROFILE/cluster`; exit status 1 if something failed."""
    from ultramed.book.cluster import submit
    from ultramed.book.runner import folder

    if not submit(
        name, tasks, last, where=where, folder=folder(profile) / "cluster", options=options, wait=wait, console=console
    ):
        raise typer.Exit(1)


@app.command()
def doctor(
    profile: ProfileOption = "laptop",
    gpus: GpusOption = 0,
    tflops: TflopsOption = 989.0,
    row_tokens: RowTokensOption = 512,
) -> None:
    """What this machine can do, which profiles there are, and what is at hand; with --gpus also what a profile needs."""
    import shutil

    import psutil

    from ultramed.data.sources import data_root

    place = placement()
    console.print(f"runs on       {place}", highlight=False)
    gib = psutil.virtual_memory().total / 2**30
    console.print(f"cores, memory {psutil.cpu_count()} logical, {gib:.0f} GiB" + (" (8 needed at laptop)" if gib < 7.5 else ""))
    folder = store.root()
    place_of = next(p for p in [folder, *folder.parents] if p.exists())
    free = shutil.disk_usage(place_of).free / 2**30
    console.print(f"store         {folder}, {free:.0f} GiB free" + (" ([red]laptop writes about 6 GiB[/])" if free < 8 else ""))
    console.print(f"ULTRAMED_DATA {data_root() or 'not set: the bundled exam is used, real data sets come from the hub'}")
    for package, version in store.environment()["versions"].items():
        console.print(f"{package:<13} {version or '[red]missing[/]'}", highlight=False)
    table = Table(title="profiles", title_justify="left")
    for column in ("profile", "models", "hardware", "description"):
        table.add_column(column)
    for name in config.profiles():
        found = config.load_profile(name)
        table.add_row(name, ", ".join(m.label for m in found.models), found.hardware, found.description)
    console.print(table)
    resolved = config.load_profile(profile)
    if gpus:
        _plan(resolved, gpus, tflops, row_tokens)


@app.command()
def run(
    numbers: Annotated[list[str] | None, typer.Argument(help="Notebook numbers, e.g. 10 11; all if none.")] = None,
    profile: ProfileOption = "laptop",
    overrides: SetOption = [],  # noqa: B006 (typer copies it)
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=1, help="Notebooks at once; each takes all cores, so 1 is best on a laptop.")
    ] = 1,
    force: Annotated[
        bool, typer.Option("--force", help="Run notebooks again that are done; finished stages are still reused.")
    ] = False,
    report: Annotated[bool, typer.Option(help="Write the HTML report afterwards.")] = True,
    processes: ProcessesOption = 0,
    cluster: ClusterOption = "",
    sbatch: SbatchOption = [],  # noqa: B006
    wait: WaitOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would run, how long, and what is missing.")] = False,
    gpus: GpusOption = 1,
    tflops: TflopsOption = 989.0,
    row_tokens: RowTokensOption = 512,
) -> None:
    """Run the notebooks with papermill and write `figures/PROFILE/`."""
    from ultramed.book import runner as batch

    if dry_run:
        _plan(config.load_profile(profile, overrides), gpus, tflops, row_tokens)
        return
    if cluster:
        from ultramed.book import cluster as on

        config.load_profile(profile, overrides)
        names = [p.stem.split("_")[0] for p in batch.notebooks(numbers or [])]
        more = ["--profile", profile, *(f"--set={o}" for o in overrides), *(["--force"] if force else [])]
        more += [f"--processes={processes}"] if processes else []
        tasks = [on.command("run", n, *more, "--no-report") for n in names if n != batch.LAST]
        last = on.command("run", batch.LAST, *more) if batch.LAST in names else on.command("report", "--profile", profile)
        _submit(f"ultramed-{profile}", tasks, last, profile, cluster, sbatch, wait)
        return
    fine = batch.run(numbers or [], profile, overrides, jobs=jobs, force=force, console=console)
    if report:
        from ultramed.report.site import write_report

        console.print(f"report: {write_report(profile)}", highlight=False, soft_wrap=True)
    if not fine:
        raise typer.Exit(1)


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="A YAML file such as params/sweeps/lora_rank.yaml.")],
    only: Annotated[int, typer.Option(help="Only this point, counted from 0, without the table: a task of a cluster.")] = -1,
    cluster: ClusterOption = "",
    sbatch: SbatchOption = [],  # noqa: B006
    wait: WaitOption = False,
) -> None:
    """Run a notebook arm over a grid of parameters; finished runs are skipped, failed ones tried again."""
    from ultramed.book.sweep import read_sweep, run_point, run_sweep

    if only >= 0:
        run_point(file, only, console)
        return
    if cluster:
        from ultramed.book import cluster as on

        found, points = read_sweep(file)
        tasks = [on.command("sweep", file.resolve(), "--only", number) for number in range(len(points))]
        _submit(f"sweep-{file.stem}", tasks, on.command("sweep", file.resolve()), found.profile, cluster, sbatch, wait)
        return
    if not run_sweep(file, console):
        raise typer.Exit(1)


@app.command()
def report(profile: ProfileOption = "laptop") -> None:
    """Build `figures/PROFILE/index.html` from what has run."""
    from ultramed.report.site import write_report

    console.print(str(write_report(profile)), highlight=False, soft_wrap=True)


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
        console.print(f"{'made from ' if depth else ''}{m['stage']}/{m['key']} ({m['wall_seconds']:.0f} s)", highlight=False)
    console.print(str(art.path), highlight=False, soft_wrap=True)


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
    paths, freed = store.gc(unused_for, dry_run)
    for path in paths:
        console.print(f"{path.parent.name}/{path.name}", highlight=False)
    console.print(f"{len(paths)} folders, {freed / 1e6:.0f} MB {'would be freed' if dry_run else 'freed'}", highlight=False)
