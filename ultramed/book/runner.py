"""Notebooks by papermill, one process each: strict parameters, live progress, skip what is done, a readable summary."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import psutil
from rich.console import Console
from rich.live import Live
from rich.table import Table

from ultramed.book.durations import Rest, reference_seconds, speed_here
from ultramed.core.config import home, load_profile, nearest
from ultramed.core.errors import ConfigError
from ultramed.core.profile import Profile
from ultramed.core.progress import FILE, MINUTE, duration, stop_file
from ultramed.core.signals import StopSignals
from ultramed.core.store import digest, environment, root, write_json
from ultramed.lm.device import cores
from ultramed.report.scorecard import folder

LAST = "90"  # the scorecard reads what the others recorded, so it runs alone and last
DATA = ("ULTRAMED_DATA", "ULTRAMED_HUB")
READ = (".py", ".yaml", ".csv", ".txt", ".html")  # files of the package that a notebook's output may depend on


@dataclass
class Job:
    """One notebook of a run and what became of it."""

    name: str
    source: Path
    target: Path
    parameters: dict
    state: str = "waiting"  # waiting, running, done, skipped, failed
    seconds: float = 0.0
    note: str = ""
    gflops: float | None = None  # of the machine's matrix products, where they were measured
    values: dict = field(default_factory=dict)  # the whole profile, resolved: the parameters only name it

    @property
    def stamp(self) -> Path:
        return self.target.with_suffix(".json")

    @property
    def last(self) -> bool:
        return self.name.startswith(LAST)

    def key(self) -> str:
        """Changes when the notebook, its profile's values, the package or the folder of data sets change; the scorecard's also
        with what it reads."""
        entries = sorted((self.target.parents[1] / "entries").glob("*.json")) if self.last else []
        recorded = [path.read_text() for path in entries]
        data = [os.environ.get(name, "") for name in DATA]
        return digest([self.source.read_text(), self.parameters, self.values, code_hash(), data, *recorded])

    def fresh(self) -> bool:
        try:
            return self.target.exists() and json.loads(self.stamp.read_text())["key"] == self.key()
        except (OSError, ValueError, KeyError):
            return False


def code_hash() -> str:
    """Hash of the package, its tables included: executed notebooks are skipped only if nothing that they could read has
    changed."""
    package = Path(__file__).parents[1]
    parts = [f"{p.relative_to(package)}:{p.read_text()}" for p in sorted(package.rglob("*")) if p.suffix in READ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def notebooks(numbers: list[str] = ()) -> list[Path]:
    """Notebook files, all or those whose name begins with one of the numbers. Raises ConfigError for an unknown one."""
    every = sorted((home() / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    if not every:
        raise ConfigError(f"no notebooks in {home() / 'notebooks'}; run this in the repository or set ULTRAMED_HOME")
    chosen = []
    for number in numbers:
        hits = [p for p in every if p.stem == number or p.stem.split("_")[0] == number]
        if not hits:
            raise ConfigError(f"no notebook {number!r}{nearest(number, [p.stem.split('_')[0] for p in every])}")
        chosen += hits
    return sorted(set(chosen)) if numbers else every


def parameters_of(path: Path) -> dict[str, str]:
    """Names (and source lines) of the cell tagged `parameters`; there must be exactly one."""
    cells = [c for c in json.loads(path.read_text())["cells"] if "parameters" in c["metadata"].get("tags", [])]
    if len(cells) != 1:
        raise ConfigError(f"{path.name}: {len(cells)} cells are tagged 'parameters', wanted one")
    source = "".join(cells[0]["source"])
    return {m[1]: m[0] for m in re.finditer(r"^(\w+)(?:\s*:[^=]+)?\s*=.*$", source, re.M)}


def run(
    numbers: list[str],
    profile: str,
    overrides: list[str],
    *,
    jobs: int = 1,
    ahead: int = 0,
    force: bool = False,
    console: Console | None = None,
) -> bool:
    """Run notebooks; True if none failed. What is done already, with the same code and values, is skipped.

    Ctrl-C and SIGTERM are passed on to what runs, once each: training saves a checkpoint, nothing more is begun, and
    KeyboardInterrupt is raised when all have ended. A second Ctrl-C stops at once, a third kills.

    First, with `ahead`, so many processes make what the notebooks that have to run will ask for (book/ahead.py).

    With several `jobs` the longest begin first, so that none is left over at the end; two that need the same artifact wait for
    each other (core/store.py).
    """
    console = console or Console(emoji=False, highlight=False)
    resolved = load_profile(profile, overrides)  # a typo should not cost a minute of start-up
    parameters = {"profile": profile, "overrides": list(overrides)}
    todo = []
    for path in notebooks(numbers):
        unknown = set(parameters) - set(parameters_of(path))
        if unknown:
            raise ConfigError(f"{path.name} lacks the parameters {sorted(unknown)}")
        target = folder(resolved.name) / "notebooks" / path.name
        todo.append(Job(path.stem, path, target, parameters, values=resolved.model_dump(mode="json")))
    first, last = [j for j in todo if not j.last], [j for j in todo if j.last]
    if ahead:
        from ultramed.book.ahead import make_ahead  # the experiments and their libraries take seconds

        make_ahead([job.name[:2] for job in first if force or not job.fresh()], profile, overrides, ahead, console)
    started, show = time.monotonic(), _Terminal if console.is_terminal else _Lines
    rest = _rest(todo, resolved, force, jobs)
    if jobs > 1 and rest:
        first.sort(key=lambda job: -rest.known[job.name])
    with show(console, todo, resolved.name, rest) as watch, StopSignals() as stop:
        threads = max(1, cores() // jobs) if jobs > 1 else 0
        with ThreadPoolExecutor(jobs) as pool:
            waiting = [pool.submit(_run_one, job, force, stop, threads=threads) for job in first]
            while not all(f.done() for f in waiting):
                watch.tick()
                time.sleep(0.3)
            for future in waiting:
                future.result()
        for job in last:
            _run_one(job, force, stop, watch.tick)
        watch.tick()
    if stop.asked:
        raise KeyboardInterrupt
    console.print(_table(todo, resolved.name))
    failed = [j for j in todo if j.state == "failed"]
    for job in failed:
        console.print(f"\n[bold red]{job.name} failed[/]: {job.note}\n  see {job.target}")
    console.print(f"{len(todo) - len(failed)} of {len(todo)} notebooks fine, {time.monotonic() - started:.0f} s")
    return not failed


def _rest(todo: list[Job], profile: Profile, force: bool, at_once: int) -> Rest | None:
    """What foretells the rest; None where nothing has to run, or where nothing is known to go by."""
    if not force and all(job.fresh() for job in todo):
        return None
    speed, known = speed_here(), reference_seconds(profile, [job.source for job in todo])
    for job in todo:
        job.gflops = speed and round(speed)
    return Rest(todo, known, speed, at_once) if speed and known else None


class _Terminal:
    """A table that is drawn anew."""

    def __init__(self, console: Console, todo: list[Job], profile: str, rest: Rest | None):
        self.todo, self.profile, self.rest = todo, profile, rest
        self.live = Live(console=console, refresh_per_second=2, transient=True)

    def __enter__(self):
        self.live.__enter__()
        return self

    def __exit__(self, *error):
        self.live.__exit__(*error)

    def tick(self) -> None:
        table = _table(self.todo, self.profile)
        table.caption = f"about {duration(self.rest.seconds())} left" if self.rest else None
        self.live.update(table)


class _Lines:
    """For logs: a line when a notebook begins and ends, and one a minute with what it does and what the rest may take."""

    def __init__(self, console: Console, todo: list[Job], _profile: str, rest: Rest | None):
        self.console, self.todo, self.rest = console, todo, rest
        self.seen, self.told = {job.name: "waiting" for job in todo}, time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def tick(self) -> None:
        for job in self.todo:
            if job.state != self.seen[job.name]:
                self.seen[job.name] = job.state
                self.say(job, duration(job.seconds) if job.state in ("done", "failed") else "")
        if time.monotonic() - self.told > MINUTE:
            for job in self.todo:
                if job.state == "running":
                    self.say(job, f"{duration(job.seconds)}; {job.note or 'starting'}")

    def say(self, job: Job, more: str) -> None:
        self.told, ended = time.monotonic(), sum(j.state in ("done", "skipped", "failed") for j in self.todo)
        left = self.rest.seconds() if self.rest else 0
        whole = f"{ended} of {len(self.todo)} notebooks" + (f", about {duration(left)} left" if left else "")
        line = f"{datetime.now():%H:%M:%S} {job.name} {job.state}{', ' if more else ''}{more} ({whole})"
        self.console.print(line, soft_wrap=True, markup=False)


def _table(todo: list[Job], profile: str) -> Table:
    table = Table(title=f"profile {profile}", title_justify="left")
    for column in ("notebook", "state", "time", ""):
        table.add_column(column, overflow="fold")
    colors = {"done": "green", "failed": "red", "running": "yellow", "skipped": "cyan"}
    for job in todo:
        color = colors.get(job.state, "dim")
        seconds = f"{job.seconds:.0f} s" if job.seconds else ""
        table.add_row(job.name, f"[{color}]{job.state}[/]", seconds, job.note.splitlines()[0] if job.note else "")
    return table


def _run_one(job: Job, force: bool, stop: StopSignals, tick=lambda: None, threads: int = 0) -> None:
    """Run one notebook in a process of its own; papermill is not safe to run twice in one. threads: its share of the cores (0:
    what torch takes by itself), unless the user has said how many."""
    if stop.asked:
        return
    if not force and job.fresh():
        job.state, job.note = "skipped", "done before with the same code and values (--force runs it again)"
        return
    job.state, clock, told = "running", time.monotonic(), 0
    key = job.key()  # of what runs, not of what may be edited meanwhile
    job.target.parent.mkdir(parents=True, exist_ok=True)
    progress = job.target.with_suffix(".progress")
    stop_file(progress).unlink(missing_ok=True)  # of a run that was killed
    work = job.target.with_name(f".{job.target.name}")
    env = {**os.environ, FILE: str(progress), "PYDEVD_DISABLE_FILE_VALIDATION": "1", "ULTRAMED_HOME": str(home())}
    env["ULTRAMED_STORE"] = str(root())
    for name in DATA:  # notebooks run in a folder of their own
        if env.get(name):
            env[name] = str(Path(env[name]).resolve())
    if threads:
        env.setdefault("OMP_NUM_THREADS", str(threads))
    code = "import sys; from ultramed.book.runner import execute; execute(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(job.source), str(work), json.dumps(job.parameters)]
    piped = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    # A session of its own: a terminal's Ctrl-C would reach papermill, too, which asks the kernel a second time.
    with subprocess.Popen(command, env=env, start_new_session=True, **piped) as process, ThreadPoolExecutor(1) as drain:
        errors = drain.submit(process.stderr.read)
        while process.poll() is None:
            job.seconds = time.monotonic() - clock
            if progress.exists():
                job.note = progress.read_text()
            if stop.asked > told:
                told, job.note = told + 1, "stopping"
                stop_file(progress).touch()
                _interrupt(process.pid, kill=told > 2)
            tick()
            time.sleep(0.3)
        job.seconds = time.monotonic() - clock
        stderr = errors.result()
    progress.unlink(missing_ok=True)
    stop_file(progress).unlink(missing_ok=True)
    if work.exists():
        os.replace(work, job.target)
    if process.returncode == 0:
        job.state, job.note = "done", ""
        pace = {"seconds": round(job.seconds, 1), "gflops": job.gflops}
        write_json(job.stamp, {"key": key, **pace, "git": environment()["git"], **job.parameters})
    else:
        job.stamp.unlink(missing_ok=True)
        lines = [line for line in stderr.splitlines() if line.strip()]
        job.state, job.note = "failed", lines[-1] if lines else f"exit status {process.returncode}"


def _interrupt(pid: int, kill: bool) -> None:
    """Ctrl-C for the kernel under papermill's process `pid`, or, before there is one, for papermill; kill: an end to all of
    it."""
    try:
        papermill = psutil.Process(pid)
        below = papermill.children(recursive=True)
        kernels = [child for child in below if "ipykernel_launcher" in child.cmdline()]
        for process in [*below, papermill] if kill else kernels or [papermill]:
            process.send_signal(signal.SIGKILL if kill else signal.SIGINT)
    except psutil.Error:
        pass  # it has ended by itself


def _end_with(parent: int) -> None:
    """End this process, and by that its kernel, when the parent is gone: nobody would take what it makes."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def execute(source: str, target: str, parameters: str) -> None:
    """One notebook through papermill, in this process, in the notebook folder."""
    import nbformat
    import papermill

    threading.Thread(target=_end_with, args=[os.getppid()], daemon=True).start()
    try:
        where, quiet = {"cwd": str(Path(source).parent), "kernel_name": "python3"}, {"progress_bar": False, "log_output": False}
        papermill.execute_notebook(source, target, parameters=json.loads(parameters), **where, **quiet)
    finally:
        if Path(target).exists():  # papermill notes where the files lay: a copy that is read elsewhere should not
            notebook = nbformat.read(target, as_version=4)
            notebook.metadata.papermill.update(input_path=Path(source).name, output_path=Path(source).name)
            nbformat.write(notebook, target)
