"""A few made-up rows of every data set of the hub in the hub's own layout, as a folder for `ULTRAMED_HUB`."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ultramed.data.catalog import SOURCES

ORGANS = ["heart", "liver", "kidney", "lung", "spleen", "stomach", "bladder", "brain", "skin", "eye"]
SUBJECTS = SOURCES["mmlu_medical"].keep["subject"]
IDS = (Path(__file__).parents[1] / "ultramed/data/pubmedqa_test_ids.txt").read_text().split()


def chat(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def shares(n, *turns):
    return [{"from": who, "value": f"{text} {n}"} for who, text in zip(("human", "gpt") * 3, turns, strict=False)]


def mcq(n, side):
    """(question, four options, index of the answer)"""
    options = [ORGANS[(n + k) % len(ORGANS)] for k in range(4)]
    return f"Case {n} of {side}: which organ hurts when {ORGANS[n % 10]} pain is reported on day {n}?", options, n % 4


def medqa(n, side):
    question, options, gold = mcq(n, side)
    lettered = dict(zip("ABCD", options, strict=True))
    return {
        "question": question,
        "answer": options[gold],
        "options": lettered,
        "meta_info": "step1",
        "answer_idx": "ABCD"[gold],
    } | {"metamap_phrases": ["pain"]}


def medmcqa(n, side):
    question, options, gold = mcq(n, f"{side} of medmcqa")
    columns = dict(zip(("opa", "opb", "opc", "opd"), options, strict=True))
    return {"id": f"x{n}", "question": question, **columns, "cop": gold, "choice_type": "single", "exp": None} | {
        "subject_name": "Anatomy",
        "topic_name": None,
    }


def pubmedqa(n, side):
    context = {"contexts": [f"We saw {n} patients."], "labels": ["RESULTS"], "meshes": ["Pain"]}
    context |= {"reasoning_required_pred": ["y"], "reasoning_free_pred": ["y"]}
    number = int(IDS[n // 2]) if n % 2 else 10**8 + n
    return {"pubid": number, "question": f"Does it hurt more than {n}?", "context": context, "long_answer": "It does."} | {
        "final_decision": ("yes", "no", "maybe")[n % 3]
    }


def mmlu(n, side):
    question, options, gold = mcq(n, f"{side} of mmlu")
    return {"question": question, "subject": [*SUBJECTS, "astronomy"][n % 7], "choices": options, "answer": gold}


def alpaca(n, side):
    return {"instruction": f"Name organ {n}.", "input": "", "output": ORGANS[n % 10], "text": "as printed"}


def ultramedical(n, side):
    turns = shares(n, "Which organ hurts?", f"The {ORGANS[n % 10]} hurts, so the answer is A.")
    return {"id": f"MedQA,{n}", "type": "Exam", "conversations": turns, "answer": "A", "score": "I would rate this 7."}


def preference(n, side):
    kinds = ("easy", "hard", "length", *(["human"] if side == "test" else []))
    question = f"Why does organ {n} of {side} hurt?" if n else "Why does it hurt?"  # one prompt is on every side
    row = {"prompt_id": f"{side}{n}", "label_type": kinds[n % len(kinds)], "prompt": question}
    row |= {"chosen": chat(question, f"Because of {ORGANS[n % 10]}."), "rejected": chat(question, f"No idea, {n}.")}
    told = {"chosen": {"model": "gpt-4", "score": 5, "rank": 1}, "rejected": {"model": "llama", "score": 1 + n % 4, "rank": 2}}
    return row | ({} if side == "test" else {"feedback": "the first is better"}) | {"metadata": told}


def completion(text, **more):
    return {"model": text.split()[0], "principle": "none", "response": text, "critique": "good", **more}


def ultrafeedback(n, side):
    rated = [
        completion(f"{who} says {n}", **{"fine-grained_score": s, "overall_score": 10.0})
        for who, s in zip("abcd", (4, 2, 2, 5.0), strict=True)
    ]
    return {"source": "evol_instruct", "instruction": f"Question {n}", "models": list("abcd"), "completions": rated}


def ultrasafety(n, side):
    rated = [
        completion(f"{who} says {n}", annotations={"harmlessness": [{"Rating": r, "Rationale": "x"}]})
        for who, r in zip("ab", "10", strict=True)
    ]
    return {"source": "maliciousinstruct", "instruction": f"Harmful question {n}", "models": ["a", "b"], "completions": rated}


def ultrainteract(n, side):
    asked = [
        {"from": "user", "value": f"Task {n}"},
        {"from": "assistant", "value": "step 1"},
        {"from": "user", "value": "go on"},
    ]
    row = {"task": ("Math_CoT", "Coding")[n % 2], "dataset": "gsm8k", "trajectory": asked, "chosen": f"right {n}"}
    return row | {"rejected": f"wrong {n}", "id": str(n), "parent_id": str(n // 2)}


def rewardbench(n, side):
    subsets = ("alpacaeval-easy", "mt-bench-hard", "donotanswer", "math-prm", "hep-python")
    models = {"chosen_model": "a", "rejected_model": "b"}
    return {
        "prompt": f"Question {n}",
        "chosen": f"Right {n}",
        "rejected": f"Wrong {n}",
        **models,
        "subset": subsets[n % 5],
        "id": n,
    }


def rewardbench2(n, side):
    row = {"id": str(n), "prompt": f"Question {n}", "chosen": [f"Right {n}"], "rejected": [f"Wrong {n} {k}" for k in range(3)]}
    return row | {"num_correct": 1, "num_incorrect": 3, "total_completions": 4, "models": ["a"] * 4, "subset": "Factuality"}


def turns(n, side):
    return {"prompt": f"Organ {n}?", "prompt_id": str(n), "messages": chat(f"Organ {n}?", ORGANS[n % 10])}


ROWS = {
    "GBaker/MedQA-USMLE-4-options": medqa,
    "openlifescienceai/medmcqa": medmcqa,
    "qiaojin/PubMedQA": pubmedqa,
    "cais/mmlu": mmlu,
    "TsinghuaC3I/UltraMedical": ultramedical,
    "TsinghuaC3I/UltraMedical-Preference": preference,
    "openbmb/UltraFeedback": ultrafeedback,
    "openbmb/UltraSafety": ultrasafety,
    "openbmb/UltraInteract_pair": ultrainteract,
    "allenai/reward-bench": rewardbench,
    "allenai/reward-bench-2": rewardbench2,
    "HuggingFaceH4/ultrachat_200k": turns,
    "WizardLMTeam/WizardLM_evol_instruct_V2_196k": lambda n, side: {"idx": str(n), "conversations": shares(n, "Organ?", "Eye")},
    "Open-Orca/1million-gpt-4": lambda n, side: {
        "id": str(n),
        "system_prompt": "",
        "question": f"Organ {n}?",
        "response": "Eye",
    },
    "microsoft/orca-math-word-problems-200k": lambda n, side: {"question": f"What is {n} + 1?", "answer": str(n + 1)},
    "openai/gsm8k": lambda n, side: {
        "question": f"What is {n} + 1?",
        "answer": f"{n} + 1 = <<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}",
    },
    "timdettmers/openassistant-guanaco": lambda n, side: {
        "text": f"### Human: Organ {n}?### Assistant: {ORGANS[n % 10]}.### Human: Sure?### Assistant: Yes."
    },
    "keivalya/MedQuad-MedicalQnADataset": lambda n, side: {
        "qtype": "causes",
        "Question": f"What causes {n}?",
        "Answer": "Pain.",
    },
}


def steps(folder: Path, count: int) -> None:
    """The USMLE self-assessment: questions and solutions apart, a list of those with pictures."""
    for step in (1, 2, 3):
        made = [mcq(n, f"step {step}") for n in range(count)]
        rows = [{"no": n + 1, "question": q, "options": dict(zip("ABCD", o, strict=True))} for n, (q, o, _) in enumerate(made)]
        (folder / f"step{step}.json").write_text(json.dumps(rows))
        solutions = {str(n + 1): "ABCD"[gold] for n, (_, _, gold) in enumerate(made)}
        (folder / f"step{step}_solutions.json").write_text(json.dumps(solutions))
    (folder / "question_with_images.json").write_text(json.dumps({"step1": [2]}))


MANY = {
    ("tatsu-lab/alpaca", "train"): 4600,
    ("GBaker/MedQA-USMLE-4-options", "train"): 1400,
    ("openlifescienceai/medmcqa", "train"): 1400,
}


def build(root: Path, count: int = 42) -> Path:
    """Every repository that the catalogue names, with `count` rows a split, and more where profiles name slices (MANY)."""
    (root / "SAMPLE").touch()
    wanted: dict[str, set] = {}
    for spec in SOURCES.values():
        for hub_id, config, split, _ in spec.hub.values():
            wanted.setdefault(hub_id, set()).add((config, split))
    for hub_id, splits in wanted.items():
        folder = root / hub_id
        folder.mkdir(parents=True)
        if any(split == "steps" for _, split in splits):
            steps(folder, count)
            continue
        make = ROWS.get(hub_id, alpaca)
        card = ["---", "configs:"]
        for config in sorted({c or "default" for c, _ in splits}):
            card += [f"- config_name: {config}", "  data_files:"]
            for split in sorted(s for c, s in splits if (c or "default") == config):
                file = f"{config}/{split}-00000-of-00001.parquet"
                (folder / config).mkdir(exist_ok=True)
                pq.write_table(
                    pa.Table.from_pylist([make(n, split) for n in range(MANY.get((hub_id, split), count))]), folder / file
                )
                card += [f"  - split: {split}", f"    path: {file}"]
        (folder / "README.md").write_text("\n".join([*card, "---", ""]))
    return root
