"""The command line. Each command is also a Python call; heavy libraries are imported only by the commands that need them."""

import json
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ultramed import cli_data, config, schema, store
from ultramed.cli_data import ProfileOption, SetOption, console

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown",
    help="Rerun every table and figure of MedAlpaca and UltraMedical by changing a parameter file.\n\n"
    "Start with `ultramed doctor`, then `ultramed run`. Nothing leaves this machine unless you give a URL.",
)  # fmt: skip
store_app = typer.Typer(no_args_is_help=True, help="Look after the artifacts: everything that was built, trained and answered.")
train_app = typer.Typer(no_args_is_help=True, help="Train one arm of a profile by hand.")
app.add_typer(store_app, name="store")
app.add_typer(cli_data.data_app, name="data")
app.add_typer(cli_data.annotate_app, name="annotate")
app.add_typer(train_app, name="train")

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
    except (schema.ConfigError, schema.ServerError, store.StoreError, FileNotFoundError, ValueError) as err:
        print(f"error: {err}", file=sys.stderr)
        sys.exit(2)
    except Exception as err:
        if not hasattr(err, "show"):
            raise
        err.show()  # Typer's own errors: a wrong option, a missing argument
        sys.exit(err.exit_code)


@app.command()
def doctor(profile: ProfileOption = "laptop") -> None:
    """What this machine can do, which profiles there are, and what is at hand."""
    import shutil

    import psutil

    from ultramed import models
    from ultramed.data.sources import data_root

    place = models.placement()
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
    config.load_profile(profile)


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
    cluster: ClusterOption = "",
    sbatch: SbatchOption = [],  # noqa: B006
    wait: WaitOption = False,
) -> None:
    """Run the notebooks with papermill and write figures/<profile>/."""
    from ultramed import batch

    if cluster:
        from ultramed import cluster as on

        config.load_profile(profile, overrides)
        names = [p.stem.split("_")[0] for p in batch.notebooks(numbers or [])]
        more = ["--profile", profile, *(f"--set={o}" for o in overrides), *(["--force"] if force else [])]
        tasks = [on.command("run", n, *more, "--no-report") for n in names if n != batch.LAST]
        last = on.command("run", batch.LAST, *more) if batch.LAST in names else on.command("report", "--profile", profile)
        place = batch.folder(profile) / "cluster"
        if not on.submit(
            f"ultramed-{profile}", tasks, last, where=cluster, folder=place, options=sbatch, wait=wait, console=console
        ):
            raise typer.Exit(1)
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
    from ultramed.sweep import read_sweep, run_point, run_sweep

    if only >= 0:
        run_point(file, only, console)
        return
    if cluster:
        from ultramed import batch
        from ultramed import cluster as on

        found, points = read_sweep(file)
        tasks = [on.command("sweep", file.resolve(), "--only", number) for number in range(len(points))]
        last, place = on.command("sweep", file.resolve()), batch.folder(found.profile) / "cluster"
        if not on.submit(
            f"sweep-{file.stem}", tasks, last, where=cluster, folder=place, options=sbatch, wait=wait, console=console
        ):
            raise typer.Exit(1)
        return
    if not run_sweep(file, console):
        raise typer.Exit(1)


