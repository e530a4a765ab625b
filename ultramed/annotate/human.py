"""Real human rankings as feedback: MEDIQA 2019, about nine retrieved answers to each consumer health question.

Ben Abacha et al. 2019 (BioNLP, W19-5039): an expert's score of each answer (4 excellent, 3 correct but incomplete,
2 related, 1 incorrect) and rank. Read from `ULTRAMED_DATA/mediqa2019_qa`; there is no copy on the hub to fall back to.
"""

import json
from pathlib import Path

import pandas as pd
from pydantic import Field

from ultramed.annotate.pairs import PairConfig, pairs
from ultramed.core.errors import ConfigError
from ultramed.core.schema import Strict
from ultramed.core.store import Artifact, sha256, stage
from ultramed.data.sources import data_root

FILES = {"train": ["train_liveqamed.parquet", "train_alexa.parquet"], "validation": ["validation.parquet"]}
QUESTIONS = {"train": 208, "validation": 25}  # official sizes


class HumanConfig(Strict):
    """side 'train' or 'validation'; answers are cut to their first `words` words, since some are as long as a book chapter."""

    side: str = "train"
    questions: int = Field(0, ge=0)  # 0: all
    words: int = Field(120, ge=10)


def at_hand(side: str) -> list[Path]:
    """The files of a side, none where one of them is not there."""
    root = data_root()
    paths = [root / "mediqa2019_qa" / name for name in FILES[side]] if root else []
    return paths if all(p.is_file() for p in paths) else []


def _paths(side: str) -> list[Path]:
    paths = at_hand(side)
    if not paths:
        raise ConfigError(f"human rankings need ULTRAMED_DATA/mediqa2019_qa with {', '.join(FILES[side])}")
    return paths


@stage(version=1, also=lambda config: [sha256(p) for p in _paths(config.side)])
def human_feedback(out: Path, config: HumanConfig) -> dict:
    """`feedback.jsonl`: a row a question, candidates with the expert's score. Scores, not ranks, decide: equal ones are
    ties."""
    frame = pd.concat([pd.read_parquet(p).assign(file=p.stem) for p in _paths(config.side)])
    groups = list(frame.groupby(["file", "QID"], sort=True))
    if len(groups) != QUESTIONS[config.side]:
        raise ConfigError(f"mediqa2019_qa, {config.side}: {len(groups)} questions, expected {QUESTIONS[config.side]}")
    step = max(1, len(groups) // config.questions) if config.questions else 1
    taken = groups[::step][: config.questions or None]
    with open(out / "feedback.jsonl", "w") as fh:
        for (file, qid), part in taken:
            candidates = [
                {
                    "model": "retrieved",
                    "text": " ".join(row.AnswerText.split()[: config.words]),
                    "letter": None,
                    "score": float(row.ReferenceScore),
                    "rank": int(row.ReferenceRank),
                    "tokens": len(row.AnswerText.split()),
                }
                for row in part.itertuples()
            ]
            prompt = [{"role": "user", "content": " ".join(part.QuestionText.iloc[0].split())}]
            row = {"id": f"{file}:{qid}", "subset": "human", "concept": f"{file}:{qid}", "gold": "", "prompt": prompt}
            fh.write(json.dumps({**row, "candidates": candidates}, ensure_ascii=False) + "\n")
    return {"prompts": len(taken), "candidates": sum(len(p) for _, p in taken)}


def human_pairs(config: HumanConfig, per_prompt: int, seed: int = 0) -> Artifact:
    """All ordered pairs of answers with different scores, `per_prompt` of a question at most; subset 'human'."""
    given = PairConfig(take={"human": 0}, rule="all", margin=1.0, max_per_prompt=per_prompt, seed=seed)
    return pairs(given, human=human_feedback(config))
