"""How long a book takes on the machine at hand: what each notebook took on the reference machine, by how much slower this is.

The reference is two cores whose matrix products reach 900 GFLOP/s in bf16, so that a time told for it becomes a time here
when it is multiplied by 900 and divided by this machine's GFLOP/s (`ultramed doctor` measures them).
"""

from importlib.resources import files
from pathlib import Path

import yaml

from ultramed.core.errors import UserError
from ultramed.core.profile import Profile

REFERENCE = 900.0  # GFLOP/s
AROUND = 10.0  # seconds of any notebook, whatever it does: a process, imports, figures


def speed_here() -> float | None:
    """GFLOP/s of this machine's matrix products; None with a GPU, to which times of two cores say nothing, and which only the
    processes that use it should open."""
    from ultramed.lm.device import has_gpu, matrix_gflops

    return None if has_gpu() else matrix_gflops()


def measured() -> dict[str, dict[str, float]]:
    """Profile -> notebook -> seconds on the reference machine, of the profiles that have been run whole."""
    return yaml.safe_load(files("ultramed.book").joinpath("durations.yaml").read_text())


def reference_seconds(profile: Profile, notebooks: list[Path]) -> dict[str, float] | None:
    """Notebook -> seconds on the reference machine from an empty store: as measured (durations.yaml), or, for a profile that
    nobody has measured, what the plan's arithmetic takes; None for a model whose shape is not known here."""
    if known := measured().get(profile.name.partition("+")[0]):
        return {path.stem: known.get(path.stem, AROUND) for path in notebooks}
    from ultramed.book.plan import Hardware, jobs_of, work_of

    try:
        hours: dict[str, float] = {}
        for shape, job in jobs_of(profile):
            hours[job.notebook] = hours.get(job.notebook, 0) + work_of(job, shape, Hardware(1, REFERENCE / 1000))[2]
    except UserError:
        return None
    return {path.stem: AROUND + 3600 * hours.get(path.stem.split("_")[0], 0) for path in notebooks}


class Rest:
    """About how long the rest of a run takes, from reference seconds and this machine's speed, corrected by what it has seen.

    jobs: anything with `name`, `state` and `seconds`, as the runner's. at_once: how many run side by side and share the cores.
    """

    def __init__(self, jobs: list, known: dict[str, float], gflops: float, at_once: int = 1):
        self.jobs, self.known, self.slower, self.at_once = jobs, known, at_once * REFERENCE / gflops, at_once

    def seconds(self) -> float:
        """The more has been seen, the less what the machine's speed let expect counts: as much as a minute of the reference."""
        ended = [job for job in self.jobs if job.state == "done"]
        left = [job for job in self.jobs if job.state in ("waiting", "running")]
        seen, expected = sum(job.seconds for job in ended), sum(self.known[job.name] for job in ended)
        pace = (seen + 60 * self.slower) / (expected + 60)
        each = [max(0.0, pace * self.known[job.name] - job.seconds) for job in left]
        return max(sum(each) / self.at_once, *each, 0.0)
