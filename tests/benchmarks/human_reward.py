"""A reward model trained on real human rankings (MEDIQA 2019, train), judged on its validation questions.

    ULTRAMED_DATA=... python tests/benchmarks/human_reward.py [--questions 104] [--words 80] [--learning-rate 5e-5]

Prints accuracy on pairs with different expert scores, with a 95% interval clustered by question, beside what always
preferring the longer answer reaches.
"""

import argparse
import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")


from ultramed.annotate.human import HumanConfig, human_pairs
from ultramed.core.config import load_profile
from ultramed.core.log import quiet_libraries
from ultramed.core.schema import ScoringConfig
from ultramed.evaluate import reward_bench
from ultramed.evaluate.stats import clustered
from ultramed.lm import models
from ultramed.train.reward import reward

parser = argparse.ArgumentParser()
parser.add_argument("--questions", type=int, default=104)
parser.add_argument("--words", type=int, default=80)
parser.add_argument("--learning-rate", type=float, default=5e-5)
args = parser.parse_args()
quiet_libraries()
profile = load_profile("laptop")
base = models.base_model(profile.models[0])
setting = profile.ultramedical.reward.model_copy(
    update={"learning_rate": args.learning_rate, "max_length": 1024, "micro_batch_tokens": 2048}
)
train = human_pairs(HumanConfig(side="train", questions=args.questions, words=args.words), per_prompt=28)
held = human_pairs(HumanConfig(side="validation", words=args.words), per_prompt=28)
model = reward(setting, model=base, pairs=train)
frame = reward_bench.read_scores(reward_bench.pair_scores(ScoringConfig(), reward=model, pairs=held))
frame = frame.assign(prompt=frame.id.str.partition("#")[0])
ours = clustered(frame.correct, frame.prompt)
longer = clustered(frame.chosen_characters > frame.rejected_characters, frame.prompt)
print(
    json.dumps(
        {
            "train": {k: model.metrics[k] for k in ("prompts", "pairs", "replies", "tokens", "train_seconds")},
            "validation pairs": len(frame),
            "questions": int(frame.prompt.nunique()),
            "accuracy": str(ours),
            "always the longer answer": str(longer),
            "score against length": round(reward_bench.length_correlation(frame), 2),
        },
        indent=1,
    )
)
