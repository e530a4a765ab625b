"""Losses by hand, trainers against them, and reward models whose scores depend on the reply alone."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from handmade import given as given_rows
from hypothesis import given
from hypothesis import strategies as st

from ultramed.core.config import load_profile
from ultramed.core.errors import ConfigError
from ultramed.core.schema import PreferenceConfig
from ultramed.data.formats import BadRow
from ultramed.data.recognise import read
from ultramed.data.rows import read_pairs
from ultramed.evaluate.sample import read_feedback
from ultramed.experiments.ultramedical import UltraMedical
from ultramed.lm import models
from ultramed.lm.batches import pack_shared_prefixes
from ultramed.lm.templates import RELEASED, TEMPLATES, role_header
from ultramed.lm.tokens import TemplateError, encode_rows, lint
from ultramed.train import losses, trl_adapter
from ultramed.train.preference import preference, unpair
from ultramed.train.reward import PairCollator, group_by_prompt, load_reward, score_rows
from ultramed.train.token_rows import encode_pairs


@pytest.fixture(scope="module")
def experiment(places):
    from ultramed.core.log import quiet_libraries

    quiet_libraries()
    return UltraMedical.of(load_profile("smoke"))


@pytest.fixture(scope="module")
def rows(experiment):
    return read_pairs(experiment.preference_pairs("ultramed") / "pairs.parquet")


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_kto_pair_by_hand():
    """Worked by hand with beta 0.5: KL_chosen = mean(2, 0) = 1, KL_rejected = mean(-3, 1) < 0, so 0."""
    chosen, rejected = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])
    want = [1 - sigmoid(1.0), 1 - sigmoid(0.0), 1 - sigmoid(0.5 * 4), 1 - sigmoid(0.0)]
    assert losses.kto_pair(chosen, rejected, 0.5).numpy() == pytest.approx(np.array(want), abs=1e-6)


def test_the_released_gradient_of_kto_pair_flows_through_its_reference_points():
    """The same case. The mean over four, of slopes s(x) = sigmoid(x) (1 - sigmoid(x)): s(0) = 0.25, s(1) = 0.196612,
    s(2) = 0.104994. KL_chosen = 1 is half of each chosen ratio, so each gets half of both rejected slopes on top;
    KL_rejected is clamped at 0 and gives nothing."""
    first, second, third, fourth = 0.125 * 0.196612, 0.125 * 0.25, 0.125 * 0.104994, 0.125 * 0.25
    through = (third + fourth) / 2
    for detach, extra in ((False, through), (True, 0.0)):
        ratios = torch.tensor([[2.0, 0.0], [-3.0, 1.0]], requires_grad=True)
        losses.kto_pair(*ratios, 0.5, detach).mean().backward()
        want = [[-first - extra, -second - extra], [third, fourth]]
        assert ratios.grad.numpy() == pytest.approx(np.array(want), abs=1e-6)


@given(st.lists(st.tuples(st.floats(-20, 20), st.floats(-20, 20)), min_size=1, max_size=6), st.floats(0.01, 1))
def test_kto_pair_against_numpy(ratios, beta):
    c, r = np.array(ratios, dtype=np.float64).T
    want = np.concatenate([1 - sigmoid(beta * (c - max(r.mean(), 0))), 1 - sigmoid(beta * (max(c.mean(), 0) - r))])
    assert losses.kto_pair(torch.tensor(c), torch.tensor(r), beta).numpy() == pytest.approx(want, abs=1e-9)


def test_bradley_terry_by_hand():
    chosen, rejected = torch.tensor([1.0, 1.0]), torch.tensor([0.0, 3.0])
    want = (np.log(1 + np.exp(-1)) + np.log(1 + np.exp(2))) / 2
    assert losses.bradley_terry(chosen, rejected).item() == pytest.approx(want, abs=1e-6)
    assert losses.bradley_terry(chosen, rejected, 0.1).item() == pytest.approx(want + 0.1 * (1 + 16) / 2, abs=1e-6)


def test_pairs_are_tokenised_once_and_end_with_eos(experiment, rows, tokenizer):
    encoded = encode_pairs(rows, tokenizer, TEMPLATES["chat"], 256)
    for row, e in zip(rows, encoded, strict=True):
        assert tokenizer.decode(e["prompt_ids"]) == TEMPLATES["chat"].render(row["prompt"], tokenizer)
        for side in ("chosen", "rejected"):
            assert tokenizer.decode(e[f"{side}_ids"]) == row[side][0]["content"].strip() + tokenizer.eos_token
    short = min(len(e["prompt_ids"]) + len(e["chosen_ids"]) for e in encoded)
    assert encode_pairs(rows, tokenizer, TEMPLATES["chat"], short - 1) == []
    longest = max(e["length"] for e in encoded)
    assert encode_pairs(rows, tokenizer, TEMPLATES["chat"], longest - 1) == [e for e in encoded if e["length"] < longest]


def test_the_released_template_is_malformed_and_only_it_passes(experiment, rows, tokenizer):
    header = role_header(tokenizer)
    made = encode_pairs(rows[:1], tokenizer, TEMPLATES[RELEASED], 256)[0]
    text = tokenizer.decode(made["prompt_ids"] + made["chosen_ids"])
    assert header + header in text
    assert text.endswith(header)
    with pytest.raises(TemplateError, match="doubled"):
        lint(made["prompt_ids"] + made["chosen_ids"], len(made["prompt_ids"]), tokenizer)


def test_unpaired_rows_borrow_the_reply_of_another_prompt(rows, tokenizer):
    encoded = encode_pairs(rows, tokenizer, TEMPLATES["chat"], 256)
    single = unpair(Dataset.from_list(encoded), shift=2)
    assert single["label"][:4] == [True, False, True, False]
    assert single[1]["completion_ids"] == encoded[0]["rejected_ids"]
    assert len(single) == 2 * len(encoded)
    assert single[2]["KL_completion_ids"] == encoded[0]["chosen_ids"]
    assert single[0]["KL_completion_ids"] == encoded[-1]["chosen_ids"]


@pytest.mark.parametrize("loss", ["dpo", "ipo", "nca", "kto_pair", "kto"])
def test_every_loss_starts_where_policy_is_reference_and_moves(experiment, loss):
    """With policy = reference all log-ratios are zero: the first step's loss is known exactly."""
    art = experiment.train_preference("ultramed", "dpo", loss=loss, learning_rate=1e-3)
    log = [json.loads(line) for line in (art / "log.jsonl").read_text().splitlines()]
    first = next(e for e in log if "loss" in e)
    want = {"dpo": np.log(2), "ipo": 25.0, "nca": 2 * np.log(2), "kto_pair": 0.5, "kto": 0.5}[loss]
    assert first["loss"] == pytest.approx(want, rel=2e-3)
    assert art.metrics["tensors_moved"][0] == art.metrics["tensors_moved"][1]
    assert models.card(art)["loss"] == loss


