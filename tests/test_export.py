"""What leaves the house loads without this package and is the same model."""

import json

import pytest
import torch
import yaml

from ultramed.core.errors import ConfigError
from ultramed.core.schema import EvalConfig
from ultramed.data.messages import as_completion
from ultramed.evaluate.accuracy import answers
from ultramed.lm import models
from ultramed.lm.templates import TEMPLATES
from ultramed.report.export import export

MESSAGES = [{"role": "system", "content": "Answer: text (letter)."}, {"role": "user", "content": "Which organ sees?"}]


@pytest.fixture(scope="module")
def full(medalpaca):
    return medalpaca.train_arm("full", seed=0)


@pytest.fixture(scope="module")
def adapter(medalpaca):
    return medalpaca.train_arm("lora", seed=0)


def logits(net, tokenizer):
    ids = torch.tensor([tokenizer("the patient has a rare disease", add_special_tokens=False)["input_ids"]])
    with torch.inference_mode():
        return net(input_ids=ids).logits.float()


def test_a_whole_model_with_its_card_and_results(full, medalpaca, exam, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    answers(EvalConfig(protocol="likelihood"), model=full, questions=exam, select={"step1": [0, 8]})
    made = export(full, tmp_path / "m")
    assert {"model.safetensors", "config.json", "generation_config.json", "README.md", "lineage.json"} <= set(made["files"])
    net, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32),
        AutoTokenizer.from_pretrained(tmp_path / "m"),
    )
    same = models.load(full, dtype=torch.float32, device="cpu")
    assert torch.allclose(logits(net, tokenizer), logits(same, tokenizer), atol=1e-5)
    assert not net.generation_config.do_sample
    text = (tmp_path / "m" / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert (front["library_name"], front["pipeline_tag"]) == ("transformers", "text-generation")
    for part in ("Not for clinical use", "| bundled exam |", "learning_rate", "Limitations", "step1"):
        assert part in text
    results = json.loads((tmp_path / "m" / "results.json").read_text())
    (name,) = [n for n, r in results["configs"].items() if (r["metadata"]["n"], r["metadata"]["protocol"]) == (8, "likelihood")]
    assert results["n-samples"][name]["effective"] == 8
    assert 0 <= results["results"][name]["acc,none"] <= 1
    stages = [m["stage"] for m in json.loads((tmp_path / "m" / "lineage.json").read_text())]
    assert stages[0] == "sft"
    assert {"base_model", "mixture", "exam"} <= set(stages)
    with pytest.raises(ConfigError, match="give a new folder"):
        export(full, tmp_path / "m")
    with pytest.raises(ConfigError, match="whole model"):
        export(full, tmp_path / "n", merge=True)


def test_an_adapter_and_its_merged_model_agree(adapter, medalpaca, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export(adapter, tmp_path / "a")
    export(adapter, tmp_path / "m", merge=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    base = models.load(medalpaca.base, dtype=torch.float32, device="cpu")
    before = logits(base, tokenizer)
    apart = PeftModel.from_pretrained(base, tmp_path / "a").eval()
    close = (logits(merged, tokenizer) - logits(apart, tokenizer)).abs().max()
    assert close < 0.02 * before.std()
    front = yaml.safe_load((tmp_path / "a" / "README.md").read_text().split("---\n")[1])
    assert front["library_name"] == "peft"
    assert str(tmp_path) not in (tmp_path / "a" / "adapter_config.json").read_text()


def test_only_what_was_trained_here(medalpaca, tmp_path):
    with pytest.raises(ConfigError, match="was not trained here"):
        export(medalpaca.base, tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("name", ["alpaca", "medalpaca"])
@pytest.mark.parametrize("given", [MESSAGES, MESSAGES[1:]])
def test_an_instruction_format_becomes_a_chat_template(tokenizer, name, given):
    shape = TEMPLATES[name]
    plain = tokenizer.chat_template
    try:
        tokenizer.chat_template = shape.jinja(tokenizer)
        shown = tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([*given, *as_completion("The eye.")], tokenize=False)
    finally:
        tokenizer.chat_template = plain
    assert shown == shape.render(given, tokenizer)
    assert whole == shown + shape.finish("The eye.", tokenizer)


@pytest.mark.parametrize("arm", ["lora", "full"])
def test_what_was_trained_on_a_local_folder_says_nothing_of_where_it_stood(medalpaca, tmp_path, arm):
    import shutil

    from ultramed.core.config import load_profile
    from ultramed.experiments.medalpaca import MedAlpaca

    folder = tmp_path / "my model"
    shutil.copytree(medalpaca.base.path, folder)
    (folder / "own.json").write_text(json.dumps({"arm": arm}))  # a base of its own
    mine = MedAlpaca.of(load_profile("smoke", [f"models.0.name={folder}", "train.epochs=1"]))
    export(mine.train_arm(arm, seed=0), tmp_path / "out")
    for file in (tmp_path / "out").glob("*.*"):
        if file.suffix in (".json", ".md"):
            assert str(tmp_path) not in file.read_text(), file.name
    assert "my model" in (tmp_path / "out" / "README.md").read_text()
