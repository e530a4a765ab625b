"""Every architecture gives the numbers that eager transformers gives for one sequence at a time, or is refused.

The reference reads each sequence alone, without padding, cache or our attention.
"""

import pytest
import torch
from families import FAMILIES, NOT_CLASSIFIERS, VOCABULARY, save, tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ultramed.core.schema import ModelConfig
from ultramed.evaluate.generate import Sampling, _pick, ends, generate, item_rng
from ultramed.evaluate.likelihood import score
from ultramed.lm import architecture, models
from ultramed.lm.architecture import plain_length

FAST = {"llama", "mistral_wide", "qwen3", "qwen3_moe", "gemma", "phi", "granite", "olmo2", "smollm3", "glm4", "gpt_neox"}


def tokens(n, seed):
    return torch.randint(10, VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


START = tokens(30, 1)  # longer than the window, shorter than where phi3_long's frequencies change
PROMPTS = [
    tokens(60, 2),
    START + tokens(4, 3),
    START + tokens(35, 4),
    tokens(5, 5),
    START + tokens(80, 6),
    START + tokens(4, 3),
]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(name, ours, eager transformers') in fp32."""
    art = save(request.param, tmp_path_factory.mktemp("families"))
    eager = AutoModelForCausalLM.from_pretrained(
        **models.location(art), attn_implementation="eager", dtype=torch.float32
    ).eval()
    return request.param, models.load(art, dtype=torch.float32), eager


@torch.inference_mode()
def logits(net, ids):
    return net(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def continued(net, prompt, sampling, rng):
    """Token by token, everything read anew each time."""
    made, end = [], ends(net, tokenizer())
    while len(made) < sampling.max_new_tokens and not (made and made[-1] in end):
        made += _pick(logits(net, prompt + made)[-1:], sampling, [rng])
    return made


def test_the_fast_paths_serve_what_they_fit(family):
    name, ours, _ = family
    assert (plain_length(ours) > 4000) == (name in FAST | {"deepseek_v3", "gpt2", "opt"})
    assert plain_length(ours) < 24 or plain_length(ours) > 4000 or name == "phi3_long"


def test_reading_by_transformers_is_told_once(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(architecture, "_told", set())
    caplog.set_level("INFO")
    for name in ("llama", "phi3_long", "mamba2", "phi3_long"):
        models.load(save(name, tmp_path), dtype=torch.float32)
    told = [line for line in caplog.messages if "transformers' own code" in line]
    assert told == [
        "Phi3ForCausalLM: what is longer than 40 tokens is read by transformers' own code, more slowly",
        "Mamba2ForCausalLM: it is read by transformers' own code, more slowly",
    ]


def test_what_was_read_before_does_not_count(tmp_path):
    art = save("llama_dynamic", tmp_path)
    items = [(tokens(n, n), [[11], [12], [13]]) for n in (63, 64, 70, 120)]
    fresh = [score(models.load(art, dtype=torch.float32), tokenizer(), [item])[0] for item in items]
    for ids, sums in zip(items, fresh, strict=True):
        plain = AutoModelForCausalLM.from_pretrained(**models.location(art), dtype=torch.float32).eval()
        assert sums == pytest.approx(logits(plain, ids[0])[-1].log_softmax(-1)[[11, 12, 13]].tolist(), abs=1e-3)
    together = score(models.load(art, dtype=torch.float32), tokenizer(), items)  # the longest first
    for a, b in zip(together, fresh, strict=True):
        assert a == pytest.approx(b, abs=1e-3)


def test_a_model_s_own_penalties_are_not_applied(tmp_path):
    from transformers import GenerationConfig

    art = save("mistral", tmp_path)
    ours = models.load(art, dtype=torch.float32)
    plain = generate(ours, tokenizer(), PROMPTS, Sampling(12), budget=400)
    ours.generation_config = own = GenerationConfig(eos_token_id=2, repetition_penalty=1.3, no_repeat_ngram_size=1)
    assert generate(ours, tokenizer(), PROMPTS, Sampling(12), budget=400) == plain
    assert ours.generation_config is own


def test_a_model_that_is_misread_is_left_to_transformers(monkeypatch, tmp_path):
    art = save("llama", tmp_path)
    monkeypatch.setattr(architecture, "_probed", {})
    monkeypatch.setattr(architecture, "_packed_is_right", lambda net: False)
    assert plain_length(models.load(art, dtype=torch.float32)) == 0
    monkeypatch.undo()
    assert plain_length(models.load(art, dtype=torch.float32)) > 4000


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_replies_are_those_of_eager_transformers(family, temperature):
    _, ours, eager = family
    sampling, tok = Sampling(12, temperature, top_k=20, top_p=0.9), tokenizer()
    rngs = [item_rng(0, i) for i in range(len(PROMPTS))]
    got = generate(ours, tok, PROMPTS, sampling, rngs=rngs, budget=400)
    alone = generate(ours, tok, PROMPTS[:1], sampling, rngs=[item_rng(0, 0)])
    want = [continued(eager, p, sampling, item_rng(0, i)) for i, p in enumerate(PROMPTS)]
    assert [r.text for r in got] == [tok.decode(w, skip_special_tokens=True) for w in want]
    assert [r.tokens for r in got] == [len(w) for w in want]
    assert alone[0] == got[0]


def test_option_logps_are_those_of_eager_transformers(family):
    _, ours, eager = family
    endings = [[11], [12], tokens(3, 7), tokens(9, 8)]
    items = [(p, endings) for p in PROMPTS] + [(p, [[11], [12], [13]]) for p in PROMPTS]
    for (context, given), sums in zip(items, score(ours, tokenizer(), items, budget=300), strict=True):
        for ending, got in zip(given, sums, strict=True):
            logps = logits(eager, context + ending)[len(context) - 1 : -1].log_softmax(-1)
            assert got == pytest.approx(logps.gather(1, torch.tensor(ending)[:, None]).sum().item(), abs=1e-3)


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - NOT_CLASSIFIERS))
def test_rewards_are_those_of_eager_transformers(name, tmp_path):
    from ultramed.train.reward import load_reward

    art = save(name, tmp_path, "reward")
    ours = load_reward(art, torch.float32)[0]
    eager = AutoModelForSequenceClassification.from_pretrained(
        **models.location(art), attn_implementation="eager", dtype=torch.float32
    ).eval()
    sequences = [(p, tokens(n, n)) for p in PROMPTS for n in (3, 14)]
    with torch.inference_mode():
        got = ours(sequences)
        want = torch.stack([eager(input_ids=torch.tensor([p + r])).logits[0, 0] for p, r in sequences])
    assert torch.allclose(got, want, atol=1e-3)


@pytest.mark.parametrize("end", ["<|im_end|>\n", "<|im_end|>", "[/turn]"])
def test_a_reward_model_from_elsewhere_reads_conversations_by_its_own_template(tmp_path, end):
    """Behind a reply stands what its template puts there, which need not be the end token and nothing else."""
    from ultramed.train.reward import load_reward, score_rows

    art, own = save("llama", tmp_path, "reward"), tokenizer()
    template = own.chat_template.replace("<|im_end|>\n", end)
    assert (template == own.chat_template) == (end == "<|im_end|>\n")
    path = tmp_path / "llama-reward/chat_template.jinja"
    path.write_text(template)
    art = models.base_model(ModelConfig(name=str(path.parent), label="elsewhere"))
    prompt = [{"role": "user", "content": "Which organ makes insulin?"}]
    texts = ("The pancreas.", "No organ.", "Beta cells do")
    rows = [{"prompt": prompt, "completion": [{"role": "assistant", "content": text}]} for text in texts]
    net, tok = load_reward(art, torch.float32)
    got = score_rows(net, tok, rows, models.reward_template(art))
    eager = AutoModelForSequenceClassification.from_pretrained(
        **models.location(art), attn_implementation="eager", dtype=torch.float32
    ).eval()
    for row, reward in zip(rows, got, strict=True):
        text = tok.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
        ids = tok(text, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            assert reward == pytest.approx(eager(input_ids=torch.tensor([ids])).logits[0, 0].item(), abs=1e-3)


@pytest.fixture
def trained(family, tmp_path_factory):
    """(name, artifact) ready to be trained: what the tests below load is as `load_for_training` loads it."""
    name, _, _ = family
    if name == "mamba2":
        pytest.skip("no gradient through its CPU kernel in fp32 to compare")
    if name == "recurrent_gemma":
        pytest.skip("TRL's head leaves out the cap on its logits, which the model's own forward has")
    return name, save(name, tmp_path_factory.mktemp("trained"))


def gradients(net):
    found = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    return found


def same_gradients(a, b):
    assert a.keys() == b.keys()
    scale = max(g.abs().max() for g in b.values())
    return max((a[n] - b[n]).abs().max() / scale for n in a) < 1e-3


def arguments(kind, folder, **more):
    given = {"use_cpu": True, "bf16": False, "report_to": "none", "max_length": None, "disable_tqdm": True}
    return kind(output_dir=str(folder), remove_unused_columns=False, **given, **more)


def test_supervised_loss_and_gradients_are_plain_trls(trained, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from ultramed.core.schema import TrainConfig
    from ultramed.train.sft import Collator
    from ultramed.train.trl_adapter import routes_to_experts, score_labelled_tokens_only
    from ultramed.train.weights import load_for_training

    name, art = trained
    rows = [{"input_ids": (START if i % 2 else []) + tokens(10 + 9 * i, i)} for i in range(4)]
    rows = [{**row, "prompt_length": len(row["input_ids"]) - 6} for row in rows]
    found = []
    for ours in (True, False):
        net = load_for_training(art, TrainConfig(learning_rate=1e-4, mixture={"x": 1}))
        if not ours and name not in ("falcon", "falcon_alibi"):  # those cannot change it once loaded
            net.set_attn_implementation("eager")
        net.eval()
        trainer = SFTTrainer(
            net,
            arguments(SFTConfig, tmp_path, dataset_kwargs={"skip_prepare_dataset": True}),
            Collator(0, masked=True),
            Dataset.from_list(rows),
            processing_class=tokenizer(),
        )
        if ours:
            score_labelled_tokens_only(net)
        loss = trainer.compute_loss(net, Collator(0, masked=not ours or routes_to_experts(net))(rows))
        loss.backward()
        found.append((loss.item(), gradients(net)))
    (a, ga), (b, gb) = found
    assert a == pytest.approx(b, abs=1e-4)
    assert same_gradients(ga, gb)


def test_dpo_loss_and_gradients_are_plain_trls(trained, tmp_path):
    import trl
    from datasets import Dataset

    from ultramed.core.schema import PreferenceConfig
    from ultramed.train.trl_adapter import score_labelled_tokens_only, with_our_rows
    from ultramed.train.weights import load_for_training

    name, art = trained
    rows = [
        {"prompt_ids": START + tokens(5 * i + 1, i), "chosen_ids": tokens(4 + i, 50 + i), "rejected_ids": tokens(9 - i, 60 + i)}
        for i in range(3)
    ]
    found = []
    for ours in (True, False):
        net, frozen = (load_for_training(art, PreferenceConfig(learning_rate=1e-4)).eval() for _ in range(2))
        with torch.no_grad():
            for p in frozen.parameters():
                p.mul_(0.9)
        if not ours and name not in ("falcon", "falcon_alibi"):
            net.set_attn_implementation("eager")
            frozen.set_attn_implementation("eager")
        args = arguments(trl.DPOConfig, tmp_path, beta=0.5, disable_dropout=True)
        trainer = with_our_rows(trl.DPOTrainer)(
            net, frozen, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer()
        )
        if ours:
            score_labelled_tokens_only(net)
            score_labelled_tokens_only(frozen)
        loss = trainer.compute_loss(net, trainer.data_collator(rows))
        loss.backward()
        found.append((loss.item(), gradients(net)))
    (a, ga), (b, gb) = found
    assert a == pytest.approx(b, abs=2e-3)
    assert same_gradients(ga, gb)


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - NOT_CLASSIFIERS))
def test_reward_loss_and_gradients_are_plain_trls(name, tmp_path):
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    from ultramed.train.reward import PairCollator, group_by_prompt
    from ultramed.train.trl_adapter import listwise_reward_trainer, score_last_tokens, with_our_rows
    from ultramed.train.weights import trainable

    art = save(name, tmp_path, "reward")
    pairs = Dataset.from_list(
        [
            {
                "prompt_id": str(i),
                "prompt_ids": START + tokens(5 * i + 1, i),
                "chosen_ids": tokens(4 + i, 50 + i),
                "rejected_ids": tokens(9 - i, 60 + i),
            }
            for i in range(3)
        ]
    )
    rows = group_by_prompt(pairs)[0]
    plain = [{f"{side}_ids": row["prompt_ids"] + row[f"{side}_ids"] for side in ("chosen", "rejected")} for row in pairs]
    found = []
    for ours in (True, False):
        net = trainable(AutoModelForSequenceClassification, art, num_labels=1).eval()
        net.config.pad_token_id = 0
        if not ours and name not in ("falcon", "falcon_alibi"):
            net.set_attn_implementation("eager")
        kind = with_our_rows(listwise_reward_trainer()) if ours else with_our_rows(RewardTrainer)
        given = {"data_collator": PairCollator(pairs)} if ours else {}
        if ours:
            score_last_tokens(net, 0)
        trainer = kind(
            net,
            args=arguments(RewardConfig, tmp_path),
            train_dataset=rows if ours else Dataset.from_list(plain),
            processing_class=tokenizer(),
            **given,
        )
        loss = trainer.compute_loss(net, trainer.data_collator(list(rows) if ours else plain))
        loss.backward()
        found.append((loss.item(), gradients(net)))
    (a, ga), (b, gb) = found
    assert a == pytest.approx(b, abs=1e-4)
    assert same_gradients(ga, gb)