@app.command()
def report(profile: ProfileOption = "laptop") -> None:
    """Build figures/<profile>/index.html from what has run."""
    from ultramed.report.site import write_report

    console.print(str(write_report(profile)), highlight=False, soft_wrap=True)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Option(help="Artifact key, local folder, hub id, or bundled:smollm2-135m.")],
    questions: Annotated[Path, typer.Option(help="JSONL or Parquet of question rows: question, options {A: ...}, gold.")],
    out: Annotated[Path, typer.Option(help="Folder for answers.jsonl and results.json.")],
    protocol: Annotated[str, typer.Option(help="likelihood, greedy or medalpaca.")] = "likelihood",
    answer_form: Annotated[str, typer.Option(help="content_first ('text (B)') or letter_first ('B: text').")] = "letter_first",
    template: Annotated[
        str, typer.Option(help="chat, alpaca or medalpaca; likelihood uses the harness's plain prompt.")
    ] = "chat",
    limit: Annotated[int, typer.Option(help="Only the first questions; 0 for all.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    overrides: Annotated[list[str], typer.Option("--set", "-s", help="More of EvalConfig: --set max_new_tokens=64.")] = [],  # noqa: B006
) -> None:
    """Ask a model your own questions. Ctrl-C and run again: answered questions are not asked twice."""
    import shutil

    from ultramed import models
    from ultramed.data.sources import own
    from ultramed.evaluate import stats
    from ultramed.evaluate.accuracy import answers, read_answers
    from ultramed.notebook import quiet
    from ultramed.prompts import TEMPLATES

    quiet()
    config.known(template, TEMPLATES, "templates")
    data = {"protocol": protocol, "answer_form": answer_form, "likelihood_prompt": "lm_eval"}
    for text in overrides:
        data = config.apply_override(data, *config.parse_override(text))
    setting = config.validate(schema.EvalConfig, data, "eval")
    asked = own(questions, "questions", limit=limit)
    art = answers(setting, model=models.resolve(model), questions=asked, template=template, dtype=dtype)
    frame = read_answers(art)
    e = stats.wilson(frame.correct)
    m = art.metrics
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(art / "answers.jsonl", out / "answers.jsonl")
    store.write_json(
        out / "results.json", {**m, "interval": [e.low, e.high], "artifact": f"answers/{art.key}", "config": setting}
    )
    if m["unparsed"]:
        console.print(f"unparsed      {m['unparsed']} of {m['n']} (counted as wrong; see `rule` in answers.jsonl)")
    for subset, part in frame.groupby("subset"):
        console.print(f"{subset:<13} {stats.wilson(part.correct)} n = {len(part)}", highlight=False)
    console.print(f"[bold]accuracy      {e}[/] n = {e.n}, {m['protocol']}, {m['dtype']}", highlight=False)
    console.print(f"answers       {out / 'answers.jsonl'}", highlight=False, soft_wrap=True)


@app.command()
def reward(
    model: Annotated[str, typer.Option(help="Reward model: artifact key, local folder or hub id with one output.")],
    pairs: Annotated[Path, typer.Option(help="JSONL or Parquet of pairs: prompt, chosen, rejected (texts or messages).")],
    out: Annotated[Path, typer.Option(help="Folder for scores.jsonl and results.json (RewardBench's shape).")],
    template: Annotated[str, typer.Option(help="chat, alpaca or medalpaca.")] = "chat",
) -> None:
    """Score pairs with a reward model. Ctrl-C and run again: scored pairs are not scored twice."""
    from ultramed import models
    from ultramed.data.rows import read_pairs
    from ultramed.evaluate import reward_bench
    from ultramed.notebook import quiet
    from ultramed.prompts import TEMPLATES

    quiet()
    config.known(template, TEMPLATES, "templates")
    rows, found = read_pairs(pairs), models.resolve(model)
    given = {"model": f"{found.stage}/{found.key}", "pairs": store.sha256(pairs), "template": template}
    out.mkdir(parents=True, exist_ok=True)
    if (out / "given.json").exists() and json.loads((out / "given.json").read_text()) != given:
        raise schema.ConfigError(f"{out} holds scores of another model, file or template; give another --out, or remove it")
    store.write_json(out / "given.json", given)
    reward_bench.score_pairs(found, rows, out / "scores.jsonl", TEMPLATES[template])
    frame = reward_bench.read_scores(out)
    store.write_json(out / "results.json", reward_bench.rewardbench_result(frame, given["model"]))
    for row in reward_bench.table(frame).itertuples():
        interval = "" if row.subset == "average" else f"[{100 * row.low:.1f}, {100 * row.high:.1f}]"
        console.print(f"{row.subset:<13} {100 * row.accuracy:.1f} {interval} n = {row.n}", highlight=False)
    console.print(f"scores        {out / 'scores.jsonl'}", highlight=False, soft_wrap=True)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Artifact key (`ultramed store ls sft`), or its beginning.")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
    merge: Annotated[bool, typer.Option("--merge", help="Put an adapter into its base; checked that the logits stay.")] = False,
    push: Annotated[str, typer.Option("--push", help="Hub id to publish it as (private); nothing is sent without it.")] = "",
) -> None:
    """A model for others: safetensors, tokenizer, chat template, model card, results, lineage."""
    from ultramed.notebook import quiet
    from ultramed.report import export as exporting

    quiet()
    made = exporting.export(store.find(model), out, merge=merge)
    console.print(f"{out}: {', '.join(made['files'])} ({made['bytes'] / 1e6:.0f} MB)", highlight=False, soft_wrap=True)
    if push:
        console.print(exporting.push(out, push))


