"""Weights, quantisation, adapters: what silently goes wrong elsewhere must be loud here."""

import io
import json
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch

from ultramed.core.errors import ConfigError, StoreError
from ultramed.core.schema import ModelConfig, OptimConfig
from ultramed.lm import models, weights
from ultramed.lm.device import placement
from ultramed.lm.merging import merge_adapter
from ultramed.train.weights import load_for_training

CPU = placement().device == "cpu"


def test_placement_says_why():
    assert placement().device in str(placement())
    assert placement("float32").dtype is torch.float32


def test_pad_is_neither_end_nor_begin(tokenizer):
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id, None)
    tokenizer = type(tokenizer).from_pretrained(tokenizer.name_or_path, pad_token="<|im_end|>")
    models.set_pad(tokenizer)
    assert tokenizer.pad_token == "<|endoftext|>"


def test_a_tokenizer_without_a_pad_token_still_answers_but_trains_no_reward_model(tmp_path, exam):
    import families

    from ultramed.core.schema import RewardConfig
    from ultramed.evaluate.engine import one_reply
    from ultramed.train.reward import reward

    known, folder = families.tokenizer(), tmp_path / "gpt2"
    families.make("gpt2").save_pretrained(folder)
    own = type(known)(tokenizer_object=known.backend_tokenizer, bos_token="<|im_end|>", eos_token="<|im_end|>")
    own.get_vocab = lambda: {}
    models.set_pad(own)
    assert own.pad_token == own.eos_token, "nothing else to pad with"
    known.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": "<|im_end|>"}))
    words = (folder / "tokenizer.json").read_text().replace("<pad>", "<first>")
    (folder / "tokenizer.json").write_text(words)
    art = models.base_model(ModelConfig(name=str(folder), label="x"))
    assert isinstance(one_reply(art, [{"role": "user", "content": "Which?"}], 4), str)
    with pytest.raises(ConfigError, match="no token to pad with"):
        reward(RewardConfig(learning_rate=1e-4), model=art, pairs=exam)


def test_a_chat_template_that_prints_the_day_gives_the_same_prompt_tomorrow(tmp_path):
    import families

    art = families.save("llama", tmp_path)
    path = tmp_path / "llama-causal/chat_template.jinja"
    path.write_text("{{ strftime_now('%d %b %Y') }} " + path.read_text())
    art = models.base_model(ModelConfig(name=str(path.parent), label="dated"))
    text = models.template_of(art).render([{"role": "user", "content": "Which?"}], models.load_tokenizer(art))
    assert text.startswith("26 Jul 2024 <|im_start|>user\nWhich?")


def test_a_missing_model_is_one_sentence(fresh_store):
    for name, what in (
        ("./nowhere", "no such folder"),
        ("bundled:nothing", "not one of"),
        ("nobody/nothing", "cannot be loaded"),
    ):
        with pytest.raises(ConfigError, match=what):
            models.base_model(ModelConfig(name=name, label="x"))


def test_a_wheel_with_the_wrong_hash_is_refused(fresh_store, monkeypatch):
    path = fresh_store / "downloads" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not a model")
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    with pytest.raises(StoreError, match="wanted b179c9523d0e"):
        weights.bundled_gguf("bundled:smollm2-135m")
    assert path.read_bytes() == b"not a model", "evidence is kept"


def test_a_local_folder_is_used_in_place_and_known_by_its_content(medalpaca, tmp_path, fresh_store):

    folder = tmp_path / "mine"
    shutil.copytree(medalpaca.base.path, folder)
    first = models.base_model(ModelConfig(name=str(folder), label="mine"))
    assert models.card(first)["kind"] == "reference"
    assert models.load(first).config.hidden_size == 64
    (folder / "generation_config.json").write_text("{}")
    assert models.base_model(ModelConfig(name=str(folder), label="mine")).key != first.key


def test_a_hub_model_stays_at_the_commit_it_was_looked_up_at(medalpaca, tmp_path, fresh_store, monkeypatch):
    """In the hub's cache, as a download leaves it; then the repository moves on."""

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository, first, second = tmp_path / "models--made--tiny", "a" * 40, "b" * 40
    for commit in (first, second):
        shutil.copytree(medalpaca.base.path, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(first)
    config = ModelConfig(name="made/tiny", label="x")
    assert models.location(models.base_model(config))["revision"] == first
    (repository / "refs" / "main").write_text(second)
    shutil.rmtree(repository / "snapshots" / second)  # so that only the first can be loaded
    made = models.base_model(config)
    assert models.card(made)["revision"] == first
    assert models.load(made).config.hidden_size == 64
    assert models.folder(made).name == first


@pytest.mark.parametrize("method", ["lora", "lora_8bit"])
def test_every_adapter_tensor_gets_a_gradient(medalpaca, method):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = load_for_training(medalpaca.base, OptimConfig(method=method, learning_rate=1e-4))
        ids = torch.arange(10, 40)[None]
        net.train()
        net(input_ids=ids, labels=ids).loss.backward()
    lora_b = {n: p for n, p in net.named_parameters() if "lora_B" in n}
    assert len(lora_b) == 4  # q and v of two layers
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in lora_b.values())
    assert {n.split(".lora_")[0].split(".")[-1] for n in lora_b} == {"q_proj", "v_proj"}
    assert all("lora" in n for n, p in net.named_parameters() if p.requires_grad)


@pytest.mark.skipif(not CPU, reason="a GPU is at hand: NF4 training works there")
def test_nf4_training_on_a_cpu_is_refused(medalpaca):
    with pytest.raises(ConfigError, match=r"does nothing on a CPU.*method lora or lora_8bit"):
        load_for_training(medalpaca.base, OptimConfig(method="lora_4bit", learning_rate=1e-4))


