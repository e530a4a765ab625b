"""Training mixtures: how many rows of which source, drawn with a seed, written down with a hash of the row ids."""

import random
import re
from pathlib import Path

from pydantic import Field

from ultramed.core.errors import ConfigError
from ultramed.core.profile import Profile
from ultramed.core.schema import AnswerForm, Strict
from ultramed.core.store import Artifact, digest, stage
from ultramed.data import rows as canonical
from ultramed.data.messages import as_instruction, hints_wording
from ultramed.data.sources import dataset, names_in


class MixtureConfig(Strict):
    """`counts`: source -> rows (a whole number) or multiples of the source (a fraction such as 0.5 or 2.0).

    A source is 'dataset', 'dataset:subset' or 'dataset:subset[0:32]' (the first 32 rows of it); the data set's artifact
    is an input of that name.
    """

    counts: dict[str, int | float] = Field(min_length=1)
    answer_form: AnswerForm = "content_first"
    side: str = "train"
    seed: int = 0


@stage(version=1, also=hints_wording)
def mixture(out: Path, config: MixtureConfig, **datasets: Artifact) -> dict:
    """Write `rows.parquet` (canonical instruction rows, shuffled). Reports rows per source and a hash of their ids.

    What a source gives depends on the seed and the source only: arms that share a source and a seed see the same rows
    of it. Asking for more rows than there are is an error unless the count is a multiple (then rows repeat).
    """
    picked, report, seen = [], {}, {}
    for source, count in sorted(config.counts.items()):
        pool = source_rows(source, config.side, datasets)
        wanted = round(count * len(pool)) if isinstance(count, float) else count
        if isinstance(count, int) and count > len(pool):
            raise ConfigError(
                f"mixture: {count} rows of {source!r} asked for, it has {len(pool)}; give {len(pool)} or fewer, or a "
                f"fraction such as {count / len(pool):.1f} to repeat rows"
            )
        rng = random.Random(f"{source}:{config.seed}")
        turns = [rng.sample(pool, len(pool)) for _ in range(-(-wanted // len(pool)))]
        drawn = [row for turn in turns for row in turn][:wanted]
        for row in drawn:
            row = as_instruction(row, config.answer_form)
            seen[row["id"]] = seen.get(row["id"], 0) + 1
            suffix = f"~{seen[row['id']]}" if seen[row["id"]] > 1 else ""
            picked.append({**row, "id": row["id"] + suffix, "source": source})
        report[source] = {"rows": len(drawn), "of": len(pool)}
    random.Random(f"order:{config.seed}").shuffle(picked)
    canonical.write_rows(out / "rows.parquet", picked)
    return {"rows": len(picked), "sources": report, "row_ids": digest([r["id"] for r in picked])}


def mixture_of(profile: Profile, config: MixtureConfig) -> Artifact:
    """The mixture of a profile's data sets."""
    return mixture(config, **{name: dataset(profile, name) for name in names_in(config.counts)})


def source_rows(source: str, side: str, datasets: dict[str, Artifact]) -> list[dict]:
    """Canonical rows of 'dataset', 'dataset:subset' or 'dataset:subset[start:stop]' on one side of its split."""
    whole, start, stop = re.fullmatch(r"(.*?)(?:\[(\d+):(\d+)\])?", source).groups()
    name, _, subset = whole.partition(":")
    if name not in datasets:
        raise ConfigError(f"mixture names {source!r}, but no data set {name!r} was given: {sorted(datasets)}")
    path = datasets[name] / f"{side}.parquet"
    if subset in ("open", "general"):
        path = datasets[name] / ("open.parquet" if subset == "open" else f"general_{side}.parquet")
    if not path.exists():
        raise ConfigError(f"data set {name!r} has no {side} side")
    rows = canonical.read_rows(path)
    rows = [r for r in rows if subset in ("", "open") or r.get("subset") == subset]
    if stop is not None and int(stop) > len(rows):
        raise ConfigError(f"mixture: {source!r} goes beyond the {len(rows)} rows there are")
    rows = rows if stop is None else rows[int(start) : int(stop)]
    if not rows:
        raise ConfigError(f"no rows for {source!r} on the {side} side")
    return rows
