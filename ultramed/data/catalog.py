"""The named data sets of both papers and their evaluations: where they are, how many rows, whose, and how a row is read.

An adapter makes a canonical row (data/rows.py) of a raw one; `id`, `source` and `dataset` are filled in by the loader.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from ultramed.data.messages import as_completion


@dataclass(frozen=True)
class Source:
    """`files`: side -> (file under ULTRAMED_DATA/<folder or name>, rows). `hub`: side -> (hub id, config, split, rows
    or None where their number was not at hand)."""

    name: str
    kind: str  # questions, instructions, prompts or pairs
    licence: str
    cite: str
    adapt: Callable[[dict, int], dict]
    files: dict[str, tuple[str, int]] = field(default_factory=dict)
    hub: dict[str, tuple[str, str | None, str, int | None]] = field(default_factory=dict)
    note: str = ""
    folder: str = ""


def _lettered(options) -> dict[str, str]:
    if isinstance(options, dict):
        return {k: str(v).strip() for k, v in sorted(options.items()) if v is not None}
    return dict(zip("ABCDEFGH", (str(o).strip() for o in options), strict=False))


def _medqa(row: dict, i: int) -> dict:
    return {
        "question": row["question"].strip(),
        "options": _lettered(row["options"]),
        "gold": row["answer_idx"],
        "subset": "medqa",
    }


def _medmcqa(row: dict, i: int) -> dict:
    options = _lettered([row["opa"], row["opb"], row["opc"], row["opd"]])
    return {"question": row["question"].strip(), "options": options, "gold": "ABCD"[int(row["cop"]) - 1], "subset": "medmcqa"}


def _pubmedqa(row: dict, i: int) -> dict:
    options = {"A": "yes", "B": "no", "C": "maybe"}
    return {
        "id": f"pubmedqa:{row['PMID']}", "question": row["QUESTION"], "context": "\n".join(row["CONTEXTS"]),
        "options": options, "gold": {v: k for k, v in options.items()}[row["final_decision"]], "subset": "pubmedqa",
    }  # fmt: skip


def _mmlu(row: dict, i: int) -> dict:
    return {
        "id": f"mmlu:{row['subject']}:{row['index']}", "question": row["question"],
        "options": _lettered([row[k] for k in "ABCD"]), "gold": row["answer"], "subset": row["subject"],
    }  # fmt: skip


def _usmle(row: dict, i: int) -> dict:
    letters = {str(v).strip(): k for k, v in row["options"].items()}
    gold = row.get("answer_idx") or letters.get(str(row.get("answer", "")).strip(), "")
    return {"question": row["question"], "options": _lettered(row["options"]), "gold": gold, "subset": f"step{row['step']}"}


def alpaca_row(row: dict, i: int) -> dict:
    """instruction / input / output (Alpaca, Medical Meadow): the instruction becomes the system turn where there is an input."""
    given = (row.get("input") or "").strip()
    turns = [("system", row["instruction"].strip()), ("user", given)] if given else [("user", row["instruction"].strip())]
    return {
        "prompt": [{"role": r, "content": c} for r, c in turns],
        "completion": as_completion((row["output"] or "").strip()),
    }  # fmt: skip


def stated_score(sentence: str | None) -> float | None:
    """The 1-to-10 rating in UltraMedical's `score`, a sentence such as 'would be rated around a 7 or 8'; None if none is."""
    found = re.search(r"\b(?:rate|rated|rating|score)\b[^0-9]{0,80}?\b(10|[1-9](?:\.\d)?)\b", sentence or "", re.IGNORECASE)
    return float(found[1]) if found else None


def _conversation(row: dict, i: int) -> dict:
    """ShareGPT's `conversations` (UltraMedical): turns of 'human' and 'gpt', the last one is the answer."""
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    turns = [{"role": roles[t["from"]], "content": t["value"].strip()} for t in row["conversations"]]
    meta = {"task": str(row["id"]).partition(",")[0], "type": row.get("type") or "", "answer": str(row.get("answer") or "")}
    score = stated_score(row.get("score"))
    meta |= {"score": score} if score is not None else {}
    return {"id": f"ultramedical:{i}:{row['id']}", "prompt": turns[:-1], "completion": turns[-1:], "meta": meta}


