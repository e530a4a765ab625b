"""The one place that reaches into TRL, transformers' Trainer and accelerate. Each override says what it replaces and why.

Everything above this module builds a trainer, runs it and saves a model through public interfaces only. What is used here
beyond them is checked by tests/test_trl_contract.py, which fails with what changed when a new version changes it.
"""

import functools
import os
import types

import torch

from ultramed.core.errors import ConfigError
from ultramed.lm.architecture import causal_lm, logits_only_at, plain_length, rope_limit
from ultramed.lm.batches import batches, pack_shared_prefixes, right_pad
from ultramed.lm.device import placement
from ultramed.lm.tokens import LABEL_IGNORED
from ultramed.train import launch, losses

# ----------------------------------------------------------------------------------------------------------- all trainers


@functools.cache
def with_our_rows(trainer: type) -> type:
    """A TRL trainer over rows that are tokenised and linted already, on one device, in our order. `args` is given by name."""

    class OverTokenRows(trainer):
        def __init__(self, *arguments, args, **named):
            # Of several GPUs Trainer would make threads of its own (DataParallel), and batches as many times larger.
            # Reading `n_gpu` counts the GPUs once; setting the private field afterwards is the only way to say "one".
            args._n_gpu = min(1, args.n_gpu)
            super().__init__(*arguments, args=args, **named)

        def train(self, *arguments, **named):
            from peft.helpers import disable_input_dtype_casting

            # Autocast casts what goes into an adapter; PEFT's own cast on top doubles what dropout keeps in memory.
            with disable_input_dtype_casting(self.model):
                return super().train(*arguments, **named)

        def _prepare_dataset(self, dataset, *_, **__):
            """TRL would tokenise: our rows are token ids, made and linted in lm/tokens.py."""
            return dataset

        def _load_best_model(self):
            """Each process looks for the folder of the best checkpoint while the first one makes it, and on CPUs transformers
            does not have them wait: one that came too early would load an older one, or find it gone."""
            best = f"checkpoint-{self.state.best_global_step}"
            self.state.best_model_checkpoint = os.path.join(self.args.output_dir, best)
            super()._load_best_model()

        def _get_train_sampler(self, dataset=None):
            """transformers' sampler for rows of similar length depends on the number of processes (see GroupedByLength)."""
            if self.args.train_sampling_strategy != "group_by_length":
                return super()._get_train_sampler(dataset)
            return GroupedByLength((dataset or self.train_dataset)["length"], self.args)

    OverTokenRows.__name__ = trainer.__name__
    return OverTokenRows


class GroupedByLength(torch.utils.data.Sampler):
    """transformers' order for rows of similar length, the same for any number of processes and after an interruption.

    Its own sampler groups by the batch of one process, and draws from the global random stream, in which dropout lets
    processes drift apart: from the second epoch on they would see some rows twice and others never.
    """

    def __init__(self, lengths: list[int], args):
        self.lengths, self.seed, self.epoch = list(lengths), args.seed, 0
        self.batch = args.train_batch_size * args.gradient_accumulation_steps * launch.world()

    def __len__(self):
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        from transformers.trainer_pt_utils import get_length_grouped_indices

        stream = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        torch.empty((), dtype=torch.int64).random_(generator=stream)  # a DataLoader draws its own seed first: the same order
        return iter(get_length_grouped_indices(self.lengths, self.batch, generator=stream))


# ------------------------------------------------------------------------------------------------------------ supervised