def sums_and_means(model, encoded, side):
    """Log-probabilities of completions by a plain forward pass, row by row: their sums and their means over tokens."""
    net, found = models.load(model, dtype=torch.float32), []
    for row in encoded:
        whole = torch.tensor([row["prompt_ids"] + row[side]])
        with torch.inference_mode():
            logps = net(input_ids=whole).logits[0, :-1].log_softmax(-1)
        found.append(logps.gather(-1, whole[0, 1:, None])[len(row["prompt_ids"]) - 1 :, 0].double().numpy())
    return np.array([row.sum() for row in found]), np.array([row.mean() for row in found])


@pytest.mark.parametrize("loss", ["dpo", "ipo", "nca", "kto_pair", "kto"])
def test_every_loss_is_its_formula_where_policy_and_reference_differ(medalpaca, tokenizer, loss):
    """One batch of four pairs through the trainer, against the papers' formulas over log-probabilities of plain forwards."""
    policy, base, beta = medalpaca.train_arm("full", learning_rate=1e-2), medalpaca.base, 0.1
    said = [("heart (A)", "liver"), ("no", "perhaps it does"), ("the left lung (C)", "eye (D)"), ("yes, it does", "B")]
    four = [
        {"id": str(n), "source": "t", "prompt": [{"role": "user", "content": f"Question {n}?"}]}
        | {side: [{"role": "assistant", "content": text}] for side, text in zip(("chosen", "rejected"), texts, strict=True)}
        for n, texts in enumerate(said)
    ]
    encoded = encode_pairs(four, tokenizer, TEMPLATES["chat"], 256)
    config = PreferenceConfig(
        loss=loss, beta=beta, learning_rate=1e-6, max_steps=1, global_batch_size=4, micro_batch_tokens=4096, dtype="float32"
    )
    art = preference(config, model=policy, reference=base, pairs=given_rows(None, rows=four, side="pairs"))
    got = next(e["loss"] for e in map(json.loads, (art / "log.jsonl").read_text().splitlines()) if "loss" in e)

    def ratios(encoded, side):
        return [a - b for a, b in zip(*(sums_and_means(m, encoded, side) for m in (policy, base)), strict=True)]

    (c, c_mean), (r, r_mean) = ratios(encoded, "chosen_ids"), ratios(encoded, "rejected_ids")
    assert np.abs(c - r).max() > 0.1, "else every loss would be what it starts with"
    if loss == "dpo":
        want = -np.log(sigmoid(beta * (c - r)))
    elif loss == "ipo":  # Azar et al. 2023, equation 17, with the mean over tokens that TRL takes
        want = (c_mean - r_mean - 1 / (2 * beta)) ** 2
    elif loss == "nca":  # Chen et al. 2024, for two replies
        want = -np.log(sigmoid(beta * c)) - np.log(sigmoid(-beta * c)) / 2 - np.log(sigmoid(-beta * r)) / 2
    elif loss == "kto_pair":
        want = np.concatenate([1 - sigmoid(beta * (c - max(r.mean(), 0))), 1 - sigmoid(beta * (max(c.mean(), 0) - r))])
    else:  # the point of reference: replies of other prompts, behind this one's
        single = [dict(row) for row in unpair(Dataset.from_list(encoded), shift=2)]
        kl = max(ratios(single, "KL_completion_ids")[0].mean(), 0)
        want = np.concatenate([1 - sigmoid(beta * (c - kl)), 1 - sigmoid(beta * (kl - r))])
    assert got == pytest.approx(want.mean(), rel=1e-3)