def test_eight_bit_weights_answer_like_the_full_ones(medalpaca):
    ids = torch.arange(10, 40)[None]
    with torch.inference_mode():
        whole = models.load(medalpaca.base)(input_ids=ids).logits.float()
        small = models.load(medalpaca.base, quantize="8bit")(input_ids=ids).logits.float()
    assert (whole - small).abs().mean() < 0.05 * whole.std()


def _adapter(medalpaca, folder, scale=0.05):
    net = load_for_training(medalpaca.base, OptimConfig(method="lora", learning_rate=1e-4))
    with torch.no_grad():
        for n, p in net.named_parameters():
            if "lora_B" in n:
                p.normal_(0, scale)
    net.save_pretrained(folder)
    return net


def test_a_merged_adapter_answers_like_the_unmerged_one(medalpaca, tmp_path):
    from peft import PeftModel

    _adapter(medalpaca, tmp_path)
    ids = torch.arange(10, 40)[None]
    unmerged = PeftModel.from_pretrained(models.load(medalpaca.base, dtype=torch.float32), tmp_path).eval()
    with torch.inference_mode():
        want = unmerged(input_ids=ids).logits
        got = merge_adapter(models.load(medalpaca.base, dtype=torch.float32), tmp_path)(input_ids=ids).logits
    assert torch.allclose(want, got, atol=1e-4)
    plain = models.load(medalpaca.base, dtype=torch.float32)(input_ids=ids).logits
    assert not torch.allclose(plain, got, atol=1e-2), "the adapter does something"


def test_merging_keeps_rotary_frequencies_in_fp32(medalpaca, tmp_path):
    _adapter(medalpaca, tmp_path)
    merged = merge_adapter(models.load(medalpaca.base, dtype=torch.bfloat16), tmp_path)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert merged.model.rotary_emb.inv_freq.dtype is torch.float32


def test_merging_into_a_quantised_base_is_refused(medalpaca, tmp_path):
    _adapter(medalpaca, tmp_path)
    with pytest.raises(StoreError, match="ruins it silently"):
        merge_adapter(models.load(medalpaca.base, quantize="8bit"), tmp_path)


def test_a_merge_that_changes_the_answers_is_refused(medalpaca, tmp_path, monkeypatch):
    """A merge that forgets the adapter, injected."""
    from peft import PeftModel

    _adapter(medalpaca, tmp_path, scale=1.0)
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)
    with pytest.raises(StoreError, match="moved the logits"):
        merge_adapter(models.load(medalpaca.base, dtype=torch.bfloat16), tmp_path)


def test_the_command_line_starts_without_torch():
    code = "import sys; import ultramed.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0


def test_a_base_model_takes_the_chat_tokenizer_of_its_sibling(medalpaca, tmp_path, fresh_store):
    """Llama-3-8B has no chat template; Llama-3-8B-Instruct has one, and the same vocabulary."""
    folders = {name: shutil.copytree(medalpaca.base.path, tmp_path / name) for name in ("base", "instruct", "other")}
    plain = models.load_tokenizer(medalpaca.base)
    plain.chat_template = None
    for file in folders["base"].glob("*.jinja"):
        file.unlink()
    plain.save_pretrained(folders["base"])
    config = {"name": str(folders["base"]), "label": "base"}
    made = models.base_model(ModelConfig(**config, tokenizer=str(folders["instruct"])))
    tokenizer = models.load_tokenizer(made)
    assert tokenizer.chat_template
    assert not models.load_tokenizer(models.base_model(ModelConfig(**config))).chat_template
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folders["other"])
    with pytest.raises(ConfigError, match="another vocabulary"):
        models.base_model(ModelConfig(**config, tokenizer=str(folders["other"])))
    with pytest.raises(ConfigError, match="brings its own tokenizer"):
        models.base_model(ModelConfig(name="tiny:llama", label="x", tokenizer=str(folders["instruct"])))


def test_a_folder_that_has_changed_is_no_longer_the_base(medalpaca, tmp_path, fresh_store):

    folder = tmp_path / "mine"
    shutil.copytree(medalpaca.base.path, folder)
    base = models.base_model(ModelConfig(name=str(folder), label="x"))
    (folder / "config.json").touch()
    assert models.load(base).config.hidden_size == 64, "touched, but the same"
    (folder / "generation_config.json").write_text("{}")
    with pytest.raises(StoreError, match="has changed since"):
        models.load(base)


def test_a_sibling_tokenizer_that_has_changed_is_another_model(medalpaca, tmp_path, fresh_store):

    weights, sibling = tmp_path / "weights", tmp_path / "sibling"
    for folder in (weights, sibling):
        shutil.copytree(medalpaca.base.path, folder)
    config = ModelConfig(name=str(weights), tokenizer=str(sibling), label="x")
    first = models.base_model(config)
    (sibling / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert models.base_model(config).key != first.key


def test_no_code_of_a_models_folder_is_run(medalpaca, tmp_path, fresh_store, monkeypatch):
    """Not even where somebody answers yes to transformers' question."""
    folder = tmp_path / "strange"
    shutil.copytree(medalpaca.base.path, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "strange.StrangeConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    marker = tmp_path / "ran"
    (folder / "strange.py").write_text(f"open({str(marker)!r}, 'w')\nfrom transformers import LlamaConfig as StrangeConfig\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\n"))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        models.base_model(ModelConfig(name=str(folder), label="x"))
    assert not marker.exists()
