"""Supervised fine-tuning here and by a plain TRL script: trained tokens per second, and the loss that comes out.

    python tests/benchmarks/sft_vs_trl.py [--rows 96 --dtype auto]

SmolLM2-135M, full fine-tuning on real rows of Medical Meadow (ULTRAMED_DATA), all of a row's tokens trained, the same token
ids, batches, rate and steps. The TRL script has the settings of alignment-handbook's SmolLM2 recipe: batches of 4 in random
order, padded to their longest row, 4 accumulation steps, logits of every position, AdamW, cosine; with gradient
checkpointing and bf16 weights as there, and (the stronger rival here) without checkpointing and with fp32 weights under
autocast, as ours. Each runs in a process of its own.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ARMS = ("ours", "trl", "trl, as in the handbook")


def rows_of(given):
    from ultramed.core import config
    from ultramed.core.schema import TrainConfig
    from ultramed.data.rows import read_instructions
    from ultramed.data.sources import dataset
    from ultramed.lm import models
    from ultramed.lm.templates import TEMPLATES
    from ultramed.train.token_rows import encode_instructions

    profile = config.load_profile("laptop")
    base = models.base_model(profile.models[0])
    tokenizer = models.load_tokenizer(base)
    setting = TrainConfig(
        mixture={"wikidoc_patient_information": given.rows},
        train_on_inputs=True,
        max_length=1024,
        learning_rate=given.rate,
        global_batch_size=16,
        dtype=given.dtype,
        seed=given.seed,
    )
    found = read_instructions(dataset(profile, "wikidoc_patient_information") / "train.parquet")
    encoded = encode_instructions(found[: given.rows + given.held], tokenizer, TEMPLATES["chat"], setting.max_length)
    return base, tokenizer, setting, encoded[: given.rows], encoded[given.rows :]


def ours(given, out):
    from datasets import Dataset

    from ultramed.train import training
    from ultramed.train.sft import make_trainer
    from ultramed.train.weights import load_for_training

    base, tokenizer, setting, rows, held = rows_of(given)
    net = load_for_training(base, setting)
    trainer = make_trainer(net, tokenizer, Dataset.from_list(rows), setting, out)
    clock = time.perf_counter()
    training.run(trainer, trainer.args.max_steps, "ours")
    return time.perf_counter() - clock, net, rows, held


def trl(given, out, handbook):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    base, tokenizer, setting, rows, held = rows_of(given)
    bf16 = setting.dtype in ("auto", "bfloat16")
    dtype = torch.bfloat16 if handbook and bf16 else torch.float32
    args = SFTConfig(
        output_dir=str(out),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        num_train_epochs=1,
        learning_rate=given.rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(0.1 * math.ceil(len(rows) / 16)),
        gradient_checkpointing=handbook,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        max_length=1024,
        packing=False,
        loss_type="nll",
        seed=given.seed,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    net = AutoModelForCausalLM.from_pretrained(base.path, dtype=dtype)
    data = Dataset.from_list([{"input_ids": r["input_ids"], "labels": r["input_ids"]} for r in rows])
    trainer = SFTTrainer(net, args, train_dataset=data, processing_class=tokenizer)
    clock = time.perf_counter()
    trainer.train()
    return time.perf_counter() - clock, net, rows, held


@torch.no_grad()
def loss(net, rows) -> float:
    """Mean negative log-likelihood of the held rows' tokens, in fp32, one row at a time."""
    net.float().eval()
    total = count = 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        logits = net(input_ids=ids).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return total / count


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--held", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arm", choices=ARMS, help="only this one, in this process")
    given = parser.parse_args()
    if not given.arm:
        print(f"{'':24} tokens  seconds  tokens/s  peak GB  held loss", flush=True)
        found = {}
        for arm in ARMS:
            done = subprocess.run([sys.executable, *sys.argv, "--arm", arm], stdout=subprocess.PIPE, text=True, check=True)
            m = found[arm] = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{arm:24} {m['tokens']:6}  {m['seconds']:7.1f}  {m['speed']:8.0f}  {m['peak']:7.1f}  {m['loss']:9.4f}",
                flush=True,
            )
        for arm in ARMS[1:]:
            print(f"ours is {found['ours']['speed'] / found[arm]['speed']:.2f}x {arm}")
        return
    from ultramed.core.log import quiet_libraries
    from ultramed.core.store import PeakMemory

    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder, PeakMemory() as memory:
        if given.arm == "ours":
            seconds, net, rows, held = ours(given, Path(folder))
        else:
            seconds, net, rows, held = trl(given, Path(folder), given.arm != "trl")
    tokens = sum(len(r["input_ids"]) for r in rows)
    made = {"tokens": tokens, "seconds": seconds, "speed": tokens / seconds, "peak": memory.peak / 1e9, "loss": loss(net, held)}
    print(json.dumps(made))


if __name__ == "__main__":
    main()
