"""Command line of the book: what this machine can do, notebooks, sweeps, the report."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ultramed.cli.common import ProcessesOption, ProfileOption, SetOption, console
from ultramed.core import config, store
from ultramed.core.errors import ConfigError
from ultramed.core.profile import Profile

book_app = typer.Typer(pretty_exceptions_enable=False)
ClusterOption = Annotated[str, typer.Option(help="slurm: submit a job array. local: the same script, here, one by one.")]
SbatchOption = Annotated[
    list[str], typer.Option("--sbatch", "-C", help="An option of sbatch: -C partition=gpu -C gres=gpu:8 -C time=12:00:00.")
]
WaitOption = Annotated[bool, typer.Option("--wait", help="With --cluster slurm: return when everything has ended.")]
GpusOption = Annotated[int, typer.Option(min=0, help="Devices that the estimate shards a model over.")]
TflopsOption = Annotated[float, typer.Option(min=0.001, help="bf16 peak of a device: H100 989, A100 312, this CPU about 1.")]
RowTokensOption = Annotated[int, typer.Option(min=8, help="Mean tokens of a training row, for the estimate.")]


def _plan(resolved: Profile, gpus: int, tflops: float, row_tokens: int) -> list[str]:
    """What a profile takes, shown; what would stop it, returned."""
    from ultramed.book.plan import UTILISATION, Hardware, plan

    hardware = Hardware(max(1, gpus), tflops, row_tokens)
    made = plan(resolved, hardware)
    title = f"profile {resolved.name}: {resolved.models[0].label} on {hardware.gpus} of {tflops:g} TFLOP/s"
    table = Table(title=title, title_justify="left")
    for column in ("notebook", "what", "rows", "steps", "tokens, M", "GiB each", "device hours"):
        table.add_column(column, justify="left" if column in ("notebook", "what") else "right")
    for cost in made.costs:
        job, steps = cost.job, f"{cost.steps:,}" if cost.steps else ""
        numbers = (f"{job.rows:,}", steps, f"{cost.tokens / 1e6:,.1f}", f"{cost.gib:.1f}", f"{cost.hours:,.2f}")
        shared = job.config.tensor_parallel or hardware.gpus if job.engine == "vllm" else 0
        table.add_row(job.notebook, job.what + (f" (vllm, {shared} GPUs)" if shared else ""), *numbers)
    console.print(table)
    shares = ", ".join(f"{name} {100 * share:.0f}%" for name, share in UTILISATION.items())
    console.print(
        f"{made.hours:,.1f} device hours, {made.hours / hardware.gpus:,.1f} hours on {hardware.gpus}; assumed: {row_tokens} tokens "
        f"a row, {shares} of the peak; activations at the profile's micro-batch. Notebook 12 shows how far such estimates are off."
    )
    for what in made.missing:
        console.print(f"[yellow]not at hand[/]  {what}")
    return made.wrong


def _open_data(resolved: Profile, wrong: list[str]) -> None:
    """What a dry run finds in the data at hand; exit status 1 if that, or what is `wrong` already, would stop the run."""
    from ultramed.book.plan import open_data

    opened, more = open_data(resolved)
    wrong = [*wrong, *more]
    for line in opened:
        console.print(line, soft_wrap=True)
    for line in wrong:
        console.print(f"[red]wrong[/]  {line}", soft_wrap=True)
    if wrong:
        raise typer.Exit(1)


def _submit(name: str, tasks: list[str], last: str, profile: str, where: str, options: list[str], wait: bool) -> None:
    """Scripts and logs go to `figures/PROFILE/cluster`; exit status 1 if something failed."""
    from ultramed.book.cluster import submit
    from ultramed.book.runner import folder

    if not submit(
        name, tasks, last, where=where, folder=folder(profile) / "cluster", options=options, wait=wait, console=console
    ):
        raise typer.Exit(1)


@book_app.command()
def doctor(
    profile: ProfileOption = "laptop", gpus: GpusOption = 0, tflops: TflopsOption = 989.0, row_tokens: RowTokensOption = 512
) -> None:
    """What this machine can do, which profiles there are, and what is at hand; with --gpus also what a profile needs."""
    import shutil

    import psutil

    from ultramed.book.durations import REFERENCE, measured, reference_seconds, speed_here
    from ultramed.book.runner import notebooks
    from ultramed.core.progress import duration
    from ultramed.data.sources import data_root
    from ultramed.lm.device import disk_mbytes, memory_gbytes, placement

    place = placement()
    console.print(f"runs on       {place}")
    gib = psutil.virtual_memory().total / 2**30
    console.print(f"cores, memory {psutil.cpu_count()} logical, {gib:.0f} GiB" + (" (8 needed at laptop)" if gib < 7.5 else ""))
    folder = store.root()
    place_of = next(p for p in [folder, *folder.parents] if p.exists())
    free = shutil.disk_usage(place_of).free / 2**30
    speed = speed_here()
    if speed:
        console.print(
            f"speed         {speed:.0f} GFLOP/s in matrix products: times told for {REFERENCE:.0f} are {REFERENCE / speed:.2g} times "
            f"as long here; memory {memory_gbytes():.0f} GB/s"
        )
    try:
        disk = f"{disk_mbytes(place_of):.0f} MB/s"
    except OSError as err:
        disk = f"[red]not writable: {err.strerror}[/]"
    console.print(
        f"store         {folder}, {free:.0f} GiB free, {disk}" + (" ([red]laptop writes about 6 GiB[/])" if free < 8 else "")
    )
    console.print(f"ULTRAMED_DATA {data_root() or 'not set: the bundled exam is used, real data sets come from the hub'}")
    for package, version in store.environment()["versions"].items():
        console.print(f"{package:<13} {version or '[red]missing[/]'}")
    table = Table(title="profiles", title_justify="left")
    for column in ("profile", "time here", "what it is"):
        table.add_column(column, no_wrap=column == "profile")
    for name in config.profiles():
        found = config.load_profile(name)
        known = reference_seconds(found, notebooks()) if speed else None
        here = duration(REFERENCE / speed * sum(known.values())) if known else "not known"
        models = ", ".join(m.label for m in found.models)
        table.add_row(name, here, f"{found.description}\n[dim]{models}; {found.hardware}[/]")
    console.print(table)
    console.print(f"time here: from an empty store; measured for {' and '.join(measured())}, elsewhere the arithmetic alone")
    resolved = config.load_profile(profile)
    if gpus:
        for what in _plan(resolved, gpus, tflops, row_tokens):
            console.print(f"[red]wrong[/]  {what}", soft_wrap=True)


@book_app.command("profile")
def show_profile(
    name: Annotated[str, typer.Argument(help="A file of params/, without .yaml, or a path to one.")] = "laptop",
    overrides: SetOption = [],  # noqa: B006
    only: Annotated[str, typer.Option(help="Only keys that begin so, such as ultramedical.preference.")] = "",
) -> None:
    """Every resolved value of a profile, and the file and line that set it."""
    rows = [row for row in config.resolved_values(name, overrides) if row[0].startswith(only)]
    if not rows:
        raise ConfigError(f"no key of profile {name!r} begins with {only!r}")
    width = min(60, max(len(key) for key, _, _ in rows))
    for key, value, place in rows:
        console.print(f"{key:<{width}}  {json.dumps(value)}  [dim]{place}[/]", soft_wrap=True)


@book_app.command()
def run(
    numbers: Annotated[list[str] | None, typer.Argument(help="Notebook numbers, e.g. 10 11; all if none.")] = None,
    profile: ProfileOption = "laptop",
    overrides: SetOption = [],  # noqa: B006 (typer copies it)
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=1, help="Notebooks at once, which share the cores; each needs 4 GB.")
    ] = 1,
    ahead: Annotated[
        int,
        typer.Option(
            min=0,
            help="Before the notebooks so many processes make their artifacts, one seed at a time each; worth it where one small "
            "model leaves a GPU idle. Each takes a core, 6 GB of memory and 5 GB of a GPU's.",
        ),
    ] = 0,
    force: Annotated[
        bool, typer.Option("--force", help="Run notebooks again that are done; finished stages are still reused.")
    ] = False,
    report: Annotated[bool, typer.Option(help="Write the HTML report afterwards.")] = True,
    processes: ProcessesOption = 0,
    cluster: ClusterOption = "",
    sbatch: SbatchOption = [],  # noqa: B006
    wait: WaitOption = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Say what the whole profile (numbers do not narrow it) would run, in hours of a GPU, and what has to be fetched; "
            "open the data at hand; status 1 if they cannot do. For hours of this machine: ultramed doctor.",
        ),
    ] = False,
    gpus: GpusOption = 1,
    tflops: TflopsOption = 989.0,
    row_tokens: RowTokensOption = 512,
) -> None:
    """Run the notebooks with papermill and write `figures/PROFILE/`, with --set `figures/PROFILE+CHANGES/`."""
    resolved = config.load_profile(profile, overrides)  # before torch is imported: a slip should show at once
    from ultramed.book import runner as batch

    if dry_run:
        batch.notebooks(numbers or [])  # a slip in them should show
        _open_data(resolved, _plan(resolved, gpus, tflops, row_tokens))
        return
    if cluster:
        from ultramed.book import cluster as on

        names = [p.stem.split("_")[0] for p in batch.notebooks(numbers or [])]
        more = ["--profile", profile, *(f"--set={o}" for o in overrides), *(["--force"] if force else [])]
        more += [f"--processes={processes}"] if processes else []
        more += [f"--ahead={ahead}"] if ahead else []
        tasks = [on.command("run", n, *more, "--no-report") for n in names if n != batch.LAST]
        last = on.command("run", batch.LAST, *more) if batch.LAST in names else on.command("report", "--profile", resolved.name)
        _submit(f"ultramed-{resolved.name}", tasks, last, resolved.name, cluster, sbatch, wait)
        return
    fine = batch.run(numbers or [], profile, overrides, jobs=jobs, ahead=ahead, force=force, console=console)
    if report:
        from ultramed.report.site import write_report

        console.print(f"report: {write_report(resolved.name)}", soft_wrap=True)
    if not fine:
        raise typer.Exit(1)


@book_app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="A YAML file such as params/sweeps/lora_rank.yaml.")],
    only: Annotated[int, typer.Option(help="Only this point, counted from 0, without the table: a task of a cluster.")] = -1,
    cluster: ClusterOption = "",
    sbatch: SbatchOption = [],  # noqa: B006
    wait: WaitOption = False,
) -> None:
    """Train and examine an arm at every point of a grid, or of a list; finished runs are skipped, failed ones tried again."""
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


@book_app.command()
def report(profile: ProfileOption = "laptop") -> None:
    """Build `figures/PROFILE/index.html` from what has run."""
    from ultramed.report.site import write_report

    console.print(str(write_report(profile)), soft_wrap=True)
