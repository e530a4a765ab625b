"""RewardBench's four sections out of public preference data, for where RewardBench itself is not at hand.

Read from `ULTRAMED_DATA`. They are stand-ins, not RewardBench: same kind of question, other rows.

| section | pairs | who prefers |
| --- | --- | --- |
| chat | AlpacaEval (Dubois et al. 2024, arXiv 2404.04475): the preferred reply is the longer one | GPT-4 turbo |
| chat_hard | AlpacaEval: the preferred reply is the shorter one, so that paying for length is punished | GPT-4 turbo |
| safety | HH-RLHF harmless (Bai et al. 2022, arXiv 2204.05862) | people |
| reasoning | GSM8K (Cobbe et al. 2021, arXiv 2110.14168): a solution against the same with another result | the result |
"""

import random
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from pydantic import Field

from ultramed.core.errors import ConfigError
from ultramed.core.schema import Strict
from ultramed.core.store import sha256, stage
from ultramed.data import rows as canonical
from ultramed.data.conversations import transcript
from ultramed.data.formats import read_table
from ultramed.data.messages import as_completion
from ultramed.data.sources import data_root

Made = Iterator[tuple[list[dict], str, str]]  # prompt, chosen, rejected


def _alpaca_eval(rows: list[dict], shorter: bool) -> Made:
    for row in rows:
        if abs(row["preference"] - 1.5) < 0.4:  # the annotator hesitated
            continue
        texts = [row["output_1"], row["output_2"]]
        chosen, rejected = texts if row["preference"] < 1.5 else texts[::-1]
        if (len(chosen) < len(rejected)) == shorter:
            yield [{"role": "user", "content": row["instruction"]}], chosen, rejected


def _safety(rows: list[dict]) -> Made:
    for row in rows:
        *prompt, chosen = transcript(row["chosen"])
        *same, rejected = transcript(row["rejected"])
        if prompt == same and prompt and chosen["content"] and rejected["content"]:
            yield prompt, chosen["content"], rejected["content"]


def _reasoning(rows: list[dict]) -> Made:
    for number, row in enumerate(rows):
        steps, _, result = row["answer"].partition("\n#### ")
        steps = re.sub(r"<<.*?>>", "", steps)
        whole = result.replace(",", "").strip()
        wrong = str(int(whole) + random.Random(number).choice([-10, -2, -1, 1, 2, 10]))
        yield [{"role": "user", "content": row["question"]}], f"{steps}\n#### {whole}", f"{steps}\n#### {wrong}"


SECTIONS: dict[str, tuple[str, Callable[[list[dict]], Made]]] = {
    "chat": ("preference/alpaca_eval_gpt4turbo_pairs.parquet", partial(_alpaca_eval, shorter=False)),
    "chat_hard": ("preference/alpaca_eval_gpt4turbo_pairs.parquet", partial(_alpaca_eval, shorter=True)),
    "safety": ("preference/hh_rlhf_harmless_base_test.parquet", _safety),
    "reasoning": ("gsm8k/test.parquet", _reasoning),
}


class PublicConfig(Strict):
    """`count` pairs a section, drawn with `seed`; both replies are cut to their first `words` words."""

    count: int = Field(100, ge=1)
    words: int = Field(120, ge=10)
    seed: int = 0


def files() -> dict[str, Path]:
    """section -> file, for the sections that are at hand."""
    root = data_root()
    return {name: root / path for name, (path, _) in SECTIONS.items() if (root / path).is_file()} if root else {}


@stage(version=1, also=lambda config: {name: sha256(path) for name, path in files().items()})
def public_pairs(out: Path, config: PublicConfig) -> dict:
    """Write `pairs.parquet`, subset = section. Raises ConfigError if no section is at hand."""
    there = files()
    if not there:
        raise ConfigError(f"public pairs need ULTRAMED_DATA with {', '.join(sorted({p for p, _ in SECTIONS.values()}))}")
    made, counts = [], {}
    for name, path in there.items():
        found = [
            {
                "id": f"{name}:{number}",
                "source": "public",
                "subset": name,
                "prompt": prompt,
                "chosen": as_completion(chosen),
                "rejected": as_completion(rejected),
            }
            for number, (prompt, chosen, rejected) in enumerate(
                (prompt, _cut(a, config.words), _cut(b, config.words))
                for prompt, a, b in SECTIONS[name][1](read_table(path))
                if name != "reasoning" or len(a.split()) <= config.words  # the difference is at the end
            )
            if chosen != rejected
        ]
        picked = random.Random(f"{config.seed}:{name}").sample(found, min(config.count, len(found)))
        made += picked
        counts[name] = {"pairs": len(picked), "of": len(found)}
    canonical.write_rows(out / "pairs.parquet", made)
    return {"pairs": len(made), "sections": counts}


def _cut(text: str, words: int) -> str:
    """The first `words` words, with the white space between them."""
    ends = [m.end() for m in re.finditer(r"\S+", text)]
    return text if len(ends) <= words else text[: ends[words - 1]]
