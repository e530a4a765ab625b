"""`ultramed bench`: anyone's models in the papers' tables."""

import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from ultramed.cli.common import EngineOption, ProcessesOption, console
from ultramed.core import config
from ultramed.core.client import PRICES, bill
from ultramed.core.client import prices as known_prices
from ultramed.core.errors import ConfigError
from ultramed.core.profile import BenchSection
from ultramed.core.progress import duration

bench_app = typer.Typer(pretty_exceptions_enable=False)


@bench_app.command()
def bench(
    model: Annotated[
        list[str],
        typer.Option(
            "--model",
            "-m",
            help="Artifact key, folder, hub id, bundled:smollm2-135m, or http://host/v1#name; my name=KEY gives it a name. Repeatable.",
        ),
    ],
    suite: Annotated[str, typer.Option(help="medical (Table 2's nine tasks), reward or general.")] = "medical",
    protocol: Annotated[
        str, typer.Option(help="likelihood (weights only), ultramedical (0-shot chain of thought) or greedy (bare answer).")
    ] = "likelihood",
    limit: Annotated[
        int, typer.Option(min=0, help="Questions of each task, or of reward benches prompts of each subset; 0 for all.")
    ] = 0,
    samples: Annotated[
        int, typer.Option(min=0, help="With ultramedical: the majority of so many samples, as the paper's 10.")
    ] = 0,
    shuffle: Annotated[int, typer.Option(min=0, help="Ask again under so many other orders of the options.")] = 0,
    judge: Annotated[str, typer.Option(help="url#model that grades MT-Bench in suite general.")] = "",
    fetch: Annotated[bool, typer.Option("--fetch", help="Fetch tasks from the hub that are not in ULTRAMED_DATA.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the leaderboard, which grows from run to run.")] = Path("figures/bench"),
    prices: Annotated[
        str, typer.Option(help="Dollars a million tokens of a hosted model: in,out, e.g. 0.15,0.6 (or in ULTRAMED_PRICES).")
    ] = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before it starts.")] = False,
    engine: EngineOption = "transformers",
    overrides: Annotated[list[str], typer.Option("--set", "-s", help="More: --set max_new_tokens=512.")] = [],  # noqa: B006
    processes: ProcessesOption = 0,
) -> None:
    """Where does a model stand in UltraMedical's tables? Ctrl-C and run again: what is answered is not asked twice."""
    from ultramed.core.log import quiet_libraries
    from ultramed.experiments import bench as benches
    from ultramed.lm import models

    quiet_libraries()
    config.known(suite, benches.SUITES, "suites")
    given = {
        "models": model,
        "protocol": protocol,
        "limit": limit,
        "samples": samples,
        "shuffle": shuffle,
        "judge": judge,
        "fetch": fetch,
        "engine": engine,
    }
    setting = config.validate(BenchSection, config.overridden(given, overrides), "bench")
    if prices:
        os.environ[PRICES] = prices
        known_prices()  # a slip should show before anything is paid for
    if suite != "medical" and (samples or shuffle):
        raise ConfigError(f"--samples and --shuffle belong to suite medical; suite {suite} has neither")
    found = benches.models_named(model)
    servers = [label for label, art in found.items() if models.card(art)["kind"] == "server"]
    if suite != "reward" and setting.protocol == "likelihood" and servers:
        raise ConfigError(f"{servers[0]}: a server gives no likelihoods; ask it with --protocol ultramedical or greedy")
    clock = time.monotonic()
    {"medical": _medical, "reward": _reward, "general": _general}[suite](setting, found, out, yes)
    console.print(
        f"leaderboard   {out / 'leaderboard.csv'}, page {out / 'index.html'} ({duration(time.monotonic() - clock)})",
        soft_wrap=True,
    )


