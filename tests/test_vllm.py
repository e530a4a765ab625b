"""The engine that starts vLLM: here `transformers serve` stands behind the same command. And models that no one device
holds."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from ultramed.core import store
from ultramed.core.errors import ConfigError, ServerError
from ultramed.core.schema import EvalConfig, SampleConfig
from ultramed.evaluate.accuracy import answers, read_answers
from ultramed.evaluate.engine import Local, open_engine
from ultramed.evaluate.generate import Sampling
from ultramed.evaluate.likelihood import score
from ultramed.evaluate.sample import read_samples, samples
from ultramed.evaluate.vllm import ENVIRONMENT, Vllm, command
from ultramed.lm import models
from ultramed.lm.architecture import plain_length
from ultramed.lm.templates import TEMPLATES
from ultramed.train import crew

SELECT = {"step1": [0, 6], "step2": [0, 6]}
STANDS_IN = f"""#!{sys.executable}
import json, os, pathlib, sys, tempfile
verb, folder, *rest = sys.argv[1:]
given = dict(zip(rest[::2], rest[1::2], strict=True))
pathlib.Path(__file__).with_name("given.json").write_text(json.dumps([verb, folder, given]))
os.chdir(tempfile.mkdtemp())
name = given["--served-model-name"]
os.symlink(folder, name)
same = [word for key in ("--host", "--port", "--dtype") for word in (key, given[key])]
os.execv(sys.executable, [sys.executable, "-m", "transformers.cli.transformers", verb, name, "--device", "cpu", *same])
"""


def program(folder, text):
    """An environment with bin/vllm."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "vllm").write_text(text)
    (folder / "bin" / "vllm").chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    pytest.importorskip("uvicorn", reason="needs transformers[serving]")
    folder = program(tmp_path_factory.mktemp("vllm"), STANDS_IN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENVIRONMENT, str(folder))
        patch.setenv("HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
        yield folder


@pytest.fixture(scope="module")
def adapter(medalpaca):
    return medalpaca.train_arm("lora", learning_rate=1e-2)


def servers() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        if process.is_running() and "transformers.cli.transformers" in process.cmdline():
            found.append(process)
    return found


def test_answers_and_samples_are_those_of_the_weights(environment, adapter, exam):
    asked = {"model": adapter, "questions": exam, "select": SELECT, "dtype": "float32"}
    setting = EvalConfig(max_new_tokens=8, engine="vllm", tensor_parallel=2)
    made = answers(setting, **asked)
    theirs, ours = (read_answers(a).set_index("id") for a in (made, answers(EvalConfig(max_new_tokens=8), **asked)))
    assert theirs.loc[ours.index].reply.tolist() == ours.reply.tolist()
    assert theirs.loc[ours.index].prompt_hash.tolist() == ours.prompt_hash.tolist()
    assert len(set(ours.reply)) > 1
    assert made.metrics["compared_with_transformers"] == {"prompts": 4, "same": 4}
    assert sorted(p.name for p in made.path.iterdir()) == ["answers.jsonl", "checked.jsonl", "manifest.json", "requests.jsonl"]
    assert not servers()
    verb, folder, given = json.loads((environment / "bin" / "given.json").read_text())
    (plain,) = [a for a in store.artifacts() if a.stage == "plain_model"]
    assert (verb, folder) == ("serve", str(plain.path))
    assert given.pop("--port").isdigit()
    assert given == {
        "--host": "127.0.0.1",
        "--served-model-name": f"sft-{adapter.key}",
        "--tensor-parallel-size": "2",
        "--dtype": "float32",
    }
    assert answers(setting.model_copy(update={"tensor_parallel": 0}), **asked).key == made.key, (
        "how many share it is no part of it"
    )

    config = SampleConfig(n=2, max_new_tokens=6, engine="vllm")
    drawn = samples(config, **{**asked, "select": {"step1": [0, 3]}})
    assert [len(row["replies"]) for row in read_samples(drawn)] == [2, 2, 2]
    assert [a.key for a in store.artifacts() if a.stage == "plain_model"] == [plain.key], "made once"


def test_what_it_cannot_do(environment, medalpaca, exam, monkeypatch, tmp_path):
    for protocol in ("likelihood", "medalpaca"):
        with pytest.raises(ConfigError, match="needs the weights, and engine vllm gives replies only"):
            answers(EvalConfig(protocol=protocol, engine="vllm"), model=medalpaca.base, questions=exam, select=SELECT)
    with pytest.raises(ConfigError, match="quantize '8bit' needs engine transformers"):
        open_engine(medalpaca.base, TEMPLATES["chat"], tmp_path, budget=4096, quantize="8bit", engine="vllm")
    for where in (str(tmp_path), "/nowhere/vllm", "no-such-program --flag"):
        monkeypatch.setenv(ENVIRONMENT, where)
        with pytest.raises(ConfigError, match=r"environment-vllm\.yml"):
            command()
    monkeypatch.setenv(ENVIRONMENT, f"{sys.executable} -m vllm")
    assert command() == [sys.executable, "-m", "vllm"]


@pytest.mark.parametrize(("does", "told"), [("exit 3", "ended with status 3"), ("kill -9 $PPID; sleep 86317", "")])
def test_a_server_that_ends_by_itself_is_told_at_once(medalpaca, exam, fresh_store, monkeypatch, tmp_path, does, told):
    """Also if it is the guard that was killed: nothing is left of either."""
    monkeypatch.setenv(
        ENVIRONMENT, str(program(tmp_path / "env", f"#!/bin/sh\nsleep 86317 &\necho 'no GPU for you'\n{does}\n"))
    )
    model = models.base_model(medalpaca.config)
    with pytest.raises(ServerError, match=rf"vLLM has ended by itself(.|\n)*no GPU for you\n?{told}$"):
        answers(EvalConfig(engine="vllm"), model=model, questions=exam, select=SELECT)
    (folder,) = fresh_store.glob("answers/.work-*")
    assert sorted(p.name for p in folder.iterdir()) == ["answers.jsonl", "launch.log"]
    time.sleep(0.2)  # until what was killed is gone
    assert not [p for p in psutil.process_iter() if p.status() != "zombie" and p.cmdline() == ["sleep", "86317"]]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_it_ends_with_the_process_that_started_it(environment, fresh_store, tmp_path, how):
    questions = tmp_path / "mine.jsonl"
    given = {"question": "Which vitamin prevents scurvy?", "options": {"A": "A", "B": "C"}, "gold": "B"}
    questions.write_text("".join(json.dumps({**given, "id": f"q{i}", "question": f"{i}?"}) + "\n" for i in range(2000)))
    line = [
        sys.executable,
        "-m",
        "ultramed",
        "eval",
        "--model",
        "tiny:llama",
        "--questions",
        questions,
        "--out",
        tmp_path / "o",
    ]
    line += ["--protocol", "greedy", "--engine", "vllm", "--set", "max_new_tokens=64"]
    quiet = {"stderr": subprocess.DEVNULL, "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = subprocess.Popen(list(map(str, line)), env=os.environ, start_new_session=True, stdout=subprocess.DEVNULL, **quiet)
    deadline = time.monotonic() + 120
    while not [p for p in fresh_store.glob("answers/.work-*/requests.jsonl") if p.stat().st_size > 2000]:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    assert any("transformers.cli.transformers" in p.cmdline() for p in family)
    os.kill(process.pid, how)
    assert process.wait(60) == {signal.SIGKILL: -9, signal.SIGINT: 130}[how]
    assert not psutil.wait_procs(family, timeout=60)[1]
    (work,) = fresh_store.glob("answers/.work-*")
    assert (work / ".launch").exists() == (how == signal.SIGKILL), "cleared by the next attempt"


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_served_prompt_is_the_trained_one_token_for_token(environment, adapter, tmp_path, name):
    engine = Vllm(adapter, TEMPLATES[name], tmp_path, torch.float32)
    for messages in (
        [{"role": "user", "content": 'Which "organ"\nhears?'}],
        [{"role": "system", "content": "Answer: text (letter)."}, {"role": "user", "content": "Which organ hears?\nA. ear"}],
    ):
        ours = engine.tokenizer(engine.shown(messages), add_special_tokens=False)["input_ids"]
        served = engine.served.apply_chat_template(engine.asked(messages), add_generation_prompt=True, return_dict=True)
        assert served["input_ids"] == ours
    assert engine.served.eos_token_id in json.loads((engine.folder / "generation_config.json").read_text())["eos_token_id"]


def test_a_template_that_takes_no_system_turn(environment, adapter, tmp_path):
    """As Gemma's: the system's text stands before the user's, here and in what is sent."""
    engine = Vllm(adapter, TEMPLATES["chat"], tmp_path, torch.float32)
    strict = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}<{{ m.content }}>{% endfor %}"
    engine.tokenizer.chat_template = engine.served.chat_template = strict
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert engine.asked(messages) == [{"role": "user", "content": "Be brief.\n\nWhy?"}]
    engine.served.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ConfigError, match="template chat cannot be said as a chat template"):
        engine.asked(messages)