def test_training_raises_the_margin(experiment):
    art = experiment.train_preference("ultramed", "dpo", learning_rate=3e-3, epochs=6)
    log = [json.loads(line) for line in (art / "log.jsonl").read_text().splitlines()]
    margins = [e["rewards/margins"] for e in log if "rewards/margins" in e]
    assert margins[0] == pytest.approx(0, abs=5e-3)
    assert margins[-1] > 0.05


def test_an_adapter_is_its_own_reference(experiment):
    art = experiment.train_preference("ultramed", "dpo", method="lora", learning_rate=1e-2)
    assert models.card(art)["kind"] == "adapter"
    assert art.metrics["train_loss"] < np.log(2) + 0.05


def test_unknown_losses_and_impossible_configurations_are_refused():
    with pytest.raises(ValueError, match="loss"):
        PreferenceConfig(loss="kto_pairs", learning_rate=1)
    with pytest.raises(ConfigError, match="reward_arm"):
        load_profile("smoke", ["ultramedical.rerank.reward_arm=medicine"])
    with pytest.raises(ConfigError, match="beta"):
        load_profile("smoke", ["ultramedical.preference.arms.dpo.beta=-1"])


# ------------------------------------------------------------------------------------------------------- reward models


def test_a_batch_reads_prompt_and_replies_once():
    """Two replies behind prompt [1, 7]; a second row for what would make it too long; a third for another prompt."""
    packed = pack_shared_prefixes([([1, 7], [2, 3]), ([1, 7], [4]), ([9], [5]), ([1, 7], [6, 6])], pad=0, limit=5)
    assert packed.input_ids.tolist() == [[1, 7, 2, 3, 4], [1, 7, 6, 6, 0], [9, 5, 0, 0, 0]]
    assert packed.position_ids[0].tolist() == [0, 1, 2, 3, 2]
    assert packed.attention_mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    assert packed.rows == [0, 0, 2, 1]
    assert packed.columns == [[1, 2, 3], [1, 4], [0, 1], [1, 2, 3]]
    pairs = [("x", [1, 7], [2], [3]), ("a", [9], [2], [8, 8]), ("x", [1, 7], [2], [4, 5])]
    names = ("prompt_id", "prompt_ids", "chosen_ids", "rejected_ids")
    tokens = Dataset.from_list([dict(zip(names, pair, strict=True)) for pair in pairs])
    groups, counts = group_by_prompt(tokens)
    assert groups.to_list() == [{"members": [1], "length": 4}, {"members": [0, 2], "length": 6}]
    assert counts == {"pairs": 3, "replies": 5, "tokens": 10}
    batch = PairCollator(tokens)([groups[1], groups[0]])
    assert batch["pairs"].tolist() == [[0, 1], [0, 2], [3, 4]], "equal replies to different prompts are different replies"
    assert batch["sequences"] == [([1, 7], [2]), ([1, 7], [3]), ([1, 7], [4, 5]), ([9], [2]), ([9], [8, 8])]
    turns = [("x", [1, 7], [2], [3]), ("x", [1, 7, 2, 5], [4], [6])]
    tokens = Dataset.from_list([dict(zip(names, pair, strict=True)) for pair in turns])
    groups, _ = group_by_prompt(tokens)
    read = PairCollator(tokens)(list(groups))["sequences"]
    assert read == [([1, 7], [2]), ([1, 7], [3]), ([1, 7, 2, 5], [4]), ([1, 7, 2, 5], [6])], "two turns under one id"


