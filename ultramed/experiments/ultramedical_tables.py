"""What notebooks 22 to 25 show of UltraMedical's experiments beside its published tables."""

from collections.abc import Iterable

import pandas as pd

from ultramed.core.store import Artifact
from ultramed.evaluate.arms import Arms
from ultramed.experiments.bench import TASKS
from ultramed.experiments.ultramedical import UltraMedical

PUBLISHED_SELECTIONS = {  # arm -> row of the paper's re-ranking
    "greedy": "Llama-3-8B UltraMix SFT / greedy",
    "self_consistency": "Llama-3-8B UltraMix SFT / self-consistency",
    "best_of_n": "Llama-3-8B UltraMix SFT / reward-model sorting",
}
PUBLISHED_GSM8K = {  # arm of notebook 23 -> row of the paper's general-domain table
    "base_gsm8k": "Llama-3-8B-Instruct / GSM8K / accuracy",
    "ultramix_gsm8k": "Llama-3-8B UltraMedical / GSM8K / accuracy",
}
TABLE2_COLUMNS = {"all": "avg", **{subset: task for task, (_, subset) in TASKS.items()}}  # subset -> column


def mixtures_table(experiment: UltraMedical, names: Iterable[str]) -> tuple[pd.DataFrame, list[Artifact]]:
    """(what each mixture is made of and how long its policy was trained, the artifacts)."""
    rows, artifacts = [], []
    for name in names:
        data, policy = experiment.training_rows(name), experiment.train_sft(name)
        trained = {"steps": policy.metrics["steps"], "tokens": policy.metrics["tokens"], "row ids": data.metrics["row_ids"]}
        for source, part in data.metrics["sources"].items():
            rows.append({"mixture": name, "source": source, "rows": part["rows"], "of": part["of"], **trained})
        artifacts += [data, policy]
    return pd.DataFrame(rows), artifacts


def general_cells(arms: Arms) -> pd.DataFrame:
    """Accuracies as cells of the general-domain table, which has GSM8K's in per cent and other benchmarks' otherwise."""
    found = arms.accuracy().query("subset == 'all'")
    per_cent = {"value": 100 * found.accuracy, "low": 100 * found.low, "high": 100 * found.high}
    return found[["arm", "n"]].assign(subset="value", **per_cent)


def published_rows(size: str) -> dict[str, str]:
    """Arm of notebook 22 -> its row in Table 2, of '8B' or '70B'."""
    segment, rows = f"{size} UltraMedical", {}
    base = {"8B": "~7B / Llama-3-8B-Instruct", "70B": ">40B / Llama-3-70B-Instruct"}[size]
    for mix, name in (("ultramed", "UltraMed"), ("ultramix", "UltraMix")):
        rows[f"{mix}_sft"] = f"{segment} / {name} + SFT"
        rows |= {f"{mix}_{arm}": f"{segment} / {name} + Vanilla {arm.upper()}" for arm in ("dpo", "kto")}
    if size == "8B":  # the paper iterated at this size only
        rows |= {f"ultramix_iterative_{arm}": f"{segment} / UltraMix + Iterative {arm.upper()}" for arm in ("dpo", "kto")}
    return {"base": base, **rows, "best_ensemble": f"{segment} / UltraMix Best (Ens)"}