def test_which_models_are_laid_out_over_devices(medalpaca, monkeypatch):
    """A 70B in 16 bits is 140 GB, with a fifth more for the rest 168; an 8B is 16 and 19.2."""
    gb = 10**9
    sizes = {"8b": 8, "70b": 70}
    monkeypatch.setattr(models, "parameters", lambda name: sizes[name] * gb)
    assert models.weight_bytes("70b", torch.bfloat16) == 140 * gb
    assert models.weight_bytes("70b", torch.float32) == 280 * gb
    assert models.weight_bytes("70b", torch.bfloat16, "8bit") == 70 * gb
    assert models.weight_bytes("70b", torch.bfloat16, "4bit") == 35 * gb
    cases = {
        ("8b", None, (80, 80)): False,
        ("8b", None, (24, 24)): False,
        ("8b", None, (24, 19)): True,
        ("70b", None, (80,) * 8): True,
        ("70b", None, (80,)): False,  # nowhere to go
        ("70b", None, ()): False,
        ("70b", "8bit", (80, 80)): True,  # 84
        ("70b", "4bit", (80, 80)): False,  # 42
    }
    for (name, quantize, memory), wanted in cases.items():
        monkeypatch.setattr(models, "device_memory", lambda memory=memory: [gb * m for m in memory])
        assert models.spreads(name, torch.bfloat16, quantize) is wanted, (name, quantize, memory)


