"""Tokens are made once, by one process or several, and read in place."""

import json
import subprocess
import sys
import time

import psutil
import pytest
from datasets import Dataset
from handmade import given

from ultramed.core.errors import ConfigError
from ultramed.core.schema import TokenConfig, TrainConfig
from ultramed.data.rows import read_instructions
from ultramed.experiments.medalpaca import arm_config
from ultramed.lm.templates import TEMPLATES
from ultramed.lm.tokens import TemplateError
from ultramed.train import token_rows as module
from ultramed.train.token_rows import encode_instructions, read_tokens, token_rows, tokenizer_of

CONFIG = TokenConfig(kind="instructions", max_length=72)


@pytest.fixture(scope="module")
def mixture(medalpaca):
    return medalpaca.training_rows(arm_config(medalpaca.profile, "full"))


def test_an_artifact_holds_what_its_rows_are_as_tokens(medalpaca, mixture, tokenizer):
    made = token_rows(CONFIG, model=medalpaca.base, data=mixture, template="chat")
    rows = read_instructions(mixture / "rows.parquet")
    want = encode_instructions(rows, tokenizer, TEMPLATES["chat"], CONFIG.max_length)
    assert read_tokens(made).to_list() == want
    assert 0 < len(want) < len(rows)
    m = made.metrics
    assert (m["rows"], m["dropped"]) == (len(want), len(rows) - len(want))
    assert m["tokens"] == sum(len(row["input_ids"]) for row in want)
    assert m["completion_tokens"] == m["tokens"] - sum(row["prompt_length"] for row in want)
    assert m["truncated"] == sum(row["truncated"] for row in want) > 0
    assert m["longest"] == 72


def test_several_processes_make_the_same(medalpaca, mixture, monkeypatch, fresh_store):
    one = read_tokens(token_rows(CONFIG, model=medalpaca.base, data=mixture, template="chat")).to_list()
    monkeypatch.setenv("ULTRAMED_STORE", str(fresh_store) + "2")
    monkeypatch.setattr(module, "PART", 10)
    monkeypatch.setattr(module, "cores", lambda: 3)
    made = token_rows(CONFIG, model=medalpaca.base, data=mixture, template="chat")
    assert read_tokens(made).to_list() == one
    assert not (made / ".scratch").exists()
    for file in (made / "tokens").glob("*.json"):
        assert str(fresh_store) not in file.read_text(), "no path of this machine"


def test_processes_end_with_the_one_that_started_them(tmp_path):
    """kill -9 while the parts are tokenised: nobody is left."""
    script = (
        "import os, time\nfrom concurrent.futures import ProcessPoolExecutor\nfrom multiprocessing import get_context\n"
        "from ultramed.core.signals import end_with_parent\n"
        "if __name__ == '__main__':\n"
        "    pool = ProcessPoolExecutor(2, get_context('spawn'), initializer=end_with_parent)\n"
        "    print([pool.submit(os.getpid).result() for _ in range(4)], flush=True)\n"
        "    [pool.submit(time.sleep, 60) for _ in range(2)]\n    time.sleep(60)\n"
    )
    (tmp_path / "s.py").write_text(script)
    parent = subprocess.Popen([sys.executable, tmp_path / "s.py"], stdout=subprocess.PIPE, text=True)
    workers = set(json.loads(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    gone = time.monotonic() + 10
    while any(map(psutil.pid_exists, workers)) and time.monotonic() < gone:
        time.sleep(0.1)
    assert not any(map(psutil.pid_exists, workers))


def test_what_was_trained_from_a_base_shares_its_tokens(medalpaca):
    full, lora = medalpaca.train_arm("full"), medalpaca.train_arm("lora")
    assert tokenizer_of(full) == tokenizer_of(lora) == tokenizer_of(medalpaca.base) == medalpaca.base


def test_nothing_that_fits_and_malformed_rows_are_errors(medalpaca, mixture):
    with pytest.raises(ConfigError, match=r"none of [0-9]+ instructions fits into max_length 8"):
        token_rows(TokenConfig(kind="instructions", max_length=8), model=medalpaca.base, data=mixture, template="chat")
    with pytest.raises(TemplateError, match="doubled role header"):
        token_rows(CONFIG, model=medalpaca.base, data=mixture, template="ultramedical_released")


# ------------------------------------------------------------------------------------------------------------- packing


@pytest.fixture
def three(fresh_store):
    """An artifact of three made-up rows."""
    texts = [("Where is the heart?", "In the chest."), ("And the liver?", "Below the ribs, on the right."), ("Hm?", "Yes.")]
    rows = [
        {
            "id": str(n),
            "source": "t",
            "prompt": [{"role": "user", "content": asked}],
            "completion": [{"role": "assistant", "content": said}],
        }
        for n, (asked, said) in enumerate(texts)
    ]
    return given(None, rows=rows, side="rows")


def test_packed_rows_are_the_same_tokens_cut_every_so_many(medalpaca, three, tokenizer):
    made = token_rows(
        TokenConfig(kind="instructions", max_length=20, packing=True), model=medalpaca.base, data=three, template="chat"
    )
    chat, want = TEMPLATES["chat"], []
    for row in read_instructions(three / "rows.parquet"):
        text = chat.render(row["prompt"], tokenizer) + chat.finish(row["completion"][0]["content"], tokenizer)
        want += tokenizer(text, add_special_tokens=False)["input_ids"]
    blocks = read_tokens(made).to_list()
    assert [block["input_ids"] for block in blocks] == [want[k : k + 20] for k in range(0, len(want), 20)]
    assert want.count(tokenizer.eos_token_id) >= 3, "each row ends with its end token"
    assert {block["prompt_length"] for block in blocks} == {0}, "the loss is on every token"
    assert [block["length"] for block in blocks[:-1]] == [20] * (len(blocks) - 1)
    m = made.metrics
    assert (m["rows"], m["documents"], m["dropped"], m["truncated"]) == (len(blocks), 3, 0, 0)
    assert m["tokens"] == len(want)
    assert m["longest"] == 20
    alone = token_rows(TokenConfig(kind="instructions", max_length=20), model=medalpaca.base, data=three, template="chat")
    assert alone.metrics["truncated"] > 0, "unpacked, what is too long is cut off"


def test_packing_goes_on_over_batches(tmp_path):
    rows = Dataset.from_dict({"input_ids": [[n] * 3 for n in range(1, 2500)]})
    blocks = Dataset.from_file(module._packed(rows, 7, str(tmp_path / "x.arrow")))["input_ids"]
    flat = [n for n in range(1, 2500) for _ in range(3)]
    assert list(blocks) == [flat[k : k + 7] for k in range(0, len(flat), 7)]


def test_packing_needs_a_loss_on_every_token():
    with pytest.raises(ValueError, match="needs train_on_inputs"):
        TrainConfig(mixture={"x": 1}, learning_rate=1, packing=True)
