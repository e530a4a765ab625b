"""Bradley-Terry reward models through TRL, and scores of replies under them."""

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from ultramed.core.errors import ConfigError
from ultramed.core.schema import RewardConfig, TokenConfig
from ultramed.core.store import Artifact, stage
from ultramed.lm import models
from ultramed.lm.architecture import context_length, probe
from ultramed.lm.attention import use_cpu_attention
from ultramed.lm.batches import batches
from ultramed.lm.device import free_memory, placement, quietly
from ultramed.lm.templates import Template, wording
from ultramed.lm.tokens import encode_rows
from ultramed.train import launch, training
from ultramed.train.crew import each
from ultramed.train.launch import distributed
from ultramed.train.token_rows import read_tokens, token_rows, tokenizer_of
from ultramed.train.trl_adapter import listwise_reward_trainer, score_last_tokens, with_our_rows
from ultramed.train.weights import trainable


class PairCollator:
    """Every distinct reply once, behind its prompt, with the pairs as indices into the replies.

    All C(K, 2) pairs of a prompt stay in one batch and need K replies read, not K (K - 1) (Ouyang et al. 2022, section
    3.5), and the prompt once (lm/batches.py).
    """

    def __init__(self, pairs):
        self.pairs = pairs  # token rows, of which a group's `members` are the numbers

    def __call__(self, groups: list[dict]) -> dict:
        seen: dict[tuple, int] = {}
        index, prompts = [], []
        for number, group in enumerate(groups):
            part = self.pairs[group["members"]]
            prompts.append(part["prompt_ids"][0])
            for pair in zip(part["chosen_ids"], part["rejected_ids"], strict=True):
                index.append([seen.setdefault((number, tuple(reply)), len(seen)) for reply in pair])
        return {"sequences": [(prompts[n], list(reply)) for n, reply in seen], "pairs": torch.tensor(index)}


def group_by_prompt(pairs):
    """(dataset of prompts with the numbers of their pairs, `members`, and `length`, the tokens that a batch reads of them;
    counts) of token rows."""
    from datasets import Dataset

    names = pairs["prompt_id"][:]
    order = sorted(range(len(names)), key=names.__getitem__)
    groups, counts = [], {"pairs": len(names), "replies": 0, "tokens": 0}
    for _, members in itertools.groupby(order, key=names.__getitem__):
        members = list(members)
        part = pairs[members]
        by_text: dict[tuple, list[int]] = {}  # turns of one conversation may come under one id
        for place, prompt in enumerate(part["prompt_ids"]):
            by_text.setdefault(tuple(prompt), []).append(place)
        for prompt, places in by_text.items():
            replies = {tuple(part[side][i]) for side in ("chosen_ids", "rejected_ids") for i in places}
            length = len(prompt) + sum(map(len, replies))
            groups.append({"members": [members[i] for i in places], "length": length})
            counts["replies"] += len(replies)
            counts["tokens"] += length
    return Dataset.from_list(groups), counts


@stage(version=5, also=wording)
def reward(out: Path, config: RewardConfig, *, model: Artifact, pairs: Artifact, template: str | None = None) -> dict:
    """Train a reward model from `model` (an instruct model) on `pairs`; a prompt's pairs stay in one batch.

    `global_batch_size` counts prompts. Writes a sequence-classification model with one output and `log.jsonl`.
    """
    if config.method != "full":
        raise ConfigError(f"reward models are trained in full, as in the paper; got method {config.method!r}")
    metadata = models.card(model)
    if metadata["kind"] == "adapter":
        raise ConfigError("a reward model starts from a whole model; merge the adapter first")
    tokenizer, shape = models.load_tokenizer(model), models.template_of(model, template)
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ConfigError(
            "the tokenizer has no token to pad with apart from its end token, and other loaders of reward models read the last "
            "token that is not padding; add one (tokenizer.add_special_tokens with a pad_token, then resize the model's "
            "embeddings) and save the model with it"
        )
    wanted = TokenConfig(kind="pairs", max_length=config.max_length)
    rows = token_rows(wanted, model=tokenizer_of(model), data=pairs, template=shape.name)
    return _train(out, config, model=model, rows=rows, template=shape.name)


