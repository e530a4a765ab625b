"""Flips between ways of asking, by hand; engines that give the answers of transformers; GGUF files that are the same model."""

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ultramed.core.errors import ConfigError
from ultramed.core.schema import EvalConfig, SampleConfig
from ultramed.data.messages import question_prompt
from ultramed.data.rows import read_questions
from ultramed.evaluate import agreement
from ultramed.evaluate.engine import Local, load, open_engine, weights
from ultramed.evaluate.generate import Sampling, item_rng
from ultramed.evaluate.sample import read_samples, samples
from ultramed.lm import models
from ultramed.lm.gguf import write_gguf
from ultramed.lm.templates import TEMPLATES
from ultramed.report.export import export

SELECT = {"step1": [0, 20], "step2": [0, 20]}


def frame(letters: str, gold: str) -> pd.DataFrame:
    """'-' is an answer that could not be read."""
    return pd.DataFrame(
        {
            "id": range(len(gold)),
            "letter": [None if x == "-" else x for x in letters],
            "correct": [x == g for x, g in zip(letters, gold, strict=True)],
        }
    )


def test_flips_by_hand():
    gold = "ABCDABCDAB"
    table = agreement.flips({"one": frame("ABCDABCD--", gold), "two": frame("ABCDACDC-A", gold)}).set_index("variant")
    assert table.loc["one", ["accuracy", "changed", "lost", "won", "p"]].tolist() == [0.8, 0.0, 0, 0, 1.0]
    # B to C, C to D and D to C lose; an unread answer that is read now is another answer, though still wrong; '-' stays '-'
    assert table.loc["two", ["accuracy", "changed", "lost", "won", "p"]].tolist() == [0.5, 0.4, 3, 0, 0.25]
    assert table.loc["two", "changed_low"] < 0.4 < table.loc["two", "changed_high"]
    with pytest.raises(ValueError, match="answers to 9 of the 10 questions"):
        agreement.flips({"one": frame("ABCDABCD--", gold), "two": frame("ABCDABCD-", gold[:9])})


@pytest.mark.parametrize(
    "text",
    [
        "dtype",
        "dtype=",
        "float32",
        "dtyp=float32",
        "dtype=flot32",
        "batch_tokens=12",
        "quantize=3bit",
        "engine=openvino,protocol=likelihood",
        "engine=openvino,quantize=8bit",
    ],
)
def test_variants_that_mean_nothing(text):
    with pytest.raises(ConfigError):
        agreement.settings(EvalConfig(), text)


def test_batch_sizes_and_engines_agree_on_the_tiny_model(medalpaca, exam):
    config = EvalConfig(max_new_tokens=6)
    given = {
        "model": medalpaca.train_arm("full", learning_rate=1e-2, epochs=4),
        "questions": exam,
        "select": SELECT,
        "dtype": "float32",
    }
    ways = ["", "batch_tokens=64", "engine=openvino"]
    table = agreement.flips({way or "as it is": agreement.ask(config, way, **given) for way in ways})
    assert table.n.tolist() == [40, 40, 40]
    assert table.changed.tolist() == [0, 0, 0]


@pytest.fixture(scope="module")
def asked(exam):
    rows = read_questions(exam / "test.parquet")[:12]
    return [question_prompt(row, "content_first") for row in rows]


def told(engine, conversations, sampling, rngs=None) -> list:
    made = {}
    engine.replies(conversations, sampling, lambda batch, replies: made.update(zip(batch, replies, strict=True)), rngs)
    return [made[i] for i in range(len(conversations))]


def test_openvino_says_what_transformers_says(medalpaca, asked, tmp_path):
    pytest.importorskip("openvino_genai")
    template = TEMPLATES["chat"]
    ours = Local(*load(medalpaca.base, "float32", None), template, 4096)
    theirs = open_engine(medalpaca.base, template, tmp_path, budget=4096, dtype=torch.float32, engine="openvino")
    assert list(tmp_path.iterdir()) == []
    sampling = Sampling(12)
    one, two = told(ours, asked, sampling), told(theirs, asked, sampling)
    assert [r.text for r in one] == [r.text for r in two]
    assert [r.tokens for r in one] == [r.tokens for r in two]
    with pytest.raises(ConfigError, match="needs the weights, and engine openvino"):
        weights(theirs, "a likelihood")
    with pytest.raises(ConfigError, match="needs engine transformers"):
        open_engine(medalpaca.base, template, tmp_path, budget=4096, quantize="8bit", engine="openvino")


