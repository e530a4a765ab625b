"""The same questions through lm-evaluation-harness: the same prompts, and the same choice item by item."""

import json

import pytest
import torch

from ultramed.core.schema import EvalConfig, ModelConfig
from ultramed.data.rows import read_questions
from ultramed.data.sources import SourceConfig, source
from ultramed.evaluate.accuracy import answers, read_answers
from ultramed.evaluate.likelihood import lm_eval_prompt
from ultramed.lm import models

N = 200
TASK = """
task: local_medqa
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{{{sent1}}}}\\nA. {{{{ending0}}}}\\nB. {{{{ending1}}}}\\nC. {{{{ending2}}}}\\nD. {{{{ending3}}}}\\nAnswer:"
doc_to_target: label
doc_to_choice: {choices}
metric_list: [{{metric: acc}}]
"""


CHOICES = {"letter": "[A, B, C, D]", "text": '"{{[ending0, ending1, ending2, ending3]}}"'}


def harness(model, rows: list[dict], folder, batch_size: int = 8, dtype=torch.float32, target: str = "letter") -> dict:
    """Results of lm-eval's own evaluator and model class on the rows as a local task with medqa_4options' prompt."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    docs = [
        {
            "sent1": r["question"],
            **{f"ending{i}": v for i, v in enumerate(r["options"].values())},
            "label": "ABCD".index(r["gold"]),
        }
        for r in rows
    ]
    (folder / "docs.json").write_text("\n".join(map(json.dumps, docs)))
    (folder / "local_medqa.yaml").write_text(TASK.format(file=folder / "docs.json", choices=CHOICES[target]))
    lm = HFLM(pretrained=str(model.path), dtype=dtype, batch_size=batch_size, device="cpu")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(lm, tasks=["local_medqa"], task_manager=manager, log_samples=True, bootstrap_iters=0)


def test_prompts_are_the_harness_own(data):
    """Our context and continuations against those that the harness' task functions make."""
    from lm_eval.tasks.medmcqa.utils_medmcqa import doc_to_text as medmcqa
    from lm_eval.tasks.medqa.preprocess_medqa import doc_to_text as medqa
    from lm_eval.tasks.pubmedqa.preprocess_pubmedqa import doc_to_text as pubmedqa

    for row in read_questions(source(SourceConfig(name="medqa")) / "test.parquet")[:50]:
        doc = {"sent1": row["question"], **{f"ending{i}": v for i, v in enumerate(row["options"].values())}}
        assert lm_eval_prompt(row) == (medqa(doc), [" A", " B", " C", " D"])
    for row in read_questions(source(SourceConfig(name="medmcqa")) / "test.parquet")[:50]:
        doc = {"question": row["question"], **{f"op{k.lower()}": v for k, v in row["options"].items()}}
        assert lm_eval_prompt(row) == (medmcqa(doc), [" A", " B", " C", " D"])
    for row in read_questions(source(SourceConfig(name="pubmedqa")) / "test.parquet")[:50]:
        doc = {"QUESTION": row["question"], "CONTEXTS": row["context"].split("\n")}
        assert lm_eval_prompt(row) == (pubmedqa(doc), [" yes", " no", " maybe"])


def test_the_same_choice_on_every_question(data, tmp_path):
    questions = source(SourceConfig(name="medqa"))
    rows = read_questions(questions / "test.parquet")[:N]
    model = models.base_model(ModelConfig(name="bundled:smollm2-135m", label="x"))
    config = EvalConfig(protocol="likelihood", likelihood_prompt="lm_eval")
    ours = read_answers(answers(config, model=model, questions=questions, select={"medqa": [0, N]}, dtype="float32"))
    theirs = harness(model, rows, tmp_path)
    samples = sorted(theirs["samples"]["local_medqa"], key=lambda s: s["doc_id"])
    assert len(samples) == N
    ours = ours.set_index("id").loc[[r["id"] for r in rows]]
    for row, sample in zip(ours.itertuples(), samples, strict=True):
        logps = [r[0] for r in sample["filtered_resps"]]
        assert row.logps == pytest.approx(logps, abs=2e-3)
        assert row.letter == "ABCD"[max(range(4), key=logps.__getitem__)]
        assert row.correct == bool(sample["acc"])
    assert ours.correct.mean() == pytest.approx(theirs["results"]["local_medqa"]["acc,none"])
