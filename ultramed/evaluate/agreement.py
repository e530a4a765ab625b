"""Do engines, dtypes and batch sizes give the same answers? The same items asked in several ways, and how many answers flip.

Rounding differs between them, and greedy decoding turns a near tie into another text. An accuracy difference smaller than
the flip rate between two engines says nothing about two models.
"""

from typing import get_args

import pandas as pd

from ultramed.core.config import known, overridden, validate
from ultramed.core.errors import ConfigError
from ultramed.core.schema import Dtype, EvalConfig
from ultramed.core.store import Artifact
from ultramed.evaluate import stats
from ultramed.evaluate.accuracy import answers, read_answers
from ultramed.lm import models

EXTRA_SETTINGS = ("dtype", "quantize", "model")  # of a variant, beside every key of EvalConfig


def variant(text: str) -> dict[str, str]:
    """'dtype=float32,batch_tokens=256' as a dictionary. Raises ConfigError for what is no setting."""
    out = {}
    for part in text.split(","):
        key, sep, value = part.partition("=")
        if not sep or not value:
            raise ConfigError(
                f"variant {text!r}: wanted key=value pairs with commas between, such as dtype=float32,batch_tokens=256"
            )
        known(key, [*EXTRA_SETTINGS, *EvalConfig.model_fields], "settings of a variant")
        out[key] = value
    return out


def settings(config: EvalConfig, text: str) -> tuple[EvalConfig, dict[str, str]]:
    """(configuration, dtype, quantize and model of its own) of a variant, '' for the configuration as it is.

    Raises ConfigError for anything impossible, so that a slip shows before the first question is asked.
    """
    change = variant(text) if text else {}
    extra = {key: change.pop(key) for key in EXTRA_SETTINGS if key in change}
    setting = validate(
        EvalConfig, overridden(config.model_dump(), [f"{k}={v}" for k, v in change.items()]), f"variant {text!r}"
    )
    known(extra.get("dtype", "auto"), get_args(Dtype), "dtypes")
    known(extra.get("quantize", "8bit"), ("8bit", "4bit"), "quantisations")
    if setting.engine != "transformers" and (setting.protocol != "greedy" or "quantize" in extra):
        raise ConfigError(
            f"variant {text!r}: engine {setting.engine} has the greedy protocol only, and no quantisation of its own"
        )
    return setting, extra


def ask(config: EvalConfig, text: str, *, model: Artifact, questions: Artifact, **given) -> pd.DataFrame:
    """Answers of one variant."""
    setting, extra = settings(config, text)
    if "model" in extra:
        model = models.resolve(extra.pop("model"))
    return read_answers(answers(setting, model=model, questions=questions, **{**given, **extra}))


def flips(frames: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Every variant beside the first: variant, accuracy, low, high, n, changed (other answers), changed_low, changed_high,
    lost (right there, wrong here), won, p (McNemar's exact test)."""
    (first, base), *_ = frames.items()
    out = []
    for name, frame in frames.items():
        both = base.merge(frame, on="id", suffixes=("_a", "_b"), validate="one_to_one")
        if len(both) != len(base):
            raise ValueError(f"{name!r} has answers to {len(both)} of the {len(base)} questions of {first!r}")
        e = stats.wilson(both.correct_b)
        changed = stats.wilson(both.letter_a.fillna("-") != both.letter_b.fillna("-"))
        out.append(
            {
                "variant": name,
                **e.row(),
                "changed": changed.value,
                "changed_low": changed.low,
                "changed_high": changed.high,
                "lost": int((both.correct_a & ~both.correct_b).sum()),
                "won": int((~both.correct_a & both.correct_b).sum()),
                "p": stats.mcnemar(both.correct_a, both.correct_b),
            }
        )
    return pd.DataFrame(out)
