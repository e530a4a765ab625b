"""Command line of models: ask one, score pairs with one, talk to one, take one out of the store."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, get_args

import typer

from ultramed.cli.common import EngineOption, MapOption, PairMapOption, ProcessesOption, console
from ultramed.core import config, schema, store
from ultramed.core.errors import ConfigError

models_app = typer.Typer(pretty_exceptions_enable=False)


def _template(name: str) -> dict[str, str]:
    """The option `template` of a stage, or nothing, for the model's own. Raises ConfigError for an unknown one."""
    from ultramed.lm.templates import TEMPLATES

    if name:
        config.known(name, TEMPLATES, "templates")
    return {"template": name} if name else {}


@models_app.command("eval")
def evaluate(
    model: Annotated[str, typer.Option(help="Artifact key, local folder, hub id, or bundled:smollm2-135m.")],
    questions: Annotated[
        Path, typer.Option(help="Questions with options and answer: JSON, CSV, TSV or Parquet, as most sets come.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for answers.jsonl and results.json.")],
    protocol: Annotated[
        str, typer.Option(help="likelihood, greedy, ultramedical (0-shot chain of thought) or medalpaca (five tries).")
    ] = "likelihood",
    answer_form: Annotated[
        str,
        typer.Option(
            help="letter_first ('B: text'), content_first ('text (B)'), reasoned or medalpaca; the protocol's own if not given."
        ),
    ] = "",
    template: Annotated[
        str,
        typer.Option(
            help="chat, alpaca or medalpaca; the model's own if not given. Likelihood uses the harness's plain prompt."
        ),
    ] = "",
    limit: Annotated[int, typer.Option(help="Only the first questions; 0 for all.")] = 0,
    columns: MapOption = [],  # noqa: B006
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    engine: EngineOption = "transformers",
    overrides: Annotated[list[str], typer.Option("--set", "-s", help="More of EvalConfig: --set max_new_tokens=64.")] = [],  # noqa: B006
    processes: ProcessesOption = 0,
) -> None:
    """Ask a model your own questions. Ctrl-C and run again: answered questions are not asked twice."""
    import shutil

    from ultramed.core.log import quiet_libraries
    from ultramed.data.columns import parse_map
    from ultramed.data.sources import user_file
    from ultramed.evaluate import stats
    from ultramed.evaluate.accuracy import answers, read_answers
    from ultramed.lm import models

    quiet_libraries()
    config.known(dtype, get_args(schema.Dtype), "--dtype")
    given_template = _template(template)
    config.known(protocol, schema.ASKED, "protocols")
    data = {"protocol": protocol, "engine": engine, **schema.ASKED[protocol]}
    data |= {"answer_form": answer_form} if answer_form else {}
    setting = config.validate(schema.EvalConfig, config.overridden(data, overrides), "eval")
    asked = user_file(questions, "questions", limit=limit, columns=parse_map(columns))
    art = answers(setting, model=models.resolve(model), questions=asked, dtype=dtype, **given_template)
    frame = read_answers(art)
    e = stats.wilson(frame.correct)
    m = art.metrics
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(art / "answers.jsonl", out / "answers.jsonl")
    store.write_json(
        out / "results.json", {**m, "interval": [e.low, e.high], "artifact": f"answers/{art.key}", "config": setting}
    )
    if m.get("too_long"):
        console.print(f"too long      {m['too_long']} questions do not fit into the model's context: not asked, not counted")
    if m["unparsed"]:
        console.print(f"unparsed      {m['unparsed']} of {m['n']} (counted as wrong; see `rule` in answers.jsonl)")
    for subset, part in frame.groupby("subset"):
        console.print(f"{subset:<13} {stats.wilson(part.correct)} n = {len(part)}")
    console.print(f"[bold]accuracy      {e}[/] n = {e.n}, {m['protocol']}, {m['dtype']}")
    console.print(f"answers       {out / 'answers.jsonl'}", soft_wrap=True)


@models_app.command()
def agreement(
    model: Annotated[str, typer.Option(help="Artifact key, local folder, hub id, or bundled:smollm2-135m.")],
    questions: Annotated[
        Path, typer.Option(help="Questions with options and answer: JSON, CSV, TSV or Parquet, as most sets come.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for agreement.csv.")],
    variants: Annotated[
        list[str],
        typer.Option(
            "--with",
            "-w",
            help="Another way to ask: dtype=float32, batch_tokens=256, engine=openvino, quantize=8bit, model=http://host/v1#name "
            "(several with commas; repeatable).",
        ),
    ],
    overrides: Annotated[list[str], typer.Option("--set", "-s", help="Of all of them, e.g. protocol=likelihood.")] = [],  # noqa: B006
    template: Annotated[str, typer.Option(help="chat, alpaca or medalpaca; the model's own if not given.")] = "",
    limit: Annotated[int, typer.Option(help="Only the first questions; 0 for all.")] = 0,
    columns: MapOption = [],  # noqa: B006
) -> None:
    """Ask the same questions by several engines, dtypes, batch sizes: how many answers flip, and does the accuracy move?"""
    from ultramed.core.log import quiet_libraries
    from ultramed.data.columns import parse_map
    from ultramed.data.sources import user_file
    from ultramed.evaluate import agreement as agree
    from ultramed.evaluate.arms import percent
    from ultramed.lm import models

    quiet_libraries()
    given_template = _template(template)
    setting = config.validate(schema.EvalConfig, config.overridden({"answer_form": "letter_first"}, overrides), "eval")
    for text in ["", *variants]:
        agree.settings(setting, text)  # a slip should show before the first question is asked
    given = {
        "model": models.resolve(model),
        "questions": user_file(questions, "questions", limit=limit, columns=parse_map(columns)),
        **given_template,
    }
    table = agree.flips({text or "as it is": agree.ask(setting, text, **given) for text in ["", *variants]})
    out.mkdir(parents=True, exist_ok=True)
    table.to_csv(out / "agreement.csv", index=False)
    changed = table.rename(columns={"low": "_", "high": "_", "changed_low": "low", "changed_high": "high"})
    for row, right, other in zip(table.itertuples(), percent(table), percent(changed, "changed"), strict=True):
        more = f"  changed {other}  lost {row.lost}, won {row.won}, p {row.p:.2g}" if row.Index else ""
        console.print(f"{row.variant:<24} {right} n = {row.n}{more}", soft_wrap=True)


