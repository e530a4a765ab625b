"""Rows as token ids, made once: an Arrow file that every rank and every arm reads in place, without holding it in memory."""

import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np

from ultramed.core.errors import ConfigError
from ultramed.core.progress import bar as progress_bar
from ultramed.core.schema import TokenConfig
from ultramed.core.signals import end_with_parent
from ultramed.core.store import Artifact, find, stage
from ultramed.data import rows as canonical
from ultramed.lm import models
from ultramed.lm.device import cores
from ultramed.lm.templates import RELEASED, TEMPLATES, Template, wording
from ultramed.lm.tokens import encode_rows

BATCH = 256  # rows that are tokenised at once
WHOLE = 10**9  # tokens: nothing is cut off
PART = 20_000  # rows of a piece; up to so many, one process is done before others are at work


def tokenizer_of(model: Artifact) -> Artifact:
    """The base that a model's tokenizer came with: training copies it as it is."""
    base = models.card(model).get("base")
    return tokenizer_of(find(base)) if base else model


@stage(version=2, also=wording)
def token_rows(out: Path, config: TokenConfig, *, model: Artifact, data: Artifact, template: str) -> dict:
    """Tokenise and lint the rows (`rows.parquet`) or pairs (`pairs.parquet`) of `data` with the tokenizer of `model`.

    Ask with `tokenizer_of(model)`, so that all models that come from one base share the result. Read it with `read_tokens`.
    With `packing` the metrics count the packed rows as `rows` and the rows of `data` as `documents`.
    Raises ConfigError if nothing fits into `max_length`, and TemplateError for a malformed row.
    """
    from datasets import Dataset, DatasetInfo, concatenate_datasets, disable_progress_bars

    disable_progress_bars()
    scratch = out / ".scratch"
    shutil.rmtree(scratch, ignore_errors=True)  # of an attempt that was cut off
    source = str(data / _kind(config.kind)[0]), str(scratch)
    rows = Dataset.from_parquet(source[0], cache_dir=source[1])
    given = [(*source, config, model, template, k, min(k + PART, len(rows))) for k in range(0, len(rows), PART)]
    if len(given) < 2 or cores() == 1:
        files = [_part(*each) for each in given]
    else:  # the tokenizer's own threads are no faster than one
        context = multiprocessing.get_context("spawn")
        with (
            progress_bar(len(rows), "tokens", "row") as bar,
            ProcessPoolExecutor(cores(), context, initializer=end_with_parent) as pool,
        ):
            waiting = [pool.submit(_part, *each) for each in given]
            for future in as_completed(waiting):
                if future.exception():
                    pool.shutdown(cancel_futures=True)  # an error should not wait for all other rows
                future.result()
                bar.update(min(PART, len(rows) - bar.n))
        files = [future.result() for future in waiting]
    made = concatenate_datasets([Dataset.from_file(file) for file in files]) if files else rows
    if not len(made):
        raise ConfigError(f"none of {len(rows)} {config.kind} fits into max_length {config.max_length}: nothing to train on")
    counts = {"dropped": len(rows) - len(made)}
    if config.kind == "instructions":
        counts |= {"tokens": sum(made["length"]), "truncated": sum(made["truncated"])}
        counts["completion_tokens"] = counts["tokens"] - sum(made["prompt_length"])
    if config.packing:
        counts["documents"] = len(made)
        made = Dataset.from_file(_packed(made, config.max_length, f"{scratch}/packed.arrow"))
    Dataset(made.data, DatasetInfo(features=made.features)).save_to_disk(out / "tokens")  # without the paths of this machine
    counts |= {"rows": len(made), "longest": max(made["length"])}
    del rows, made
    shutil.rmtree(scratch)
    return counts


