"""The same questions through lm-evaluation-harness: the same prompts, and the same choice item by item."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from ultramed.core.profile import BenchSection
from ultramed.core.schema import ModelConfig
from ultramed.data.rows import read_questions
from ultramed.evaluate.accuracy import answers, read_answers, select_rows
from ultramed.evaluate.likelihood import lm_eval_prompt
from ultramed.experiments.bench import TASKS, medical_questions, setting
from ultramed.lm import models


def as_the_harness_has_it(row: dict) -> tuple[str, dict]:
    """(the harness' file for the row's task, under its tasks/; the row with the columns of the hub's copy that the file
    names)."""
    question, texts, gold = row["question"], list(row["options"].values()), list(row["options"]).index(row["gold"])
    if row["dataset"] == "medqa":
        return "medqa/medqa.yaml", {"sent1": question, **{f"ending{i}": text for i, text in enumerate(texts)}, "label": gold}
    if row["dataset"] == "medmcqa":
        return "medmcqa/medmcqa.yaml", {
            "question": question,
            **{f"op{letter}": text for letter, text in zip("abcd", texts, strict=True)},
            "cop": gold,
        }
    if row["dataset"] == "pubmedqa":
        contexts = row["context"].split("\n")
        return "pubmedqa/pubmedqa.yaml", {"QUESTION": question, "CONTEXTS": contexts, "final_decision": texts[gold]}
    return f"mmlu/default/mmlu_{row['subset']}.yaml", {"question": question, "choices": texts, "answer": gold}


def write_task(folder: Path, name: str, rows: list[dict], target: str = "letter") -> None:
    """The harness' own task over our rows of one data set and subset: its prompt, its choices, its targets."""
    import lm_eval.tasks

    [file] = {as_the_harness_has_it(row)[0] for row in rows}
    docs = folder / f"{name}.json"
    docs.write_text("\n".join(json.dumps(as_the_harness_has_it(row)[1]) for row in rows))
    ours = {
        "include": str(Path(lm_eval.tasks.__file__).parent / file),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(docs)}},
        "test_split": "test",
        **dict.fromkeys(("training_split", "validation_split", "fewshot_split", "tag", "task_alias")),
    }
    if target == "text":
        ours["doc_to_choice"] = "{{[ending0, ending1, ending2, ending3]}}"
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(ours))


def harness(model, tasks: dict[str, list[dict]], folder: Path, batch_size=8, dtype=torch.float32, target="letter") -> dict:
    """Task -> samples of lm-eval's own evaluator and model class, in the order of the rows."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    for name, rows in tasks.items():
        write_task(folder, name, rows, target)
    lm = HFLM(pretrained=str(model.path), dtype=dtype, batch_size=batch_size, device="cpu")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    made = lm_eval.simple_evaluate(lm, tasks=list(tasks), task_manager=manager, log_samples=True, bootstrap_iters=0)
    return {name: sorted(samples, key=lambda sample: sample["doc_id"]) for name, samples in made["samples"].items()}


def tasks_of(questions) -> dict[str, list[dict]]:
    """Task -> its canonical rows, those that the bench asks."""
    rows = [row for part in questions for row in select_rows(read_questions(part.artifact / "test.parquet"), part.select)]
    return {f"local_{task}": [row for row in rows if (row["dataset"], row["subset"]) == where] for task, where in TASKS.items()}


@pytest.mark.parametrize(("name", "limit"), [("tiny:llama", 20), ("bundled:smollm2-135m", 10)])
def test_every_task_has_the_same_prompts_choices_and_answers(data, tmp_path, name, limit):
    """`limit` questions of each of the nine tasks: many with the tiny model, and some with a real one, in fp32 both."""
    questions, missing = medical_questions(limit=limit)
    assert not missing
    tasks = tasks_of(questions)
    assert {task: len(rows) for task, rows in tasks.items()} == {f"local_{task}": limit for task in TASKS}
    model = models.base_model(ModelConfig(name=name, label="x"))
    ours = {}
    for part in questions:
        asked = answers(setting(BenchSection()), model=model, questions=part.artifact, select=part.select, dtype="float32")
        ours |= {(part.name, row.id): row for row in read_answers(asked).itertuples()}
    theirs = harness(model, tasks, tmp_path)
    asked = 0
    for task, rows in tasks.items():
        for row, sample in zip(rows, theirs[task], strict=True):
            context, continuations = lm_eval_prompt(row)
            assert sample["arguments"] == [(context, text) for text in continuations]
            answer, logps = ours.pop((row["dataset"], row["id"]), None), [response[0] for response in sample["filtered_resps"]]
            if answer is None:
                continue  # it does not fit into the tiny model's context
            asked += 1
            assert answer.logps == pytest.approx(logps, abs=2e-3)
            assert answer.letter == list(row["options"])[max(range(len(logps)), key=logps.__getitem__)]
            assert answer.correct == bool(sample["acc"])
    assert not ours
    assert asked >= (170 if name.startswith("tiny") else 9 * limit)