def _ask_first(loads, found, yes, what="questions") -> None:
    """Say what it will take of every model, and on a terminal ask whether to go on."""
    from ultramed.lm import models
    from ultramed.lm.device import matrix_gflops

    for name, art in found.items():
        load = loads[name]
        told = f"{load.questions:,} {what}, about {load.prompt_tokens:,} tokens to read, at most {load.new_tokens:,} to write"
        if models.card(art)["kind"] == "server":
            cost = bill(load.prompt_tokens + load.new_tokens, load.new_tokens)
            takes = (
                f"at most {cost}{'' if known_prices() else ', cost unknown (give --prices)'}; how long is the server's to say"
            )
        else:
            takes = f"at most about {duration(load.seconds(models.parameters(art), matrix_gflops()))} here"
        console.print(f"{name}: {told}; {takes}", markup=False, soft_wrap=True)
    if not yes and sys.stdin.isatty() and sys.stdout.isatty() and not typer.confirm("start?", default=True):
        raise typer.Exit(1)


def _bill(name, artifacts) -> None:
    """What a server took."""
    from ultramed.experiments.bench import paid

    if took := paid(artifacts):
        cost = bill(took["tokens"], took["completion_tokens"])
        console.print(f"{name}: {took['requests']:,} requests, {cost}", markup=False)


def _medical(setting, found, out, yes) -> None:
    import matplotlib.pyplot as plt
    import pandas as pd

    from ultramed.experiments import bench as benches
    from ultramed.report import bench as report
    from ultramed.report import figures

    questions, missing = benches.medical_questions(setting.limit, setting.fetch)
    _tell(missing)
    _ask_first(dict.fromkeys(found, benches.estimate(setting, questions)), found, yes)
    answered = {name: benches.ask(setting, art, questions) for name, art in found.items()}
    unasked = []
    for name, made in answered.items():
        _bill(name, made.artifacts)
        for task, count in benches.too_long(made, questions).items():
            unasked.append(f"{name}, {task}: {count} questions do not fit into the model's context; not asked, not counted")
            console.print(f"too long      {unasked[-1]}", markup=False, soft_wrap=True)
    table = benches.by_task(answered)
    protocol = benches.told(setting, "medical")
    out.mkdir(parents=True, exist_ok=True)
    keyed = table.assign(artifact=table.model.map({n: f"{a.stage}/{a.key}" for n, a in found.items()}))
    report.merge(out / report.LEADERBOARD, keyed.assign(suite="medical", protocol=protocol, limit=setting.limit))
    for name, made in answered.items():
        report.write_harness(out, name, *report.harness_results(table, made, name, setting.model_dump()))
    shown = {"Accuracy by task, per cent with 95% intervals": report.shown(table)}
    if len(found) > 1:
        pairs = benches.compare_models(answered)
        apart = ["A", "B", "protocol", "limit"]
        report.merge(out / "comparisons.csv", pairs.assign(protocol=protocol, limit=setting.limit), apart)
        shown["Every two models on the same questions, each task counting alike (fractions)"] = pairs.round(4)
        shown["Row less column in points; * is p < 0.05 after Holm"] = benches.win_matrix(pairs)
    if "medqa" in set(table.task):
        shown["Beside UltraMedical's Table 2"] = benches.beside_table2(table)
        figures.style()
        fig = figures.timeline(benches.timeline(table))
        fig.savefig(out / "timeline.png", dpi=130, metadata={"Software": None})
        plt.close(fig)
    for name, made in answered.items():
        if len(rescored := benches.rescored(made, questions)):
            shown[f"{name}: the same replies under other projects' scorers"] = rescored.round(4)
    if setting.shuffle:
        orders = [{"model": n, **benches.option_order(setting, a, questions, answered[n])} for n, a in found.items()]
        shown["The same questions with their options in other orders"] = pd.DataFrame(orders).round(4)
    for caption, frame in shown.items():
        if not caption.startswith("Beside"):
            console.print(f"\n{caption}\n{frame.to_string(index=False)}", markup=False, soft_wrap=True)
    notes = [
        f"Protocol: {protocol}. Unparsed replies count as wrong; `upper` in leaderboard.csv counts them as right.",
        *unasked,
        *missing,
    ]
    charts = ["timeline.png"] if "medqa" in set(table.task) else []
    report.page(out, "medical", shown, charts, notes)