def test_openvino_samples_from_the_items_own_seeds(medalpaca, asked, tmp_path):
    pytest.importorskip("openvino_genai")
    engine = open_engine(medalpaca.base, TEMPLATES["chat"], tmp_path, budget=4096, dtype=torch.float32, engine="openvino")
    sampling = Sampling(8, temperature=1.0, top_k=0, top_p=0.9)

    def draw(conversations, names):
        return [r.text for r in told(engine, conversations, sampling, [item_rng("x", n) for n in names])]

    whole = draw(asked[:1] * 6 + asked[1:2] * 6, range(12))
    assert len(set(whole[:6])) > 1
    assert draw(asked[:1] * 6, range(6)) == whole[:6], "not on what else is asked"


def test_samples_through_openvino(medalpaca, exam):
    pytest.importorskip("openvino_genai")
    config = SampleConfig(n=3, max_new_tokens=6, engine="openvino")
    rows = read_samples(samples(config, model=medalpaca.base, questions=exam, select={"step1": [0, 4]}))
    assert [len(row["replies"]) for row in rows] == [3] * 4


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_a_gguf_file_is_the_same_model(medalpaca, tmp_path, dtype):
    tokenizer, net = models.load_tokenizer(medalpaca.base), models.load(medalpaca.base, dtype=torch.float32, device="cpu")
    write_gguf(net, tokenizer, tmp_path / "m.gguf", dtype)
    back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    ids = torch.arange(5, 45)[None]
    with torch.inference_mode():
        one, two = (n(input_ids=ids).logits.log_softmax(-1) for n in (net, back))
    assert (one - two).abs().max() < (1e-5 if dtype == "f32" else 5e-3)
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    text = "What is Addison's disease? A: 12.5 mg\n"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.chat_template == tokenizer.chat_template


def test_llama_cpp_says_what_transformers_says(medalpaca, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python compiles llama.cpp")
    policy = medalpaca.train_arm("full", learning_rate=1e-2, epochs=4)
    tokenizer, net = models.load_tokenizer(policy), models.load(policy, dtype=torch.float32, device="cpu")
    write_gguf(net, tokenizer, tmp_path / "m.gguf", "f32")
    llama = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=256, logits_all=True, verbose=False)
    assert llama.metadata["tokenizer.chat_template"] == tokenizer.chat_template
    for question in ("What is Addison's disease?", "Dose: 12.5 mg of \u03b2-blockers\n\n  A. once"):
        text = TEMPLATES["chat"].render([{"role": "user", "content": question}], tokenizer)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert llama.tokenize(text.encode(), add_bos=False, special=True) == ids
        llama.reset()
        llama.eval(ids)
        with torch.inference_mode():
            ours = net(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            reply = net.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
        theirs = torch.tensor(llama.scores[: len(ids)]).log_softmax(-1)
        assert (ours - theirs).abs().max() < 1e-3
        told = llama.create_completion(ids, max_tokens=12, temperature=0)["choices"][0]["text"]
        assert told == tokenizer.decode(reply, skip_special_tokens=True)


def test_what_gguf_does_not_hold(medalpaca, tmp_path):
    tokenizer, net = models.load_tokenizer(medalpaca.base), models.load(medalpaca.base, dtype=torch.float32)

    class Other(type(net)):
        pass

    net.__class__ = Other
    with pytest.raises(ConfigError, match="this is Other: use"):
        write_gguf(net, tokenizer, tmp_path / "m.gguf")
    with pytest.raises(ConfigError, match="merge the adapter"):
        export(medalpaca.train_arm("lora"), tmp_path / "x", gguf=True)
    assert list(tmp_path.iterdir()) == []


def test_an_export_with_gguf(medalpaca, tmp_path):
    made = export(medalpaca.train_arm("lora", learning_rate=1e-2), tmp_path / "x", merge=True, gguf=True)
    assert {"model.gguf", "model.safetensors"} <= set(made["files"])