def test_what_all_prompts_begin_with_stands_once_in_a_row():
    packed = pack_shared_prefixes([([5, 1], [2]), ([5, 3], [4]), ([5], [6])], pad=0)
    assert packed.input_ids.tolist() == [[5, 1, 2, 3, 4, 6]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 1, 2, 1]]
    assert packed.attention_mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 0, 1, 0, 0],
        [1, 0, 0, 1, 1, 0],
        [1, 0, 0, 0, 0, 1],
    ]
    assert packed.columns == [[1, 2], [3, 4], [0, 5]]


TOKENS = st.lists(st.integers(1, 4), min_size=1, max_size=6)


@given(st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=8), st.integers(4, 40))
def test_every_sequence_is_found_whole_in_its_row_and_sees_only_itself(sequences, limit):
    packed = pack_shared_prefixes(sequences, pad=0, limit=limit)
    for (prompt, reply), row, columns in zip(sequences, packed.rows, packed.columns, strict=True):
        seen = packed.attention_mask[row, 0, columns[-1]].nonzero()[:, 0]
        assert packed.input_ids[row, seen].tolist() == prompt + reply
        assert packed.position_ids[row, seen].tolist() == list(range(len(prompt + reply)))
        assert packed.input_ids[row, columns].tolist() == [prompt[-1], *reply]