def _reward(setting, found, out, yes) -> None:
    import pandas as pd

    from ultramed.core.store import file_name, write_json
    from ultramed.evaluate.reward_bench import AVERAGE, sections
    from ultramed.experiments import bench_reward as benches
    from ultramed.lm import models
    from ultramed.report import bench as report

    pairs, missing = benches.reward_pairs(setting.fetch, setting.limit)
    _tell(missing)
    _ask_first({name: benches.estimate(pairs, art) for name, art in found.items()}, found, yes, "pairs")
    out.mkdir(parents=True, exist_ok=True)
    shown, rows = {}, []
    for name, art in found.items():
        judged = models.card(art)["kind"] == "server"
        kind = {"model_type": "Generative"} if judged else {"model_type": "Seq. Classifier", "chat_template": "tokenizer"}
        for bench_name, data in pairs.items():
            table, biases, scored = benches.score_reward(bench_name, art, data, setting.batch_tokens)
            _bill(f"{name} on {bench_name}", [scored])
            parts = [table.rename(columns={"subset": "task"}).assign(task=lambda t, b=bench_name: f"{b}: " + t.task)]
            if bench_name == "rewardbench":
                whole = sections(table).rename(columns={"subset": "task"})
                parts.append(whole.assign(task=whole.task.replace(AVERAGE, "mean of sections")))
            made = pd.concat(parts, ignore_index=True).assign(model=name, artifact=f"{art.stage}/{art.key}")
            rows.append(made)
            caption = f"{name} on {bench_name}: " + ", ".join(f"{k} {v:.3g}" for k, v in biases.items())
            shown[caption] = made.drop(columns=["model", "artifact"]).round(4)
            folder = out / file_name(name)
            write_json(
                folder / f"{bench_name}.json", {"model": name, **kind} | dict(zip(table.subset, table.accuracy, strict=True))
            )
    every = pd.concat(rows, ignore_index=True).assign(suite="reward", protocol="score", limit=setting.limit)
    report.merge(out / report.LEADERBOARD, every)
    for caption, frame in shown.items():
        console.print(f"\n{caption}\n{frame.to_string(index=False)}", markup=False, soft_wrap=True)
    report.page(out, "reward", shown, [], missing)


def _general(setting, found, out, yes) -> None:
    import pandas as pd

    from ultramed.experiments import bench_general as benches
    from ultramed.experiments.bench import told
    from ultramed.lm import models
    from ultramed.report import bench as report

    tasks, missing = benches.general_tasks(setting)
    _tell(missing)
    asked, judged = benches.general_estimate(setting, tasks)
    loads, who = dict.fromkeys(found, asked), dict(found)
    if judged.questions:
        loads["judge"] = sum([judged] * len(found), benches.Load(0, 0, 0))
        who["judge"] = models.resolve(setting.judge)
    _ask_first(loads, who, yes)
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, art in found.items():
        table, made = benches.general(setting, art, tasks)
        _bill(name, made)
        rows.append(table.assign(model=name, artifact=f"{art.stage}/{art.key}"))
    every = pd.concat(rows, ignore_index=True)
    protocol = told(setting, "general")
    report.merge(out / report.LEADERBOARD, every.assign(suite="general", protocol=protocol, limit=setting.limit))
    console.print(every.drop(columns="artifact").to_string(index=False), markup=False, soft_wrap=True)
    report.page(out, "general", {"GSM8K, MMLU and what a judge marks (fractions)": every.round(4)}, [], missing)


def _tell(missing: list[str]) -> None:
    for line in missing:
        console.print(f"not at hand   {line}", soft_wrap=True)