@models_app.command()
def reward(
    model: Annotated[str, typer.Option(help="Reward model: artifact key, local folder or hub id with one output.")],
    pairs: Annotated[
        Path, typer.Option(help="Pairs: prompt, chosen, rejected (texts, messages or lists of them); JSON, CSV or Parquet.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for scores.jsonl and results.json (RewardBench's shape).")],
    template: Annotated[str, typer.Option(help="chat, alpaca or medalpaca; the model's own if not given.")] = "",
    columns: PairMapOption = [],  # noqa: B006
    processes: ProcessesOption = 0,
) -> None:
    """Score pairs with a reward model. Ctrl-C and run again: scored pairs are not scored twice."""
    from ultramed.core.log import quiet_libraries
    from ultramed.data import recognise
    from ultramed.data.columns import parse_map
    from ultramed.evaluate import reward_bench
    from ultramed.lm import models

    quiet_libraries()
    given_template = _template(template)
    rows, found = recognise.read(pairs, "pairs", parse_map(columns, "pairs")), models.resolve(model)
    given = {"model": f"{found.stage}/{found.key}", "pairs": store.sha256(pairs), **given_template}
    out.mkdir(parents=True, exist_ok=True)
    if (out / "given.json").exists() and json.loads((out / "given.json").read_text()) != given:
        raise ConfigError(f"{out} holds scores of another model, file or template; give another --out, or remove it")
    store.write_json(out / "given.json", given)
    reward_bench.score_pairs(found, rows, out / "scores.jsonl", models.reward_template(found, template or None))
    frame = reward_bench.read_scores(out)
    if len(frame) < len(rows):
        console.print(
            f"too long      {len(rows) - len(frame)} of {len(rows)} pairs do not fit into the model's context: not counted"
        )
    store.write_json(out / "results.json", reward_bench.rewardbench_result(frame, given["model"]))
    for row in reward_bench.table(frame).itertuples():
        interval = "" if row.subset == "average" else f"[{100 * row.low:.1f}, {100 * row.high:.1f}]"
        console.print(f"{row.subset:<13} {100 * row.accuracy:.1f} {interval} n = {row.n}")
    console.print(f"scores        {out / 'scores.jsonl'}", soft_wrap=True)


@models_app.command()
def export(
    model: Annotated[str, typer.Argument(help="Artifact key (`ultramed store ls sft`), or its beginning.")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
    merge: Annotated[bool, typer.Option("--merge", help="Put an adapter into its base; checked that the logits stay.")] = False,
    gguf: Annotated[bool, typer.Option("--gguf", help="Also as model.gguf, for llama.cpp, Ollama and OpenVINO.")] = False,
    push: Annotated[str, typer.Option("--push", help="Hub id to publish it as (private); nothing is sent without it.")] = "",
) -> None:
    """A model for others: safetensors, tokenizer, chat template, model card, results, lineage."""
    from ultramed.core.log import quiet_libraries
    from ultramed.report import export as exporting

    quiet_libraries()
    made = exporting.export(store.find(model), out, merge=merge, gguf=gguf)
    console.print(f"{out}: {', '.join(made['files'])} ({made['bytes'] / 1e6:.0f} MB)", soft_wrap=True)
    if push:
        console.print(exporting.push(out, push))


@models_app.command()
def chat(
    model: Annotated[
        str, typer.Argument(help="Artifact key, local folder, hub id, or bundled:smollm2-135m.")
    ] = "bundled:smollm2-135m",
    max_new_tokens: Annotated[int, typer.Option(help="Longest reply, in tokens.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    web: Annotated[bool, typer.Option("--web", help="On a page in the browser, for this machine alone.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the page; 0: any free one.")] = 7860,
) -> None:
    """Talk to a model. It runs here; nothing leaves the machine. Research software: no medical advice."""
    from ultramed.cli.chat import Talker, server
    from ultramed.core.log import quiet_libraries
    from ultramed.lm import models

    quiet_libraries()
    with server(port) if web else nullcontext() as page:  # a port that is taken shows before a model is loaded
        talker = Talker(models.resolve(model), max_new_tokens, temperature)
        if page:
            page.talker = talker
            console.print(f"http://127.0.0.1:{page.server_address[1]}  ({talker.name}; Ctrl-C ends)")
            page.serve_forever()
    console.print("[dim]Empty line or Ctrl-D ends. Research software: no medical advice.[/]")
    turns: list[dict] = []
    while True:
        try:
            text = console.input("[bold cyan]you[/] ").strip()
        except EOFError:
            text = ""
        if not text:
            return
        turns.append({"role": "user", "content": text})
        pieces = []
        try:
            for piece in talker.reply(turns):
                pieces.append(piece)
                console.print(piece, end="", markup=False, soft_wrap=True)
        except ConfigError as err:  # too long a message is no end of the conversation
            console.print(f"[red]{err}[/]")
            turns.pop()
            continue
        console.print()
        turns.append({"role": "assistant", "content": "".join(pieces)})