def _said(question: str, answer: str, **more) -> dict:
    """An instruction row of one question and its answer."""
    made = alpaca_row({"instruction": question, "output": answer}, 0)
    return made | ({"meta": more} if more else {})


def _medquad(row: dict, i: int) -> dict:
    return _said(row["question"], row["answer"], qtype=row["qtype"], focus=row["focus"] or "", origin=row["source"])


def _medinstruct(row: dict, i: int) -> dict:
    return _said(row["instruction"], row["gpt-4-answer"], difficulty=int(row["difficulty"]))


def _medicationqa(row: dict, i: int) -> dict:
    return _said(row["Question"], row["Answer"], drug=row["Focus (Drug)"] or "", qtype=row["Question Type"])


def _liveqa(row: dict, i: int) -> dict:
    asked = "\n".join(part for part in (row["subject"], row["message"]) if part)
    answers = [a["answer"] for a in row["reference_answers"] if a["answer"]]
    return {"id": f"liveqa:{row['qid']}", **_asked(asked, answers[0] if answers else "", references=answers)}


def _kqa(row: dict, i: int) -> dict:
    statements = {"must_have": list(row["Must_have"]), "nice_to_have": list(row["Nice_to_have"])}
    return _said(row["Question"], row["Free_form_answer"], **statements)


def _curemed(row: dict, i: int) -> dict:
    answer = re.sub(r"</?answer>", "", row["answer"]).strip()
    return _said(row["question"], answer, language=row["language"], reasoning=row["reasoning"] or "")


def _mts_dialog(row: dict, i: int) -> dict:
    asked = f"Write the section {row['section_header']} of the clinical note of this visit.\n\n{row['dialogue'].strip()}"
    return _said(asked, row["section_text"], section=row["section_header"])


def _safety(row: dict, i: int) -> dict:
    return _said(row["harmful_medical_request"], row["safe_response"], category=int(row["category"]))


def _remedy(row: dict, i: int) -> dict:
    return _said(row["question"], row["ground_truth"], subject=row["subject_name"] or "")


def _huatuo(row: dict, i: int) -> dict:
    thought = {"reasoning": row["Complex_CoT"], "reference": row["Ground-True Answer"]}
    return _said(row["Open-ended Verifiable Question"], row["Response"], **thought)


def _mirage(row: dict, i: int) -> dict:
    answers = [{k: a[k] for k in ("model", "setting", "predicted")} for a in row["answers"]]
    options = row["options"] or {"A": "yes", "B": "no", "C": "maybe"}
    return {
        "id": f"mirage:{row['id']}", "question": row["question"], "options": _lettered(options), "gold": row["answer"],
        "subset": "mirage", "meta": {"answers": answers},
    }  # fmt: skip


def _asked(text: str, reference: str = "", **meta) -> dict:
    return {"prompt": [{"role": "user", "content": text.strip()}], "reference": reference, "meta": meta}


def _mt_bench(row: dict, i: int) -> dict:
    turns = list(row["turns"])
    return {"id": f"mt_bench:{row['question_id']}", **_asked(turns[0], category=row["category"], turns=turns)}


def _wizardlm(row: dict, i: int) -> dict:
    return _asked(row["Instruction"], skill=row["Skill"], difficulty=int(row["Difficulty"]))


def _med_seed(row: dict, i: int) -> dict:
    given = "" if row["input"] in (None, "<noinput>") else f"\n{row['input']}"
    return _asked(row["instruction"] + given, topic=row["topic"], kind=row["type"], difficulty=int(row["difficulty"]))


VIGNETTE = (
    "demographics",
    "chief_complaints",
    "presentation",
    "absent_findings",
    "physical_history",
    "family_history",
    "social_history",
)