@distributed
def _train(out: Path, config: RewardConfig, *, model: Artifact, rows: Artifact, template: str) -> dict:
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig as Arguments

    tokenizer, data = models.load_tokenizer(model), read_tokens(rows)
    groups, counts = group_by_prompt(data)
    torch.manual_seed(config.seed)  # the new head
    with quietly():
        net = trainable(AutoModelForSequenceClassification, model, empty=launch.awaits_weights(), num_labels=1)
    net.config.pad_token_id = tokenizer.pad_token_id
    torch.nn.init.normal_(net.score.weight, std=1 / (net.config.hidden_size + 1) ** 0.5)  # Stiennon et al. 2020
    if not launch.sharded():
        probe(net)
    score_last_tokens(net, tokenizer.pad_token_id)
    micro, accumulation = training.batch_plan(training.cap_micro_batches(config), max(groups["length"]))
    steps = training.step_count(config, len(groups))
    args = Arguments(
        **training.settings(config, out, steps, micro, accumulation), center_rewards_coefficient=config.centre or None
    )
    with warnings.catch_warnings(action="ignore"):
        trainer = with_our_rows(listwise_reward_trainer())(
            net, args=args, data_collator=PairCollator(data), train_dataset=groups, processing_class=tokenizer
        )
        result = training.run(trainer, steps, f"reward model lr {config.learning_rate:g}")
    kept = training.save(net, tokenizer, out, model, "full", kind="reward", dtype=config.dtype, template=template)
    del trainer, net
    free_memory()
    return {
        **result,
        **kept,
        "micro_batch": micro,
        "accumulation": accumulation,
        "prompts": len(groups),
        "dropped": rows.metrics["dropped"],
        **counts,
    }


def load_reward(model: Artifact, dtype: torch.dtype | None = None):
    """(reward model, tokenizer), ready for `score_rows`. Raises ConfigError if the artifact is not one."""
    from transformers import AutoModelForSequenceClassification

    place, metadata = placement(), models.card(model)
    if metadata["kind"] not in ("reward", "reference"):
        raise ConfigError(f"{model.stage}/{model.key} is not a reward model but {metadata['kind']}; train one with `reward`")
    with quietly():
        given = {**models.weights_of(model), **models.straight_to_gpu(), "dtype": dtype or place.dtype}
        net = AutoModelForSequenceClassification.from_pretrained(**given)
    net, tokenizer = use_cpu_attention(net.to(place.device)).eval(), models.load_tokenizer(model)
    if net.config.num_labels != 1:
        raise ConfigError(f"{models.card(model)['name']}: a reward model has one output, this one {net.config.num_labels}")
    probe(net)
    score_last_tokens(net, tokenizer.pad_token_id)
    return net, tokenizer


def score_rows(
    net,
    tokenizer,
    rows: list[dict],
    template: Template,
    *,
    budget: int = 8192,
    done: Callable[[list[int], list[float]], None] | None = None,
) -> list[float]:
    """Rewards of rows with `prompt` and `completion` messages, in their order; nothing is cut. `done(indices, rewards)` is
    called after every batch. net: a reward model, or a crew that holds it (train/crew.py).

    Raises ConfigError for rows that do not fit into the model's context.
    """
    groups: dict[tuple, list[tuple[int, list[int]]]] = {}
    room = context_length(net)
    for number, made in enumerate(encode_rows(rows, tokenizer, template, max_length=10**9)):
        start = made["prompt_length"]
        if len(made["input_ids"]) > room:
            raise ConfigError(f"row {number + 1}: {len(made['input_ids'])} tokens do not fit into the model's {room} positions")
        groups.setdefault(tuple(made["input_ids"][:start]), []).append((number, made["input_ids"][start:]))
    scores, shared = [0.0] * len(rows), list(groups.items())
    plan = [
        [(number, (list(shared[i][0]), ids)) for i in batch for number, ids in shared[i][1]]
        for batch in batches([len(prompt) + sum(len(ids) for _, ids in part) for prompt, part in shared], budget)
    ]
    tasks = [{"sequences": [sequence for _, sequence in batch]} for batch in plan]
    for number, values in each(net, tokenizer, rewards, tasks):
        indices = [index for index, _ in plan[number]]
        for index, value in zip(indices, values, strict=True):
            scores[index] = value
        if done:
            done(indices, values)
    return scores


@torch.inference_mode()
def rewards(net, tokenizer, sequences: list[tuple[list[int], list[int]]]) -> list[float]:
    """Of one batch of (prompt, completion) token ids."""
    return net(sequences).tolist()
