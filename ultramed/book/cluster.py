"""Notebooks and sweep points as a SLURM job array, or one after the other on this machine by the same script.

A task is a command of this package. Tasks need no order: what two of them need is a stage of the store, which one of them
makes while the other waits. So the store must be on a file system that all nodes see. A task that reaches its time limit
saves a checkpoint and is put into the queue again; a task that was cancelled or whose node was lost goes on from there
when the same command is given again.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from ultramed.core.config import home
from ultramed.core.errors import ConfigError
from ultramed.core.store import write_text

GRACE = 120  # seconds between the warning and the end of a task's time, unless the options have a signal

_SCRIPT = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --output={folder}/%x_%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
{options}
# At the time limit SLURM warns this shell alone; the work is told to stop, saves a checkpoint, and the task is queued again.
stop() {{
  kill -TERM "$child"; wait "$child"
  scontrol requeue "${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}"
  exit 0
}}
trap stop USR1
cd {home}
task=$(sed -n "$((${{SLURM_ARRAY_TASK_ID:-0}} + 1))p" {tasks})
echo "task ${{SLURM_ARRAY_TASK_ID:-0}} on $(hostname): $task"
bash -c "exec $task" & child=$!
wait "$child"
"""


def command(*args: str) -> str:
    """A shell line that runs this package's command line with the same Python."""
    return shlex.join([sys.executable, "-m", "ultramed", *map(str, args)])


def _write(name: str, tasks: list[str], folder: Path, options: list[str]) -> Path:
    if not any(option.startswith("signal=") for option in options):
        options = [*options, f"signal=B:USR1@{GRACE}"]
    lines = [f"#SBATCH --{option}" for option in options]
    write_text(folder / f"{name}.tasks", "".join(task + "\n" for task in tasks))
    given = {"folder": folder, "home": shlex.quote(str(home())), "tasks": shlex.quote(f"{folder / name}.tasks")}
    path = folder / f"{name}.sh"
    write_text(path, _SCRIPT.format(name=name, options="\n".join(lines), **given))
    return path


def submit(
    name: str,
    tasks: list[str],
    last: str,
    *,
    where: str,
    folder: Path,
    options: list[str] = (),
    wait: bool = False,
    console: Console | None = None,
) -> bool:
    """Run `tasks` and, if all of them end well, `last`. where: 'slurm' or 'local'. options: of sbatch, without the dashes.

    slurm: returns when the jobs are queued, or with `wait` when they have ended. True if nothing failed (as far as known).
    Raises ConfigError where SLURM is not at hand or refuses the job.
    """
    console = console or Console(emoji=False, highlight=False)
    wrong = [o for o in options if not re.fullmatch(r"[a-z][a-z-]*(=\S+)?", o)]
    if wrong:
        raise ConfigError(f"sbatch options are given as name=value, such as partition=gpu; got {wrong}")
    folder = folder.resolve()
    script, final = _write(name, tasks, folder, options), _write(f"{name}-last", [last], folder, options)
    if where == "local":
        codes = [_here(script, number) for number in range(len(tasks))]
        for number, code in enumerate(codes):
            if code:
                console.print(f"task {number} failed (exit status {code}): {tasks[number]}", soft_wrap=True)
        return not any(codes) and _here(final, 0) == 0
    if where != "slurm":
        raise ConfigError(f"cluster: wanted slurm or local, got {where!r}")
    if not shutil.which("sbatch"):
        raise ConfigError("cluster slurm: there is no sbatch on this machine; log in to a submit node, or use --cluster local")
    after = []
    if tasks:  # the last one may be all that was asked for
        array = _sbatch(f"--array=0-{len(tasks) - 1}", str(script))
        after = [f"--dependency=afterok:{array}", "--kill-on-invalid-dep=yes"]
        console.print(f"job {array}: {len(tasks)} tasks; logs and scripts in {folder}", soft_wrap=True)
    if not wait:
        console.print(f"job {_sbatch(*after, str(final))}: {last}", soft_wrap=True)
        return True
    job = _sbatch("--wait", *after, str(final))
    shown = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True).stdout
    if "JobState=COMPLETED" in shown:  # sbatch --wait says 0 of a job that was never started, too
        return True
    console.print("not everything has ended well; give the same command again: what is finished is not done twice")
    return False


def _sbatch(*args: str) -> str:
    """The job's number. Raises ConfigError if it was refused (with --wait a failed job gives a number, too)."""
    done = subprocess.run(["sbatch", "--parsable", *args], capture_output=True, text=True)
    if not done.stdout.strip():
        raise ConfigError(f"sbatch refused the job: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]


def _here(script: Path, number: int) -> int:
    return subprocess.run(["bash", str(script)], env={**os.environ, "SLURM_ARRAY_TASK_ID": str(number)}).returncode