@app.command()
def chat(
    model: Annotated[
        str, typer.Argument(help="Artifact key, local folder, hub id, or bundled:smollm2-135m.")
    ] = "bundled:smollm2-135m",
    max_new_tokens: Annotated[int, typer.Option(help="Longest reply, in tokens.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
) -> None:
    """Talk to a model in the terminal. It runs here; nothing leaves the machine. Not medical advice."""
    from transformers import TextStreamer

    from ultramed import models
    from ultramed.notebook import quiet

    quiet()
    art = models.resolve(model)
    tokenizer, net = models.load_tokenizer(art), models.load(art)
    console.print("[dim]Empty line or Ctrl-D ends. Research software: no medical advice.[/]")
    turns: list[dict] = []
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    while True:
        try:
            text = console.input("[bold cyan]you[/] ").strip()
        except EOFError:
            text = ""
        if not text:
            return
        turns.append({"role": "user", "content": text})
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True).to(
            net.device
        )
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 0.9} if temperature else {"do_sample": False}
        made = net.generate(
            **ids, max_new_tokens=max_new_tokens, streamer=streamer, pad_token_id=tokenizer.pad_token_id, **sampling
        )
        reply = tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        turns.append({"role": "assistant", "content": reply})


@train_app.command("sft")
def train_sft(
    arm: Annotated[str, typer.Option(help="An arm of the profile's usmle section: full, lora, lora_8bit, ...")] = "full",
    profile: ProfileOption = "laptop",
    seed: Annotated[int, typer.Option(help="Rows, order and adapter initialisation.")] = 0,
    overrides: SetOption = [],  # noqa: B006
) -> None:
    """Supervised fine-tuning of one arm on the profile's first model. Ctrl-C saves a checkpoint; run again to go on."""
    from ultramed.notebook import quiet
    from ultramed.usmle import Bench

    quiet()
    resolved = config.load_profile(profile, overrides)
    art = Bench.of(resolved, resolved.models[0]).train(arm, seed=seed)
    console.print_json(json.dumps(art.metrics))
    console.print(f"model: sft/{art.key}  (ultramed chat sft/{art.key})", highlight=False)


def _suite(profile: str, overrides: list[str]):
    from ultramed.notebook import quiet
    from ultramed.ultramedical import Suite

    quiet()
    return Suite.of(config.load_profile(profile, overrides))


@train_app.command("preference")
def train_preference(
    arm: Annotated[str, typer.Option(help="An arm of ultramedical.preference_arms: dpo, kto, ...")] = "dpo",
    mix: Annotated[str, typer.Option(help="The SFT policy to start from: a name of ultramedical.mixtures.")] = "ultramix",
    profile: ProfileOption = "laptop",
    overrides: SetOption = [],  # noqa: B006
) -> None:
    """Preference learning from an SFT policy, with everything it needs: policies, candidates, feedback, pairs."""
    art = _suite(profile, overrides).prefer(mix, arm)
    console.print_json(json.dumps(art.metrics))
    console.print(f"model: preference/{art.key}  (ultramed chat preference/{art.key})", highlight=False)


@train_app.command("reward")
def train_reward(
    arm: Annotated[str, typer.Option(help="An arm of ultramedical.reward_arms: medical, general, mixed.")] = "medical",
    profile: ProfileOption = "laptop",
    overrides: SetOption = [],  # noqa: B006
) -> None:
    """A Bradley-Terry reward model, with everything it needs: policies, candidates, feedback, pairs."""
    art = _suite(profile, overrides).reward(arm)
    console.print_json(json.dumps(art.metrics))
    console.print(
        f"model: reward/{art.key}  (ultramed reward --model reward/{art.key} --pairs FILE --out DIR)", highlight=False
    )


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