def _avey(row: dict, i: int) -> dict:
    case = {k: row[k] if row[k] not in (None, "-") else "" for k in VIGNETTE}
    return {"id": f"avey:{row['vignette_id']}", **_asked(case["chief_complaints"], row["correct_diagnosis"], **case)}


def _preference(row: dict, i: int) -> dict:
    """UltraMedical-Preference and its like: `chosen` and `rejected` as message lists that end with the answer."""
    chosen, rejected = row["chosen"], row["rejected"]
    score = {k: row[k] for k in ("chosen_score", "rejected_score") if row.get(k) is not None}
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:], "meta": score}


def _rewardbench(row: dict, i: int) -> dict:
    turns = {k: as_completion(row[k]) for k in ("chosen", "rejected")}
    return {
        "id": f"rewardbench:{row['id']}",
        "subset": row["subset"],
        "prompt": [{"role": "user", "content": row["prompt"]}],
        **turns,
    }


def _messages(row: dict, i: int) -> dict:
    """UltraChat's `messages`: the first exchange."""
    return {"prompt": row["messages"][:1], "completion": row["messages"][1:2]}


def _first_exchange(row: dict, i: int) -> dict:
    """ShareGPT-like `conversations` of 'human' and 'gpt': the first exchange."""
    first = next(k for k, turn in enumerate(row["conversations"]) if turn["from"] == "human")
    return _said(row["conversations"][first]["value"], row["conversations"][first + 1]["value"])


def _orca(row: dict, i: int) -> dict:
    made = _said(row["question"], row["response"])
    return (
        made
        if not row.get("system_prompt")
        else {**made, "prompt": [{"role": "system", "content": row["system_prompt"]}, *made["prompt"]]}
    )


def _orca_math(row: dict, i: int) -> dict:
    return _said(row["question"], row["answer"])


def _gsm8k(row: dict, i: int) -> dict:
    return alpaca_row({"instruction": row["question"], "output": row["answer"]}, i)


def _meadow(name: str, part: str, rows: int) -> Source:
    hub = {"train": (f"medalpaca/medical_meadow_{part}", None, "train", rows)}
    return Source(name, "instructions", "see its hub page", "Han et al. 2023, arXiv 2304.08247", alpaca_row, hub=hub)


