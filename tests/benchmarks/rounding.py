"""What of an update is left once weights are rounded to bf16: of the change itself, and of what it had won in loss.

    python tests/benchmarks/rounding.py [--rates 1e-5 3e-5 2e-4 --lora 2e-5 2e-4 --steps 27]

SmolLM2-135M, whose weights bf16 holds exactly, on rows of the laptop profile (notebook 11), trained in fp32 and rounded to the
nearest number of bf16, as it is when it is saved; and, for comparison, up or down at random such that the mean is right
(stochastic rounding). Losses are of 64 of the training rows, in nats a labelled token, all computed in fp32.
"""

import argparse

import torch
from torch.nn.functional import cross_entropy

from ultramed.core.config import arm_config, load_profile
from ultramed.data.rows import read_instructions
from ultramed.experiments.medalpaca import MedAlpaca
from ultramed.lm import models
from ultramed.lm.merging import update_kept
from ultramed.lm.templates import TEMPLATES
from ultramed.train.token_rows import encode_instructions


def nearest(p: torch.Tensor) -> torch.Tensor:
    return p.bfloat16().float()


def stochastic(p: torch.Tensor) -> torch.Tensor:
    noise = torch.randint(0, 1 << 16, p.shape, dtype=torch.int32)
    return ((p.contiguous().view(torch.int32) + noise) & -(1 << 16)).view(torch.float32)


@torch.inference_mode()
def loss(net, rows: list[dict]) -> float:
    nats = tokens = 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        logits = net(input_ids=ids).logits[0, row["prompt_length"] - 1 : -1]
        nats += cross_entropy(logits, ids[0, row["prompt_length"] :], reduction="sum").item()
        tokens += len(logits)
    return nats / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", type=float, nargs="*", default=[1e-5, 3e-5, 2e-4], help="of full fine-tuning")
    parser.add_argument("--lora", type=float, nargs="*", default=[2e-5, 2e-4], help="of LoRA, merged")
    parser.add_argument("--steps", type=int, default=27)
    given = parser.parse_args()
    profile = load_profile("laptop")
    experiment = MedAlpaca.of(profile)
    rows = read_instructions(experiment.training_rows(arm_config(profile, "full")) / "rows.parquet")[:64]
    rows = encode_instructions(rows, models.load_tokenizer(experiment.base), TEMPLATES["chat"], 512)
    start = models.load(experiment.base, dtype=torch.float32, device="cpu")
    weights, before = {name: p.detach().clone() for name, p in start.named_parameters()}, loss(start, rows)
    print(
        "| method | rate | loss before | after, fp32 | nearest | stochastic | change kept | of the gain, nearest | stochastic |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for method, rate in [*(("full", rate) for rate in given.rates), *(("lora", rate) for rate in given.lora)]:
        made = experiment.train_arm(method, learning_rate=rate, max_steps=given.steps, dtype="float32")
        net = models.load(made, dtype=torch.float32, device="cpu")
        trained = {name: p.detach().clone() for name, p in net.named_parameters()}
        moved = [(weights[name], value) for name, value in trained.items() if not torch.equal(value, weights[name])]
        kept, found = update_kept(moved, torch.bfloat16), {"fp32": loss(net, rows)}
        torch.manual_seed(0)
        for how in (nearest, stochastic):
            for name, p in net.named_parameters():
                p.data = how(trained[name])
            found[how.__name__] = loss(net, rows)
        share = [f"{100 * (before - found[how]) / (before - found['fp32']):.0f}%" for how in ("nearest", "stochastic")]
        numbers = " | ".join(f"{value:.3f}" for value in (before, *found.values()))
        print(f"| {method} | {rate:g} | {numbers} | {kept:.2f} | {share[0]} | {share[1]} |", flush=True)


if __name__ == "__main__":
    main()
