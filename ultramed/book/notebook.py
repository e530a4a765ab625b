"""What every notebook's first cell calls: `book = start(...)`, and through it tables, figures, claims and published cells."""

import ast
import shlex
from dataclasses import dataclass
from functools import cached_property

import pandas as pd
import yaml

from ultramed.annotate.judge import LLMConfig
from ultramed.core import config
from ultramed.core.client import ServerConfig
from ultramed.core.errors import ConfigError
from ultramed.core.log import quiet_libraries
from ultramed.core.memory import settle
from ultramed.core.profile import Profile
from ultramed.core.store import Artifact
from ultramed.data.sources import dataset, local_files
from ultramed.evaluate.arms import Answers, Arms, artifacts_of, compare
from ultramed.experiments.medalpaca import MedAlpaca
from ultramed.experiments.ultramedical import UltraMedical
from ultramed.lm.device import placement
from ultramed.papers import published
from ultramed.papers.claims import Claim, claims_of
from ultramed.report import beside, figures, scorecard, tables

PARAMETERS = {"profile", "overrides"}
TRAINED = ("sft", "preference", "reward")  # stages that train a model


@dataclass(frozen=True)
class Book:
    """One notebook of a profile. Whatever it shows is written with the artifacts of the results that are given with it."""

    name: str
    profile: Profile
    command: str = ""  # what makes its results again

    # ----------------------------------------------------------------------------------------------------- what it has

    def medalpaca(self) -> MedAlpaca:
        """MedAlpaca's experiment on the profile's first model."""
        return MedAlpaca.of(self.profile)

    @cached_property
    def ultramedical(self) -> UltraMedical:
        """UltraMedical's experiment on the profile's first model."""
        return UltraMedical.of(self.profile)

    def dataset(self, name: str) -> Artifact:
        """A data set by name; 'exam' is the bundled one."""
        return dataset(self.profile, name)

    def has(self, *names: str) -> bool:
        """Whether data sets are in ULTRAMED_DATA; says what is missing."""
        missing = [name for name in names if not local_files(name)]
        if missing:
            print("not run:", ", ".join(missing), "not in ULTRAMED_DATA")
        return not missing

    @property
    def judge(self) -> LLMConfig | None:
        """The language model that judges, if the profile names one."""
        return LLMConfig(server=ServerConfig.of(self.profile.judge)) if self.profile.judge else None

    def has_judge(self) -> bool:
        """Whether a language model judges; says how to give one."""
        if not self.profile.judge:
            print("not run: no judge (--set judge=http://localhost:8000/v1#my-model)")
        return bool(self.profile.judge)

    @property
    def same_scale(self) -> bool:
        """Whether model, data and protocol of this notebook's paper are the profile's, so that cells can be compared."""
        section = self.profile.usmle if self.name.startswith("1") else self.profile.ultramedical
        return bool(section and section.same_scale) and not self.name.startswith("3")

    def protocol(self, more: str = "") -> str:
        """Model and way of asking, as the scorecard keeps it beside every number; `more` alone where nobody is asked."""
        if self.name.startswith("12"):  # of a shape
            return more
        asked = self.profile.eval if self.name.startswith("1") or not self.profile.ultramedical else self.ultramedical.asking
        return f"{self.profile.models[0].label}; {asked.protocol}, {asked.answer_form}" + (f"; {more}" if more else "")

    # ---------------------------------------------------------------------------------------------------- what it shows

    def table(self, name: str, frame: pd.DataFrame, caption: str, *sources) -> pd.DataFrame:
        """Write a table to `figures/<profile>/tables`, with the artifacts of `sources`, and return it to be shown."""
        return tables.save_table(frame, name, profile=self.profile.name, caption=caption, artifacts=artifacts_of(sources))

    def figure(self, name: str, fig, caption: str, *sources):
        """Write a figure to `figures/<profile>`, with the artifacts of `sources`, and return the picture to be shown."""
        return figures.save_figure(fig, name, profile=self.profile.name, caption=caption, artifacts=artifacts_of(sources))

    def claims(self, arms: Arms, more: str = "") -> pd.DataFrame:
        """Test this notebook's claims whose two arms are there; record them, and write the table `NN_claims` and, for whoever
        wants to test otherwise, the arms' answers (`NN_questions.parquet`, `Arms.read`).

        The p values are raw and the verdicts provisional: notebook 90 corrects over all claims of a paper. A claim that
        something falls by no more than a margin is left out where there is no more than that to lose, and any claim
        between two trained models that share too few seeds (`comparable`): they are shown, not compared.
        """
        at = dict(arms)
        if self.profile.ultramedical and self.profile.ultramedical.published_size == "70B":
            at |= {f"{name}_70b": answers for name, answers in arms.items()}  # as claims.csv calls them
        mine = [claim for claim in claims_of(self.name) if claim.unit == "points"]  # gigabytes and minutes have no paired test
        there = [claim for claim in mine if claim.a in at and claim.b in at and self.comparable(at[claim.a], at[claim.b])]
        about_70b = {claim.a.removesuffix("_70b") for claim in there if claim.a.endswith("_70b")}
        there = [claim for claim in there if claim.a not in about_70b]  # one comparison is tested as one claim
        tested = [claim for claim in there if not at_floor(claim, at[claim.b])]
        if tested:
            arms.write(scorecard.folder(self.profile.name) / "tables" / f"{self.name[:2]}_questions.parquet")
        entries = [scorecard.claim_entry(c, compare(at[c.a], at[c.b]), self.protocol(more)) for c in tested]
        return self._record(
            entries, "claims", "Claims on the same questions: A minus B in points, raw p, verdict before correction.", arms
        )

    def diagnostics(self, arms: Arms, statements: dict[tuple[str, str], str], more: str = "") -> pd.DataFrame:
        """Comparisons that the papers do not make, (A, B) -> statement: recorded apart, without a verdict, and left out as in
        `claims` where seeds are too few."""
        entries = [
            scorecard.diagnostic_entry(f"{self.name[:2]}:{a}-{b}", statement, compare(arms[a], arms[b]), self.protocol(more))
            for (a, b), statement in statements.items()
            if self.comparable(arms[a], arms[b])
        ]
        return self._record(entries, "diagnostics", "Comparisons of our own: A minus B in points, raw p.", arms)

    def comparable(self, a: Answers, b: Answers) -> bool:
        """Whether the arms share as many seeds as the profile asks for (`seeds_to_compare`), if each uses a trained model that
        the other does not."""
        models = [{art for art in arm.artifacts if art.stage in TRAINED} for arm in (a, b)]
        if models[0] <= models[1] or models[1] <= models[0]:
            return True
        return len(set(a.frame.seed) & set(b.frame.seed)) >= self.profile.seeds_to_compare

    def _record(self, entries: list[dict], name: str, caption: str, arms: Arms) -> pd.DataFrame:
        if not entries:
            print(f"no {name} of this notebook can be tested at this profile: an arm of each is missing, or has too few seeds")
            return pd.DataFrame()
        made = scorecard.record(self.profile.name, self.name, entries, self.command)
        return self.table(f"{self.name[:2]}_{name}", scorecard.shown(made), caption, arms)

    def beside(
        self,
        table: str,
        results: pd.DataFrame,
        names: dict[str, str],
        columns: dict[str, str] | None = None,
        *sources,
        more: str = "",
        same_scale: bool | None = None,
        tolerance: float = 0.0,
    ) -> pd.DataFrame:
        """Record every published cell that `results` fills (report/beside.py) and write the table `NN_beside`."""
        scale = self.same_scale if same_scale is None else same_scale
        section = self.profile.ultramedical if table.startswith("ultramedical") else None
        how = {"same_scale": scale, "tolerance": tolerance, "size": section.published_size if section else ""}
        entries = beside.cell_entries(table, results, names, columns, protocol=self.protocol(more), **how)
        if not entries:
            print("no published cell can be filled at this profile")
            return pd.DataFrame()
        scorecard.record(self.profile.name, self.name, entries, self.command)
        labels = {row: arm for arm, row in names.items()}
        caption = f"{published.TABLES[table].source}, beside ours ({more or self.profile.models[0].label})"
        caption += "." if scale else "; another model and other questions, so the numbers cannot be compared."
        return self.table(f"{self.name[:2]}_beside", beside.beside(entries, labels), caption, *sources)


