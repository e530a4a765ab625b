"""Bradley-Terry reward models through TRL, and scores of replies under them."""

import functools
import itertools
import warnings
from pathlib import Path

import torch

from ultramed import models, prompts
from ultramed.batching import batches, right_pad
from ultramed.data import rows as canonical
from ultramed.prompts import TEMPLATES, Template
from ultramed.schema import ConfigError, RewardConfig
from ultramed.store import Artifact, stage
from ultramed.train import loop, losses
from ultramed.train.preference import encode_pairs


class PairCollator:
    """Every distinct reply once, with the pairs as indices into them; right-padded, no attention mask.

    All C(K, 2) pairs of a prompt need K forward passes instead of K (K - 1) (Ouyang et al. 2022, section 3.5).
    """

    def __init__(self, pad_token_id: int):
        self.pad = pad_token_id

    def __call__(self, groups: list[dict]) -> dict:
        seen: dict[tuple, int] = {}
        index = [[seen.setdefault(tuple(ids), len(seen)) for ids in pair] for g in groups for pair in g["pairs"]]
        ids, lengths = right_pad([list(row) for row in seen], self.pad, "cpu")
        return {"input_ids": ids, "lengths": lengths, "pairs": torch.tensor(index)}


@functools.cache
def _trainer() -> type:
    from trl import RewardTrainer

    class ListwiseRewardTrainer(RewardTrainer):
        """RewardTrainer over batches of PairCollator: same loss, each reply read once."""

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            scores = model(inputs["input_ids"], inputs["lengths"])
            chosen, rejected = scores[inputs["pairs"]].T
            loss = losses.bradley_terry(chosen, rejected, self.args.center_rewards_coefficient or 0.0)
            metrics = self._metrics["train" if self.model.training else "eval"]
            metrics["accuracy"].append((chosen > rejected).float().mean().item())
            metrics["margin"].append((chosen - rejected).mean().item())
            metrics["mean_reward"].append(scores.mean().item())
            return (loss, scores) if return_outputs else loss

    return ListwiseRewardTrainer


def read_head(net) -> None:
    """Make `net(input_ids, lengths)` the rewards (B,) of right-padded sequences: the score of each one's last token.

    Taken by length, not by searching for padding, and without a mask, so that neither batch nor padding changes a score.
    """
    import types

    def forward(self, input_ids, lengths):
        hidden = self.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(lengths), device=hidden.device), lengths.to(hidden.device) - 1]
        return self.score(last)[:, 0].float()

    net.forward = types.MethodType(forward, net)


@stage(version=1, also=prompts.wording)
def reward(out: Path, config: RewardConfig, *, model: Artifact, pairs: Artifact, template: str = "chat") -> dict:
    """Train a reward model from `model` (an instruct model) on `pairs`; a prompt's pairs stay in one batch.

    `global_batch_size` counts prompts. Writes a sequence-classification model with one output and `log.jsonl`.
    """
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig as Arguments

    if config.method != "full":
        raise ConfigError(f"reward models are trained in full, as in the paper; got method {config.method!r}")
    about = models.card(model)
    if about["kind"] == "adapter":
        raise ConfigError("a reward model starts from a whole model; merge the adapter first")
    tokenizer, shape = models.load_tokenizer(model), TEMPLATES[template]
    rows = canonical.read_pairs(pairs / "pairs.parquet")
    groups, counts, longest = [], {"pairs": 0, "dropped": 0, "replies": 0, "tokens": 0}, 0
    rows.sort(key=lambda r: r["meta"].get("prompt_id", r["id"]))
    for _, part in itertools.groupby(rows, key=lambda r: r["meta"].get("prompt_id", r["id"])):
        try:
            encoded, count = encode_pairs(list(part), tokenizer, shape, config.max_length)
        except ConfigError:
            counts["dropped"] += 1
            continue
        pairs_of = [[e["prompt_ids"] + e["chosen_ids"], e["prompt_ids"] + e["rejected_ids"]] for e in encoded]
        replies = {tuple(ids) for pair in pairs_of for ids in pair}
        counts["pairs"] += len(pairs_of)
        counts["dropped"] += count["dropped"]
        counts["replies"] += len(replies)
        counts["tokens"] += sum(map(len, replies))
        longest = max(longest, sum(map(len, replies)))
        groups.append({"pairs": pairs_of})
    if not groups:
        raise ConfigError(f"no pair fits into max_length {config.max_length}: nothing to train on")
    torch.manual_seed(config.seed)  # the new head
    with models.quiet():
        net = AutoModelForSequenceClassification.from_pretrained(
            **models.location(model), num_labels=1, dtype=torch.float32, attn_implementation="sdpa", use_safetensors=True
        )
    net.config.pad_token_id = tokenizer.pad_token_id
    torch.nn.init.normal_(net.score.weight, std=1 / (net.config.hidden_size + 1) ** 0.5)  # Stiennon et al. 2020
    read_head(net)
    micro, accumulation = loop.batch_plan(config, longest)
    steps = loop.step_count(config, len(groups))
    args = Arguments(
        **loop.settings(config, out, steps, micro, accumulation),
        gradient_checkpointing=config.gradient_checkpointing,
        center_rewards_coefficient=config.centre or None,
        remove_unused_columns=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = loop.own_tokens(_trainer())(
            net, args=args, data_collator=PairCollator(tokenizer.pad_token_id), train_dataset=Dataset.from_list(groups),
            processing_class=tokenizer,
        )  # fmt: skip
        result = loop.run(trainer, steps, f"reward model lr {config.learning_rate:g}")
    loop.save(net, tokenizer, out, model, "full", kind="reward", template=template)
    del trainer, net
    models.free_memory()
    return {**result, "micro_batch": micro, "accumulation": accumulation, "prompts": len(groups), **counts}


def load_reward(model: Artifact):
    """The reward model, ready for `score_rows`. Raises ConfigError if the artifact is not one."""
    from transformers import AutoModelForSequenceClassification

    from ultramed.attention import cpu_attention

    place, about = models.placement(), models.card(model)
    if about["kind"] not in ("reward", "reference"):
        raise ConfigError(f"{model.stage}/{model.key} is not a reward model but {about['kind']}; train one with `reward`")
    with models.quiet():
        net = AutoModelForSequenceClassification.from_pretrained(
            **models.location(model), dtype=place.dtype, use_safetensors=True,
            attn_implementation=cpu_attention() if place.device == "cpu" else "sdpa",
        )  # fmt: skip
    if net.config.num_labels != 1:
        raise ConfigError(f"{models.card(model)['name']}: a reward model has one output, this one {net.config.num_labels}")
    read_head(net)
    return net.to(place.device).eval()


@torch.inference_mode()
def score_rows(net, tokenizer, rows: list[dict], template: Template, *, budget: int = 8192, bar=None) -> list[float]:
    """Rewards of rows with `prompt` and `completion` messages, in their order; nothing is cut."""
    ids = []
    for row in rows:
        made = prompts.encode(row, tokenizer, template, max_length=10**9)
        ids.append(made["input_ids"])
    scores = [0.0] * len(rows)
    for batch in batches([len(i) for i in ids], budget):
        tokens, lengths = right_pad([ids[i] for i in batch], tokenizer.pad_token_id, net.device)
        for i, value in zip(batch, net(tokens, lengths).tolist(), strict=True):
            scores[i] = value
        if bar is not None:
            bar.update(len(batch))
    return scores
