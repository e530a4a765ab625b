"""Training trains, what it shall and nothing else; batches, accumulation and interruptions do not change the result."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from ultramed.core.config import arm_config
from ultramed.core.errors import ConfigError, StoreError
from ultramed.core.schema import TokenConfig, TrainConfig
from ultramed.data.rows import read_instructions
from ultramed.lm import models
from ultramed.lm.device import Placement
from ultramed.lm.merging import update_kept
from ultramed.lm.templates import TEMPLATES
from ultramed.train.sft import Collator, make_trainer, sft, split_held_out
from ultramed.train.token_rows import encode_instructions, read_tokens, token_rows
from ultramed.train.training import batch_plan, settings
from ultramed.train.trl_adapter import score_labelled_tokens_only, split_by_tokens
from ultramed.train.weights import load_for_training


@pytest.fixture(scope="module")
def config(smoke):
    return arm_config(smoke, "full", learning_rate=1e-3)


@pytest.fixture(scope="module")
def rows(medalpaca, config):
    return medalpaca.training_rows(config)


def weights(artifact) -> dict:
    return load_file(next(artifact.path.glob("*.safetensors")))


def test_batch_plan_keeps_the_global_batch():
    c = TrainConfig(mixture={"x": 1}, learning_rate=1, global_batch_size=12, micro_batch_tokens=500)
    assert batch_plan(c, longest=100) == (4, 3)
    assert batch_plan(c, longest=100, processes=3) == (4, 1)
    assert batch_plan(c, longest=10_000) == (1, 12)
    with pytest.raises(ConfigError, match="does not divide by 5"):
        batch_plan(c, 10, processes=5)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(40, 200), st.integers(1, 6))
def test_parts_hold_every_row_once_and_nothing_but_padding_is_cut(lengths, budget, least):
    rows = [{"input_ids": [i] * n, "prompt_length": n // 2} for i, n in enumerate(lengths)]
    batch = Collator(0)(rows)
    assert all(tensor.is_contiguous() for tensor in batch.values()), "a GPU's loader cannot pin an expanded tensor"
    made = split_by_tokens(batch, budget, min(least, len(rows)))
    assert len(made) >= min(least, len(rows))
    seen = [i for part in made for i in part["labels"].amax(1).tolist()]
    assert sorted(seen) == list(range(len(rows)))
    for part in made:
        assert {v.shape for v in part.values()} == {part["labels"].shape}
        if len(made) > 1 and len(part["labels"]) > 1:
            assert len(part["labels"]) * max(lengths[i] for i in part["labels"].amax(1).tolist()) <= budget
        for row, label in zip(part["labels"], part["labels"].amax(1).tolist(), strict=True):
            assert (row == label).sum() == lengths[label] - lengths[label] // 2


def test_full_training_moves_every_tensor_and_lowers_the_loss(medalpaca, config):
    made = medalpaca.train_arm("full", learning_rate=1e-2, epochs=4)
    assert made.metrics["tensors_moved"][0] == made.metrics["tensors_moved"][1]
    log = [json.loads(line) for line in (made / "log.jsonl").read_text().splitlines()]
    losses = [e["loss"] for e in log if "loss" in e]
    assert len(losses) == made.metrics["steps"] == 12
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    before, after = weights(medalpaca.base), weights(made)
    assert set(before) == set(after)
    assert not torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])


def test_what_rounding_takes_from_an_update_is_told(medalpaca, config, rows, caplog):
    """Of 1 the next bf16 numbers are 129/128 above and 255/256 below: a 512th up goes back, a 64th stays."""
    one = torch.ones(2)
    assert update_kept([(one, torch.tensor([1 + 1 / 600, 1.0]))], torch.bfloat16) == 0
    assert "leaves 0% of what training changed" in caplog.text
    caplog.clear()
    both = [(one, torch.tensor([1 + 1 / 600, 1.0])), (one, torch.tensor([1.0, 1 + 1 / 64]))]
    assert update_kept(both, torch.bfloat16) == pytest.approx((1 / 64) ** 2 / ((1 / 64) ** 2 + (1 / 600) ** 2))
    assert update_kept(both, torch.float32) == 1
    assert update_kept([(one, one)], torch.bfloat16) == 1, "nothing was to be kept"
    assert not caplog.text
    start = medalpaca.train_arm("full", learning_rate=1e-2, dtype="bfloat16")  # weights that bf16 holds exactly
    found = {}
    for rate, dtype in ((1e-6, "bfloat16"), (1e-2, "bfloat16"), (1e-6, "float32")):
        again = config.model_copy(update={"learning_rate": rate, "dtype": dtype})
        found[rate, dtype] = sft(again, model=start, data=rows).metrics["update_kept"]
    assert found[1e-6, "bfloat16"] < 0.5 < 0.98 < found[1e-2, "bfloat16"]
    assert found[1e-6, "float32"] == 1


@pytest.mark.parametrize("method", ["lora", "lora_8bit"])
def test_lora_saves_an_adapter_without_paths_and_leaves_the_base_alone(medalpaca, method):
    before = (medalpaca.base / "manifest.json").read_text()
    made = medalpaca.train_arm(method, learning_rate=1e-2)
    assert made.metrics["tensors_moved"] == [8, 8]
    about = json.loads((made / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == "tiny:llama"
    assert about["r"] == 8
    assert models.card(made) == {
        "kind": "adapter",
        "template": "chat",
        "method": method,
        "base": medalpaca.base.key,
        "name": "tiny:llama",
    }
    assert (medalpaca.base / "manifest.json").read_text() == before
    assert {m["stage"] for m in made.lineage()} == {"sft", "base_model", "mixture", "exam"}
    assert all("lora_" in k for k in weights(made))


@pytest.mark.parametrize("on_inputs", [False, True])
def test_our_loss_is_trls_loss(medalpaca, config, rows, tokenizer, on_inputs):
    """The mean over trained tokens of minus log p, as a plain forward pass over all logits gives it."""
    config = config.model_copy(update={"train_on_inputs": on_inputs})
    from trl import SFTConfig, SFTTrainer

    data = encode_instructions(read_instructions(rows / "rows.parquet"), tokenizer, TEMPLATES["chat"], config.max_length)
    collate = Collator(tokenizer.pad_token_id, train_on_inputs=on_inputs)
    batch = collate(data[:4])
    net = load_for_training(medalpaca.base, config).eval()
    logits = net(input_ids=batch["input_ids"]).logits[:, :-1]
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    from datasets import Dataset

    args = SFTConfig(
        output_dir=str(rows.path.parent / "x"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = SFTTrainer(net, args, collate, Dataset.from_list(data[:4]), processing_class=tokenizer)
    assert trainer.compute_loss(net, dict(batch)).item() == pytest.approx(want.item(), abs=1e-5), "TRL's own head"
    score_labelled_tokens_only(net)
    assert trainer.compute_loss(net, dict(batch)).item() == pytest.approx(want.item(), abs=1e-5), "ours"


def test_padding_and_neighbours_do_not_change_a_rows_loss(medalpaca, config, rows, tokenizer):
    data = encode_instructions(read_instructions(rows / "rows.parquet"), tokenizer, TEMPLATES["chat"], config.max_length)
    data = sorted(data, key=lambda r: r["length"])
    net, collate = models.load(medalpaca.base, dtype=torch.float32), Collator(tokenizer.pad_token_id)

    def loss_of_first(batch_rows):
        batch = collate(batch_rows)
        with torch.inference_mode():
            logits = net(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits, batch["labels"][0, 1:], ignore_index=-100).item()

    assert loss_of_first([data[0], data[-1], data[-2]]) == pytest.approx(loss_of_first([data[0]]), abs=1e-5)


def test_an_evaluation_is_of_tokens_however_they_are_batched(medalpaca, tmp_path):
    from datasets import Dataset

    lengths = (2, 40, 3, 60, 2, 50, 2, 2)
    rows = [{"input_ids": list(range(20, 30 + n)), "prompt_length": 10, "length": 10 + n} for n in lengths]
    data, tokenizer, found = Dataset.from_list(rows), models.load_tokenizer(medalpaca.base), []
    for tokens in (64, 160, 1024):
        config = TrainConfig(
            learning_rate=1e-4, mixture={"x": 1}, micro_batch_tokens=tokens, dtype="float32", global_batch_size=8
        )
        net = load_for_training(medalpaca.base, config)
        trainer = make_trainer(net, tokenizer, data, config, tmp_path / str(tokens), data)
        found.append(trainer.evaluate(data)["eval_loss"])
    net.eval()
    with torch.inference_mode():
        logps = [net(input_ids=torch.tensor([r["input_ids"]])).logits[0, 9:-1].log_softmax(-1) for r in rows]
    picked = [x.gather(1, torch.tensor(r["input_ids"][10:])[:, None]).sum().item() for x, r in zip(logps, rows, strict=True)]
    assert found == pytest.approx([-sum(picked) / sum(lengths)] * 3, abs=1e-4)


def test_accumulated_micro_batches_are_one_batch(medalpaca, monkeypatch):
    """Same rows, same steps: one batch of 8 and the same rows in several smaller ones end with the same weights."""
    for module in ("sft", "training", "weights"):
        place = Placement("cpu", torch.float32, "test")
        monkeypatch.setattr(f"ultramed.train.{module}.placement", lambda dtype="auto", place=place: place)
    one = medalpaca.train_arm("full", learning_rate=1e-3, micro_batch_tokens=4096)
    four = medalpaca.train_arm("full", learning_rate=1e-3, micro_batch_tokens=300)
    assert one.metrics["micro_batches"] == one.metrics["steps"]
    assert four.metrics["micro_batches"] > 2 * four.metrics["steps"]
    a, b = weights(one), weights(four)
    assert max((a[k].float() - b[k].float()).abs().max().item() for k in a) < 1e-4


def test_training_that_moves_nothing_is_an_error(medalpaca, config, monkeypatch):
    real = load_for_training

    def frozen(*args, **kwargs):
        net = real(*args, **kwargs)
        for p in net.parameters():
            p.register_hook(torch.zeros_like)
        return net

    monkeypatch.setattr("ultramed.train.sft.load_for_training", frozen)
    with pytest.raises(StoreError, match="changed none"):
        medalpaca.train_arm("full", learning_rate=3e-3, seed=2)


@pytest.mark.parametrize(("method", "rate"), [("full", 3e-2), ("lora", 2.0), ("lora_8bit", 2.0)])
def test_with_rows_held_out_the_best_evaluation_is_what_is_published(medalpaca, config, rows, tokenizer, method, rate):
    """A rate at which the loss rises again: the published weights are those of the lowest loss, not the last ones.

    At such a rate an adapter's losses jump about, and which is the lowest differs from machine to machine, the last of
    nine among them: a seed is looked for where it is another one.
    """
    changes = {"method": method, "learning_rate": rate, "epochs": 6, "held_out": 0.25, "eval_steps": 2, "warmup_ratio": 0.0}
    config = config.model_copy(update={**changes, "lr_scheduler_type": "constant", "dtype": "float32"})
    for seed in range(8):
        config = config.model_copy(update={"seed": seed})
        made = sft(config, model=medalpaca.base, data=rows)
        log = [json.loads(line) for line in (made / "log.jsonl").read_text().splitlines()]
        losses = {e["step"]: e["eval_loss"] for e in log if "eval_loss" in e}
        m = made.metrics
        assert (m["rows"], m["held_out"], m["steps"]) == (18, 6, 18)  # of 24 rows; 3 batches of 8, the last one short
        assert list(losses) == [2, 4, 6, 8, 10, 12, 14, 16, 18]
        best = min(losses, key=losses.get)
        if best < 18:
            break
    assert best < 18, f"this test needs a loss that rises again: {losses}"
    assert (m["best_step"], m["held_out_loss"]) == (best, losses[best])
    _, held = split_held_out(read_tokens(token_rows_of(medalpaca, rows, config)), config)
    loss = held_out_loss(made, held, tokenizer)
    assert loss == pytest.approx(losses[best], rel=2e-3), f"loss of the published weights {loss}; of all steps {losses}"
    assert not (made / "checkpoints").exists()


def token_rows_of(medalpaca, rows, config):
    return token_rows(
        TokenConfig(kind="instructions", max_length=config.max_length), model=medalpaca.base, data=rows, template="chat"
    )


def held_out_loss(made, held, tokenizer) -> float:
    """Mean over the completion tokens of all rows, by a plain forward pass."""
    net = models.load(made, dtype=torch.float32)
    total, count = 0.0, 0
    for row in held:
        batch = Collator(tokenizer.pad_token_id)([row])
        with torch.inference_mode():
            logits = net(input_ids=batch["input_ids"]).logits[0, :-1]
        wanted = batch["labels"][0, 1:]
        total += torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").item()
        count += int((wanted != -100).sum())
    return total / count


def test_what_is_held_out_is_not_trained_on_and_goes_by_the_seed(medalpaca, config, rows):
    made = read_tokens(token_rows_of(medalpaca, rows, config))
    parts = [split_held_out(made, config.model_copy(update={"held_out": 0.1, "seed": seed})) for seed in (0, 0, 1)]
    texts = [[[str(ids) for ids in side["input_ids"]] for side in part] for part in parts]
    assert [len(side) for side in texts[0]] == [22, 2]
    assert sorted(texts[0][0] + texts[0][1]) == sorted(str(ids) for ids in made["input_ids"])
    assert texts[0] == texts[1] != texts[2]
    assert split_held_out(made, config) == (made, None)
    with pytest.raises(ConfigError, match="nothing to hold out"):
        split_held_out(made.select([0]), config.model_copy(update={"held_out": 0.1}))


def test_two_warmups_or_checkpoints_without_evaluation_are_errors():
    given = {"mixture": {"x": 1}, "learning_rate": 1.0}
    with pytest.raises(ValueError, match=r"warmup_steps 100 and warmup_ratio 0\.1 are two warm-ups: set one of them to 0"):
        TrainConfig(**given, warmup_steps=100)
    with pytest.raises(ValueError, match="save_steps 50 must be 0 or eval_steps 200"):
        TrainConfig(**given, held_out=0.1, save_steps=50)
    place = settings(TrainConfig(**given, warmup_steps=100, warmup_ratio=0), Path("x"), 1000, 1, 1)
    assert place["warmup_steps"] == 100
    assert settings(TrainConfig(**given, warmup_ratio=0.25), Path("x"), 1000, 1, 1)["warmup_steps"] == 250


PACKED = {"packing": True, "train_on_inputs": True, "max_length": 128, "global_batch_size": 4}


def test_packed_training_trains_and_counts_blocks(medalpaca):
    """As UltraMedical's run_sft.py: a batch is four packed rows here, 16 of 8,192 tokens there."""
    made = medalpaca.train_arm("full", learning_rate=1e-2, epochs=4, **PACKED)
    m = made.metrics
    assert m["rows"] == -(-m["tokens"] // 128) < m["documents"] == 24
    assert m["steps"] == 4 * -(-m["rows"] // 4)
    assert m["trained_tokens"] == m["tokens"]
    assert m["tensors_moved"][0] == m["tensors_moved"][1]
    losses = [e["loss"] for e in map(json.loads, (made / "log.jsonl").read_text().splitlines()) if "loss" in e]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


def test_nothing_fits(medalpaca, config):
    with pytest.raises(ConfigError, match="max_length 8"):
        sft(config.model_copy(update={"max_length": 8}), model=medalpaca.base, data=medalpaca.training_rows(config))


RUN = """
import json, sys
from ultramed.core.config import load_profile
from ultramed.core.log import quiet_libraries
from ultramed.experiments.medalpaca import MedAlpaca
quiet_libraries()
p = load_profile("smoke", ["train.epochs=12", *sys.argv[3:]])
MedAlpaca.of(p).train_arm(sys.argv[1], learning_rate=1e-3, **json.loads(sys.argv[2]))
"""
EVALUATED = ("train.held_out=0.25", "train.eval_steps=2")


@pytest.mark.parametrize(
    ("method", "how", "changes", "more"),
    [
        ("full", signal.SIGKILL, PACKED, ("train.save_steps=2",)),
        ("lora", signal.SIGINT, {}, ("train.save_steps=2",)),
        ("full", signal.SIGINT, {}, EVALUATED),
    ],
    ids=["packed", "lora", "held out"],
)
def test_killed_half_way_and_run_again_ends_with_the_same_weights(medalpaca, tmp_path, monkeypatch, method, how, changes, more):
    """SIGINT saves a checkpoint first; SIGKILL leaves the last of those made every two steps."""
    from ultramed.core.config import load_profile
    from ultramed.experiments.medalpaca import MedAlpaca

    p = load_profile("smoke", ["train.epochs=12", *more])
    whole = MedAlpaca.of(p).train_arm(method, learning_rate=1e-3, **changes)
    env = {**os.environ, "ULTRAMED_STORE": str(tmp_path)}
    command = [sys.executable, "-c", RUN, method, json.dumps(changes), *more]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("sft/.work-*/checkpoints/checkpoint-*/trainer_state.json")):
            assert process.poll() is None, process.stderr.read().decode()[-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(how)
        process.wait(60)
    assert process.returncode != 0
    assert not list(tmp_path.glob("sft/[!.]*")), "nothing half-trained is published"
    monkeypatch.setenv("ULTRAMED_STORE", str(tmp_path))
    again = MedAlpaca.of(p).train_arm(method, learning_rate=1e-3, **changes)
    assert again.metrics["tokens_per_second"] is None, "it went on from a checkpoint"
    assert again.key == whole.key
    assert again.path != whole.path
    a, b = weights(whole), weights(again)
    assert all(torch.equal(a[k], b[k]) for k in a)