def split_by_tokens(inputs: dict, budget: int, least: int = 1) -> list[dict]:
    """The rows of a padded batch in micro-batches of at most `budget` padded tokens, longest first, each as wide as it must be.

    The labels of a row end where the row ends. least: make so many micro-batches even if fewer would do (no more than rows).
    """
    labelled = inputs["labels"] != LABEL_IGNORED
    place = torch.arange(1, labelled.shape[1] + 1, device=labelled.device)
    lengths = (labelled * place).amax(1).tolist()
    groups = list(batches(lengths, budget))
    while len(groups) < least:
        groups.sort(key=len)
        largest = groups.pop()
        groups += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
    if len(groups) == 1:
        return [inputs]
    return [{k: v[rows, : -(-max(lengths[i] for i in rows) // 8) * 8] for k, v in inputs.items()} for rows in groups]


@functools.cache
def token_budget_trainer() -> type:
    """SFTTrainer whose micro-batches are cut by tokens."""
    from trl import SFTTrainer

    class TokenBudgetTrainer(with_our_rows(SFTTrainer)):
        """A step's rows in micro-batches by their tokens: two long ones or forty short ones at once.

        Trainer's own micro-batches have a fixed number of rows, which the longest row of the data decides.
        """

        micro_batch_tokens = micro_batches = 0

        def training_step(self, model, inputs, num_items_in_batch=None):
            split = split_by_tokens(inputs, self.micro_batch_tokens)
            if launch.worker():  # as many backward passes as every other process has, or the collectives hang
                count = torch.tensor([len(split)], device=self.accelerator.device)
                if (most := self.accelerator.gather(count).max().item()) > len(split):
                    split = split_by_tokens(inputs, self.micro_batch_tokens, least=most)
            self.micro_batches += len(split)
            step = super().training_step
            return sum(step(model, part, num_items_in_batch) for part in split)

        def evaluation_loop(self, *given, metric_key_prefix="eval", **named):
            """The loss is of all labelled tokens. Trainer's is the mean of batches' means: the best checkpoint would go by how
            many rows this machine reads at once. (Where processes share the rows out, some may read the last ones twice.)"""
            self.evaluated = torch.zeros(2, device=self.args.device)
            made = super().evaluation_loop(*given, metric_key_prefix=metric_key_prefix, **named)
            nats, tokens = self.accelerator.reduce(self.evaluated)
            made.metrics[f"{metric_key_prefix}_loss"] = (nats / tokens).item()
            return made

        def prediction_step(self, model, inputs, *given, **named):
            tokens = (inputs["labels"][:, 1:] != LABEL_IGNORED).sum().to(self.args.device)
            loss, *more = super().prediction_step(model, inputs, *given, **named)
            self.evaluated += torch.stack([loss * tokens, tokens])
            return loss, *more

    return TokenBudgetTrainer


# ------------------------------------------------------------------------------------------------------------ preferences


@functools.cache
def pairwise_kto_trainer(detach: bool) -> type:
    """DPOTrainer with the loss that TRL dropped in 2024 (`loss_type: kto_pair`). detach: see train/losses.py."""
    from trl import DPOTrainer

    class PairwiseKTOTrainer(DPOTrainer):
        """Same batches, log-probabilities and metrics as DPO; only the loss differs (train/losses.py)."""

        def _compute_loss(self, model, inputs, return_outputs):
            """TRL computes log-probabilities, loss and metrics in this one private method, so all of it is replaced."""
            labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, LABEL_IGNORED)
            asked = {key: inputs[key] for key in ("input_ids", "attention_mask")}
            asked |= {"labels": labels, "use_cache": False, "fused_lm_head": True}
            policy = model(**asked).log_probs.sum(1)
            with torch.no_grad():
                if self.ref_model is None:  # an adapter's reference is the model without it
                    with self.accelerator.unwrap_model(self.model).disable_adapter():
                        reference = self.model(**asked).log_probs.sum(1)
                else:
                    reference = self.ref_model(**asked).log_probs.sum(1)
            chosen, rejected = (policy - reference).chunk(2)
            loss = losses.kto_pair(chosen, rejected, self.beta, detach).mean()
            self._note(policy, chosen, rejected)
            return (loss, None) if return_outputs else loss

        def _note(self, policy, chosen, rejected) -> None:
            """DPO's metrics, under DPO's names, into the private store that TRL's `log` reads."""
            metrics, gather = self._metrics["train" if self.model.training else "eval"], self.accelerator.gather
            for name, ratio, logps in zip(("chosen", "rejected"), (chosen, rejected), policy.chunk(2), strict=True):
                metrics[f"logps/{name}"].append(gather(logps.detach()).mean().item())
                metrics[f"rewards/{name}"].append(self.beta * gather(ratio.detach()).mean().item())
            margin = self.beta * gather((chosen - rejected).detach())
            metrics["rewards/margins"].append(margin.mean().item())
            metrics["rewards/accuracies"].append((margin > 0).float().mean().item())

    return PairwiseKTOTrainer


# ---------------------------------------------------------------------------------------------------------- reward models


@functools.cache
def listwise_reward_trainer() -> type:
    """RewardTrainer that reads each distinct reply of a prompt once."""
    from trl import RewardTrainer

    class ListwiseRewardTrainer(RewardTrainer):
        """RewardTrainer over batches of train/reward.PairCollator: the same loss."""

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            """TRL's reads chosen and rejected of each pair, so that K replies to a prompt are read K (K - 1) times."""
            scores = model(inputs["sequences"])
            chosen, rejected = scores[inputs["pairs"]].T
            loss = losses.bradley_terry(chosen, rejected, self.args.center_rewards_coefficient or 0.0)
            metrics = self._metrics["train" if self.model.training else "eval"]
            means = torch.stack([(chosen > rejected).float().mean(), (chosen - rejected).mean(), scores.mean()]).detach()
            means = self.accelerator.gather(means[None]).mean(0).tolist()
            for name, value in zip(("accuracy", "margin", "mean_reward"), means, strict=True):
                metrics[name].append(value)
            return (loss, scores) if return_outputs else loss

    return ListwiseRewardTrainer


def score_last_tokens(net, pad: int) -> None:
    """Make `net(sequences)`, a list of (prompt ids, reply ids), the rewards (N,): the score of each sequence's last token.

    What sequences share is read once where the architecture allows (lm/architecture.py), else each is a padded row.
    """

    def forward(self, sequences: list[tuple[list[int], list[int]]]):
        device = self.score.weight.device
        if max(len(prompt) + len(reply) for prompt, reply in sequences) <= plain_length(self):
            packed = pack_shared_prefixes(sequences, pad, device)
            hidden = self.base_model(**packed.inputs, use_cache=False).last_hidden_state
            last = hidden[packed.rows, [columns[-1] for columns in packed.columns]]
        else:
            read = [prompt + reply for prompt, reply in sequences]
            ids, lengths = right_pad(read, pad, device)
            # Where rotary frequencies go by the longest of a batch, a score would depend on the others.
            apart = not torch.is_grad_enabled() and ids.shape[1] > rope_limit(self.config)
            parts = [row[None, :length] for row, length in zip(ids, lengths, strict=True)] if apart else [ids]
            hidden = [self.base_model(input_ids=part, use_cache=False).last_hidden_state for part in parts]
            if apart:
                last = torch.cat([states[:, -1] for states in hidden])
            else:
                last = hidden[0][torch.arange(len(read), device=device), lengths - 1]
        return self.score(last)[:, 0].float()

    if not hasattr(net, "score"):
        raise ConfigError(f"{type(net).__name__} has no head called `score`: it cannot be read as a reward model here")
    net.forward = types.MethodType(forward, net)


# --------------------------------------------------------------------------------------------------------------- the head


def score_labelled_tokens_only(net) -> None:
    """On a CPU, give TRL's trainers log-probabilities of the labelled tokens without multiplying the others.

    Call it after the trainer was made: TRL 1.16 replaces the model's `forward` by its fused head, which, without Triton,
    scores every position of a batch with the whole vocabulary, twice, and masks the prompt afterwards. Here the vocabulary
    is multiplied at labelled positions only, by the model's own forward, and what rows of the batch share (a form of
    question, the prompt of chosen and rejected) is read once where the architecture allows (lm/architecture.py). Rows must
    be padded on the right and have their labels in one stretch at the end: then causal attention needs no mask, and none
    is passed on. Models with experts keep TRL's head, which adds the loss that balances them over all tokens of a batch.
    """
    from trl.trainer.utils import FusedCausalLMOutput

    inner = causal_lm(net)
    if placement().device != "cpu" or inner.base_model is inner or routes_to_experts(inner):
        return
    fused = inner.forward

    @functools.wraps(fused)
    def forward(self, *args, fused_lm_head=False, labels=None, num_items_in_batch=None, **kwargs):
        if not fused_lm_head:
            return fused(*args, labels=labels, num_items_in_batch=num_items_in_batch, **kwargs)
        target = labels[:, 1:] != LABEL_IGNORED
        inputs, rows, columns = _where_labels_are_predicted(self, kwargs["input_ids"], target)
        with logits_only_at(self, rows, columns):
            logits = type(self).forward(self, **inputs, use_cache=False).logits[0].float()
        wanted = labels[:, 1:][target]
        logps = -torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
        with torch.no_grad():  # what TRL's metrics read; entropy, the dear one, is the mean over every eighth token
            some = logits.detach()[::8].log_softmax(-1)
            entropy = -(some.exp() * some).sum(-1).mean().expand_as(logps)
            shown = {"entropy": entropy, "mean_logits": logits.mean(-1), "is_top1": logits.argmax(-1) == wanted}
        spread = {k: v.new_zeros(target.shape).masked_scatter(target, v) for k, v in {"log_probs": logps, **shown}.items()}
        count = target.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return FusedCausalLMOutput(loss=-logps.sum() / count, label_mask=target, **spread)

    inner.forward = types.MethodType(forward, inner)


def routes_to_experts(net) -> bool:
    """Whether TRL adds a loss over the router's choices at every token that the attention mask shows."""
    return hasattr(causal_lm(net).config.get_text_config(), "output_router_logits")


def _where_labels_are_predicted(net, input_ids: torch.Tensor, target: torch.Tensor) -> tuple[dict, list[int], list[int]]:
    """(model inputs, rows, columns): the tokens that predict the labelled ones, in the order of `target` (B, T - 1)."""
    first, count = target.int().argmax(1) + 1, target.sum(1)
    pairs = [(ids[:f].tolist(), ids[f : f + n].tolist()) for ids, f, n in zip(input_ids, first, count, strict=True)]
    if input_ids.shape[1] <= plain_length(net):
        packed = pack_shared_prefixes(pairs, pad=0, device=input_ids.device)
        if packed.input_ids.numel() <= 0.9 * input_ids.numel():  # else little is shared, and plain rows need no mask
            rows = [row for row, columns in zip(packed.rows, packed.columns, strict=True) for _ in columns[1:]]
            return packed.inputs, rows, [c for columns in packed.columns for c in columns[:-1]]
    rows, columns = target.nonzero(as_tuple=True)
    return {"input_ids": input_ids}, rows, columns


# ------------------------------------------------------------------------------------------------------------- accelerate


def shard_on_cpus() -> None:
    """Let accelerate shard over CPU processes: PyTorch can, but accelerate takes FSDP for accelerators' alone.

    Its state object decides this in `__init__` and keeps the answer in private fields, which are set afterwards.
    """
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    before = AcceleratorState.__init__

    @functools.wraps(before)
    def after(self, *args, fsdp_plugin=None, **kwargs):
        before(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = after