def test_such_a_model_is_asked_by_one_process(medalpaca, monkeypatch, tmp_path):
    monkeypatch.setattr(models, "device_memory", lambda: [10**5, 10**5])  # the tiny model has 200,000 parameters
    monkeypatch.setattr(crew, "hands", lambda items: items)
    real, given = AutoModelForCausalLM.from_pretrained, []
    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_pretrained",
        lambda *names, **how: given.append(how.get("device_map")) or real(*names, **how),
    )
    asked = {"budget": 4096, "dtype": torch.float32, "items": 50}
    engine = open_engine(medalpaca.base, TEMPLATES["chat"], tmp_path, **asked)
    assert not isinstance(engine.net, crew.Crew)
    assert given == ["auto"]


def test_layers_on_several_devices_are_left_to_transformers(medalpaca, tokenizer):
    net = models.load(medalpaca.base, dtype=torch.float32)
    items = [([5, 6, 7, 8], [[9], [10, 11]]), ([5, 6], [[12, 13], [9]])]
    conversations, together, apart = [[{"role": "user", "content": t}] for t in ("Why?", "What is it?")], {}, {}
    sums = score(net, tokenizer, items)
    local = Local(net, tokenizer, TEMPLATES["chat"], 4096)
    local.replies(conversations, Sampling(8), lambda batch, made: together.update(zip(batch, made, strict=True)))
    net.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    assert plain_length(net) == 0
    for whole, alone in zip(sums, score(net, tokenizer, items), strict=True):
        assert alone == pytest.approx(whole, abs=1e-4)
    local.replies(conversations, Sampling(8), lambda batch, made: apart.update(zip(batch, made, strict=True)))
    assert apart == together