SOURCES = {
    s.name: s
    for s in (
        Source(
            "medqa", "questions", "MIT", "Jin et al. 2020, arXiv 2009.13081", _medqa,
            {"train": ("train_subset_4opt.parquet", 1047), "dev": ("validation.parquet", 1272), "test": ("test.parquet", 1273)},
            {"train": ("GBaker/MedQA-USMLE-4-options", None, "train", 10178), "test": ("GBaker/MedQA-USMLE-4-options", None, "test", 1273)},
            "US, four options; locally a part of the train split",
        ),
        Source(
            "medmcqa", "questions", "MIT", "Pal et al. 2022, arXiv 2203.14371", _medmcqa,
            {"train": ("train_sample_gpt4exp.parquet", 1000), "test": ("validation.parquet", 4183)},
            note="the validation split is what papers report",
        ),
        Source(
            "pubmedqa", "questions", "MIT", "Jin et al. 2019, arXiv 1909.06146", _pubmedqa,
            {"train": ("train_validation.parquet", 500), "test": ("test.parquet", 500)},
            note="expert-labelled, reasoning required, official test ids",
        ),
        Source(
            "mmlu_medical", "questions", "see hendrycks/test", "Hendrycks et al. 2021, arXiv 2009.03300", _mmlu,
            {"dev": ("dev.parquet", 30), "test": ("test.parquet", 1089)}, note="six medical subjects",
        ),
        Source(
            "usmle_self_assessment", "questions", "not redistributable", "Han et al. 2023, arXiv 2304.08247", _usmle,
            {"test": ("questions.jsonl", 324)},
            note="image-free items of Steps 1-3 (92, 110, 122); bring your own file with a `step` field",
        ),
        Source(
            "medical_meadow", "instructions", "GPL-3.0 (repository)", "Han et al. 2023, arXiv 2304.08247", alpaca_row,
            {"train": ("medical_meadow_small.parquet", 5942)},
            {"train": ("medalpaca/medical_meadow_wikidoc_patient_information", None, "train", 5942)},
            "WikiDoc patient information",
        ),
        _meadow("meadow_flashcards", "medical_flashcards", 33955),
        _meadow("meadow_wikidoc", "wikidoc", 10000),
        _meadow("meadow_mediqa", "mediqa", 2208),
        _meadow("meadow_cord19", "cord19", 821007),
        _meadow("meadow_mmmlu", "mmmlu", 3787),
        _meadow("meadow_health_advice", "health_advice", 8676),
        _meadow("meadow_pubmed_causal", "pubmed_causal", 2446),
        Source(
            "chatdoctor", "instructions", "academic research only", "Li et al. 2023, arXiv 2303.14070", alpaca_row,
            {"train": ("chatdoctor5k_sample5000.parquet", 5000)},
        ),
        Source(
            "alpaca", "instructions", "CC BY-NC 4.0", "Taori et al. 2023", alpaca_row,
            {"train": ("alpaca_early5000.parquet", 5000)}, {"train": ("tatsu-lab/alpaca", None, "train", 52002)},
        ),
        Source(
            "ultramedical", "instructions", "see its hub page", "Zhang et al. 2024, arXiv 2406.03949", _conversation,
            {"train": ("examples.jsonl.gz", 50)}, {"train": ("TsinghuaC3I/UltraMedical", None, "train", 409593)},
            "locally the repository's 50 examples",
        ),
        Source(
            "gsm8k", "instructions", "MIT", "Cobbe et al. 2021, arXiv 2110.14168", _gsm8k,
            {"train": ("train.parquet", 7473), "test": ("test.parquet", 1319)},
            {"train": ("openai/gsm8k", "main", "train", 7473), "test": ("openai/gsm8k", "main", "test", 1319)},
        ),
        Source(
            "medqa_5opt", "questions", "MIT", "Jin et al. 2020, arXiv 2009.13081", _medqa,
            {"train": ("train_first1000_5opt.parquet", 1000)}, {}, "US, five options; rows 0 to 999 of train", "medqa",
        ),
        Source(
            "mirage_medqa", "questions", "public domain (NCBI)", "Xiong et al. 2024, arXiv 2402.13178", _mirage,
            {"test": ("medqa.jsonl.gz", 1273)}, note="MedQA with the answers of GPT-3.5 and GPT-4", folder="mirage_answers",
        ),
        Source(
            "mirage_pubmedqa", "questions", "public domain (NCBI)", "Xiong et al. 2024, arXiv 2402.13178", _mirage,
            {"test": ("pubmedqa.jsonl.gz", 500)}, note="the same for PubMedQA", folder="mirage_answers",
        ),
        Source(
            "medquad", "instructions", "CC BY 4.0", "Ben Abacha & Demner-Fushman 2019, BMC Bioinformatics 20:511", _medquad,
            {"train": ("medquad_sample10000.parquet", 10000)}, note="10,000 of the 16,407 pairs that have an answer",
        ),
        Source(
            "medinstruct", "instructions", "CC BY-NC 4.0", "Zhang et al. 2023, arXiv 2310.14558", _medinstruct,
            {"test": ("medinstruct_test.parquet", 216)}, note="the test part; the answers are GPT-4's",
        ),
        Source(
            "med_seed", "prompts", "CC BY-NC 4.0", "Zhang et al. 2023, arXiv 2310.14558", _med_seed,
            {"train": ("med_seed.parquet", 167)}, note="clinicians' seed tasks of MedInstruct", folder="medinstruct",
        ),
        Source(
            "medicationqa", "instructions", "not stated", "Ben Abacha et al. 2019 (MEDINFO)", _medicationqa,
            {"test": ("medicationqa.parquet", 690)},
        ),
        Source(
            "liveqa", "prompts", "not stated", "Ben Abacha et al. 2017 (TREC)", _liveqa, {"test": ("test.parquet", 104)},
        ),
        Source(
            "k_qa", "instructions", "MIT", "Manes et al. 2024, arXiv 2401.14493", _kqa,
            {"test": ("questions_w_answers.parquet", 201)}, note="with must-have and nice-to-have statements in meta",
        ),
        Source(
            "medmcqa_open", "instructions", "not stated", "rewritten from Pal et al. 2022, arXiv 2203.14371", _remedy,
            {"train": ("train_openended_remedy.parquet", 4222)}, note="train questions answerable without options", folder="medmcqa",
        ),
        Source(
            "huatuo_o1", "instructions", "not stated", "Chen et al. 2024, arXiv 2412.18925", _huatuo,
            {"train": ("demo_data.jsonl.gz", 191)}, folder="huatuo_o1_demo",
        ),
        Source(
            "med_safety_bench", "instructions", "MIT", "Han et al. 2024, arXiv 2403.03744", _safety,
            {"train": ("train.parquet", 900)}, note="harmful requests with safe answers",
        ),
        Source(
            "curemed", "instructions", "not stated", "Onyame et al. 2026, arXiv 2601.13262", _curemed,
            {"train": ("sft_sample.parquet", 1950), "test": ("rft_train.parquet", 3364)}, note="13 languages; both sides are of its training data",
        ),
        Source(
            "mts_dialog", "instructions", "CC BY 4.0", "Ben Abacha et al. 2023 (EACL)", _mts_dialog,
            {"train": ("train.parquet", 1201), "dev": ("validation.parquet", 100), "test": ("test1.parquet", 200)},
        ),
        Source(
            "avey_vignettes", "prompts", "MIT", "Hammoud et al. 2022", _avey, {"test": ("sample100.parquet", 100)},
            note="cases with their diagnosis, for history taking",
        ),
        Source(
            "mt_bench", "prompts", "Apache-2.0", "Zheng et al. 2023, arXiv 2306.05685", _mt_bench,
            {"test": ("question.parquet", 80)}, note="two turns; both are in meta",
        ),
        Source(
            "wizardlm_test", "prompts", "CC BY-NC 4.0", "Xu et al. 2023, arXiv 2304.12244", _wizardlm,
            {"test": ("wizardlm_testset.parquet", 218)}, folder="evol_instruct",
        ),
        Source(
            "alpaca_gpt4", "instructions", "Apache-2.0", "LLaMA-Factory's demonstration rows", alpaca_row,
            {"train": ("alpaca_en_demo.parquet", 999)}, folder="alpaca",
        ),
        Source(
            "ultramedical_preference", "pairs", "see its hub page", "Zhang et al. 2024, arXiv 2406.03949", _preference,
            hub={"train": ("TsinghuaC3I/UltraMedical-Preference", None, "train", None)},
        ),
        Source(
            "rewardbench", "pairs", "ODC-BY", "Lambert et al. 2024, arXiv 2403.13787", _rewardbench,
            hub={"test": ("allenai/reward-bench", None, "filtered", 2985)},
        ),
        Source(
            "ultrachat", "instructions", "MIT", "Ding et al. 2023, arXiv 2305.14233", _messages,
            hub={"train": ("HuggingFaceH4/ultrachat_200k", None, "train_sft", 207865)}, note="first exchanges",
        ),
        Source(
            "evol_instruct", "instructions", "MIT", "Xu et al. 2023, arXiv 2304.12244", _first_exchange,
            hub={"train": ("WizardLMTeam/WizardLM_evol_instruct_V2_196k", None, "train", 143000)},
        ),
        Source(
            "open_orca", "instructions", "MIT", "Lian et al. 2023", _orca,
            hub={"train": ("Open-Orca/1million-gpt-4", None, "train", 994896)}, note="the GPT-4 part",
        ),
        Source(
            "orca_math", "instructions", "MIT", "Mitra et al. 2024, arXiv 2402.14830", _orca_math,
            hub={"train": ("microsoft/orca-math-word-problems-200k", None, "train", 200035)},
        ),
    )
}  # fmt: skip