def test_sharing_a_prompt_changes_neither_loss_nor_gradient(experiment, rows, tokenizer):
    """DPO's head over a batch of pairs against the same model's plain logits, row by row."""
    from trl.trainer.utils import add_fused_lm_head

    encoded = encode_pairs(rows[:3], tokenizer, TEMPLATES["chat"], 256)
    both = [(e["prompt_ids"], e[f"{side}_ids"]) for side in ("chosen", "rejected") for e in encoded]
    width = max(len(p) + len(r) for p, r in both)
    ids = torch.tensor([p + r + [tokenizer.pad_token_id] * (width - len(p) - len(r)) for p, r in both])
    labels = torch.tensor([[-100] * len(p) + r + [-100] * (width - len(p) - len(r)) for p, r in both])
    net = models.load(experiment.base, dtype=torch.float32)
    plain = net(input_ids=ids).logits[:, :-1].log_softmax(-1)
    mask = labels[:, 1:] != -100
    want = plain.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0] * mask
    want.sum().backward()
    grads = {n: p.grad.clone() for n, p in net.named_parameters()}
    net.zero_grad()
    add_fused_lm_head(net)
    trl_adapter.score_labelled_tokens_only(net)
    got = net(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
    assert torch.allclose(got, want, atol=1e-4)
    got.sum().backward()
    for name, p in net.named_parameters():
        assert torch.allclose(p.grad, grads[name], atol=2e-3, rtol=1e-3), name


def test_an_exported_reward_model_read_by_its_chat_template_gives_the_same_rewards(experiment, tmp_path):
    """Others render whole conversations; ChatML ends them with a line break, behind which no reward was trained to be read."""
    from ultramed.core.schema import ModelConfig
    from ultramed.report.export import export

    ours = experiment.train_reward_model("medical")
    export(ours, tmp_path / "m")
    theirs = models.base_model(ModelConfig(name=str(tmp_path / "m"), label="exported"))
    prompt = [{"role": "user", "content": "Which organ makes insulin?"}]
    rows = [{"prompt": prompt, "completion": [{"role": "assistant", "content": text}]} for text in ("The pancreas.", "None.")]
    found = [score_rows(*load_reward(art, torch.float32), rows, models.reward_template(art)) for art in (ours, theirs)]
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    assert found[0][0] != found[0][1]


def test_rewards_do_not_depend_on_batch_or_padding(experiment, tokenizer):
    net, _ = load_reward(experiment.train_reward_model("medical"), torch.float32)
    candidates = [
        (r["prompt"], c["text"]) for r in read_feedback(experiment.rank_candidates("medical"))[:6] for c in r["candidates"][:3]
    ]
    rows = [{"prompt": p, "completion": [{"role": "assistant", "content": t}]} for p, t in candidates]
    together = score_rows(net, tokenizer, rows, TEMPLATES["chat"], budget=10**6)
    alone = [score_rows(net, tokenizer, [row], TEMPLATES["chat"])[0] for row in rows]
    assert together == pytest.approx(alone, abs=1e-5)
    from transformers import AutoModelForSequenceClassification

    art = experiment.train_reward_model("medical")
    plain = AutoModelForSequenceClassification.from_pretrained(
        art.path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = encode_rows(rows[:1], tokenizer, TEMPLATES["chat"], 10**6)[0]["input_ids"]
    with torch.inference_mode():
        want = plain(torch.tensor([ids])).logits.item()
    assert alone[0] == pytest.approx(want, abs=1e-5), "what anyone else's loader gives"


def test_a_reward_model_learns_its_pairs(experiment):
    art = experiment.train_reward_model("medical", learning_rate=1e-2, epochs=8)
    log = [json.loads(line) for line in (art / "log.jsonl").read_text().splitlines()]
    accuracy = [e["accuracy"] for e in log if "accuracy" in e]
    assert np.mean(accuracy[-3:]) > 0.8
    with pytest.raises(ConfigError, match="not a reward model"):
        load_reward(experiment.base)


def test_reward_from_the_command_line_scores_anyones_pairs(experiment, tmp_path):
    rows = [
        {"id": i, "subset": "mine", "prompt": f"What is {i} + 1?", "chosen": str(i + 1), "rejected": "no idea"}
        for i in range(5)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def call(arm):
        command = [
            "reward",
            "--model",
            experiment.train_reward_model(arm).key,
            "--pairs",
            str(tmp_path / "pairs.jsonl"),
            "--out",
            str(tmp_path / "o"),
        ]
        return subprocess.run([sys.executable, "-m", "ultramed", *command], capture_output=True, text=True, check=False)

    first = call("medical")
    assert first.returncode == 0, first.stderr
    assert "mine" in first.stdout
    assert call("medical").returncode == 0
    assert set(json.loads((tmp_path / "o" / "results.json").read_text())) == {"model", "model_type", "chat_template", "mine"}
    assert len((tmp_path / "o" / "scores.jsonl").read_text().splitlines()) == 5, "scored once"
    other = call("general")
    assert other.returncode == 2
    assert "another model" in other.stderr


def test_bad_pairs_name_file_row_and_field(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": "p", "chosen": "a", "rejected": "a"}')
    with pytest.raises(BadRow, match=r"pairs.jsonl, row 2.*prefers nothing"):
        read(path, "pairs")
    path.write_text('{"prompt": "p", "chosen": "a"}')
    with pytest.raises(BadRow, match=r"row 1.*rejected"):
        read(path, "pairs")