def _part(file: str, scratch: str, config: TokenConfig, model: Artifact, template: str, first: int, end: int) -> str:
    """Tokenise rows `first` to `end` of a Parquet file; the Arrow file that they are in."""
    from datasets import Dataset, Features, disable_progress_bars

    disable_progress_bars()
    rows = Dataset.from_parquet(file, cache_dir=scratch)
    rows = rows.select(range(first, end))
    tokenizer, (_, encode, columns) = models.load_tokenizer(model), _kind(config.kind)

    def tokenised(batch: dict[str, list]) -> dict[str, list]:
        given = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        made = encode(given, tokenizer, TEMPLATES[template], WHOLE if config.packing else config.max_length)
        return {name: [row[name] for row in made] for name in columns}

    made = f"{scratch}/tokens-{first}.arrow"
    told = {"remove_columns": rows.column_names, "features": Features(columns), "cache_file_name": made}
    rows.map(tokenised, batched=True, batch_size=BATCH, **told)
    return made


def _packed(rows, length: int, file: str) -> str:
    """Write token rows one after the other, cut every `length` tokens, into the Arrow file `file`; every token is trained on.

    UltraMedical's run_sft.py packs so (TRL's ConstantLengthDataset of 2024): a block may begin inside a reply, and its tokens
    see those of the conversations before them in the block. TRL's `pack_dataset` begins a new block at every thousandth row;
    here only the last block is shorter. One difference to the released run remains: it dropped the rest of each of its buffers.
    """
    from datasets import Features
    from datasets.arrow_writer import ArrowWriter

    rest = np.empty(0, np.int32)
    with ArrowWriter(path=file, features=Features(_kind("instructions")[2])) as writer:
        for table in rows.with_format("arrow").iter(1000):
            rest = np.concatenate([rest, *(part.flatten().to_numpy() for part in table["input_ids"].chunks)])
            for start in range(0, len(rest) - length + 1, length):
                writer.write(_block(rest[start : start + length]))
            rest = rest[len(rest) // length * length :]
        if len(rest):
            writer.write(_block(rest))
        writer.finalize()
    return file


def _block(ids: np.ndarray) -> dict:
    return {"input_ids": ids, "prompt_length": 0, "truncated": False, "length": len(ids)}


def _kind(kind: str):
    """(file, function that encodes, columns) of a kind of rows."""
    from datasets import List, Value

    number, ids = Value("int32"), List(Value("int32"))
    if kind == "instructions":
        columns = {"input_ids": ids, "prompt_length": number, "truncated": Value("bool"), "length": number}
        return "rows.parquet", encode_instructions, columns
    columns = {"prompt_id": Value("string"), "prompt_ids": ids, "chosen_ids": ids, "rejected_ids": ids, "length": number}
    return "pairs.parquet", encode_pairs, columns


def encode_instructions(rows: list[dict], tokenizer, template: Template, max_length: int) -> list[dict]:
    """Canonical instructions as token rows: `input_ids`, `prompt_length`, `truncated`, `length`; linted. Rows of whose
    completion nothing is left are dropped."""
    made = encode_rows(rows, tokenizer, template, max_length, checked=True)
    return [{**row, "length": len(row["input_ids"])} for row in made if row]


def encode_pairs(rows: list[dict], tokenizer, template: Template, max_length: int) -> list[dict]:
    """Canonical pairs as `prompt_ids`, `chosen_ids`, `rejected_ids`, linted, with `length`, the longer one's with its prompt,
    and `prompt_id`.

    Pairs that do not fit whole are dropped: cutting a completion would make a reply without an end the better one.
    """
    sides = [{"prompt": row["prompt"], "completion": row[side]} for side in ("chosen", "rejected") for row in rows]
    made = encode_rows(sides, tokenizer, template, max_length, checked=template.name != RELEASED)
    out = []
    for row, chosen, rejected in zip(rows, made[: len(rows)], made[len(rows) :], strict=True):
        if not chosen or not rejected or chosen["truncated"] or rejected["truncated"]:
            continue
        start = chosen["prompt_length"]
        ids = {"prompt_ids": chosen["input_ids"][:start], "chosen_ids": chosen["input_ids"][start:]}
        ids["rejected_ids"] = rejected["input_ids"][start:]
        longest = max(len(chosen["input_ids"]), len(rejected["input_ids"]))
        out.append({"prompt_id": canonical.prompt_id(row), **ids, "length": longest})
    return out


def read_tokens(made: Artifact):
    """The token rows of `made`: a `datasets.Dataset` over files that stay on disk."""
    from datasets import Dataset

    return Dataset.load_from_disk(str(made / "tokens"))