def at_floor(claim: Claim, b: Answers) -> bool:
    """Whether B has no more to lose than the claim's margin, so that A cannot be found worse."""
    return claim.kind == "not_worse" and 100 * b.accuracy <= claim.margin


def start(name: str, profile: str, overrides: list[str] = ()) -> Book:
    """Resolve the parameters, say what will run where, and forget what an earlier run of the notebook recorded.

    papermill only warns about a parameter that no notebook reads; here that is an error. A parameter written with
    double underscores is an override: `-p train__epochs 2` is `train.epochs=2`.
    """
    quiet_libraries()
    settle()
    extra = []
    for parameter, value in injected().items():
        if "__" in parameter:
            extra.append(f"{parameter.replace('__', '.')}={_as_yaml(value)}")
        elif parameter not in PARAMETERS:
            raise ConfigError(f"unknown notebook parameter {parameter!r}{config.nearest(parameter, PARAMETERS)}")
    changes = [*overrides, *extra]
    resolved = config.load_profile(profile, changes)
    figures.style()
    pd.set_option("display.max_colwidth", 120, "display.precision", 3, "display.max_rows", 80)
    scorecard.forget(resolved.name, name)
    print(f"profile  {resolved.name}: {resolved.description}")
    print(f"models   {', '.join(m.label for m in resolved.models)}")
    print(f"runs on  {placement()}")
    if changes:
        print(f"changed  {', '.join(changes)}; results go to figures/{resolved.name}")
    settings = "".join(f" --set {shlex.quote(change)}" for change in changes)
    return Book(name, resolved, f"ultramed run {name[:2]} --profile {profile}{settings}")


def _as_yaml(value) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def injected() -> dict:
    """Names and values of papermill's injected cell, if this kernel was started by papermill."""
    try:
        from IPython import get_ipython

        history = get_ipython().user_ns["In"]
    except (ImportError, AttributeError, KeyError):
        return {}
    values = {}
    for cell in history:
        if cell.startswith("# Parameters\n"):
            for node in ast.parse(cell).body:
                if isinstance(node, ast.Assign):
                    values[node.targets[0].id] = ast.literal_eval(node.value)
    return values
