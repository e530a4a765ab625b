"""How a raw row of each data set becomes a canonical one (data/rows.py).

An adapter takes the raw row and its number; `id`, `source` and `dataset` are filled in by the loader, and whatever it
raises for a row is written down as the reason why that row was set aside. Which set has which adapter: catalog.yaml.
"""

import re
from itertools import combinations

from ultramed.data.messages import as_completion


def lettered(options) -> dict[str, str]:
    if isinstance(options, dict):
        return {k: str(v).strip() for k, v in sorted(options.items()) if v is not None}
    return dict(zip("ABCDEFGH", (str(o).strip() for o in options), strict=False))


def medqa(row: dict, i: int) -> dict:
    return {
        "question": row["question"].strip(),
        "options": lettered(row["options"]),
        "gold": row["answer_idx"],
        "subset": "medqa",
    }


def medmcqa(row: dict, i: int) -> dict:
    return _medmcqa(row, int(row["cop"]) - 1)


def medmcqa_from_0(row: dict, i: int) -> dict:
    """openlifescienceai/medmcqa counts its options from 0; the official files, and lighteval's copy, from 1."""
    return _medmcqa(row, int(row["cop"]))


def _medmcqa(row: dict, number: int) -> dict:
    if not 0 <= number < 4:  # a negative one would be the last option without a word
        raise ValueError(f"cop: {row['cop']} is no option of four")
    options = lettered([row["opa"], row["opb"], row["opc"], row["opd"]])
    return {"question": row["question"].strip(), "options": options, "gold": "ABCD"[number], "subset": "medmcqa"}


def pubmedqa(row: dict, i: int) -> dict:
    options = {"A": "yes", "B": "no", "C": "maybe"}
    return {
        "id": f"pubmedqa:{row['PMID']}",
        "question": row["QUESTION"],
        "context": "\n".join(row["CONTEXTS"]),
        "options": options,
        "gold": {v: k for k, v in options.items()}[row["final_decision"]],
        "subset": "pubmedqa",
    }


def pubmedqa_hub(row: dict, i: int) -> dict:
    """qiaojin/PubMedQA: other names, and the abstract's parts inside `context`."""
    named = {"PMID": row["pubid"], "QUESTION": row["question"], "CONTEXTS": row["context"]["contexts"]}
    return pubmedqa({**named, "final_decision": row["final_decision"]}, i)


def mmlu_hub(row: dict, i: int) -> dict:
    """cais/mmlu: `choices`, and the answer as a number from 0."""
    number = int(row["answer"])
    if not 0 <= number < len(row["choices"]):
        raise ValueError(f"answer: {number} is none of {len(row['choices'])} choices")
    options = lettered(row["choices"])
    return {
        "id": f"mmlu:{row['subject']}:{i}",
        "question": row["question"],
        "options": options,
        "gold": list(options)[number],
        "subset": row["subject"],
    }


def mmlu(row: dict, i: int) -> dict:
    return {
        "id": f"mmlu:{row['subject']}:{row['index']}",
        "question": row["question"],
        "options": lettered([row[k] for k in "ABCD"]),
        "gold": row["answer"],
        "subset": row["subject"],
    }


def usmle(row: dict, i: int) -> dict:
    letters = {str(v).strip(): k for k, v in row["options"].items()}
    gold = row.get("answer_idx") or letters.get(str(row.get("answer", "")).strip(), "")
    return {"question": row["question"], "options": lettered(row["options"]), "gold": gold, "subset": f"step{row['step']}"}


def alpaca_row(row: dict, i: int) -> dict:
    """instruction / input / output (Alpaca, Medical Meadow): the instruction becomes the system turn where there is an
    input."""
    given = (row.get("input") or "").strip()
    turns = [("system", row["instruction"].strip()), ("user", given)] if given else [("user", row["instruction"].strip())]
    return {"prompt": [{"role": r, "content": c} for r, c in turns], "completion": as_completion((row["output"] or "").strip())}


def stated_score(sentence: str | None) -> float | None:
    """The 1-to-10 rating in UltraMedical's `score`, a sentence such as 'would be rated around a 7 or 8'; None if none is."""
    found = re.search(r"\b(?:rate|rated|rating|score)\b[^0-9]{0,80}?\b(10|[1-9](?:\.\d)?)\b", sentence or "", re.IGNORECASE)
    return float(found[1]) if found else None


def conversation(row: dict, i: int) -> dict:
    """ShareGPT's `conversations` (UltraMedical): turns of 'human' and 'gpt', the last one is the answer."""
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    turns = [{"role": roles[t["from"]], "content": t["value"].strip()} for t in row["conversations"]]
    meta = {"task": str(row["id"]).partition(",")[0], "type": row.get("type") or "", "answer": str(row.get("answer") or "")}
    score = stated_score(row.get("score"))
    meta |= {"score": score} if score is not None else {}
    return {"id": f"ultramedical:{i}:{row['id']}", "prompt": turns[:-1], "completion": turns[-1:], "meta": meta}


def question_answer(question: str, answer: str, **more) -> dict:
    """An instruction row of one question and its answer."""
    made = alpaca_row({"instruction": question, "output": answer}, 0)
    return made | ({"meta": more} if more else {})


def medquad(row: dict, i: int) -> dict:
    return question_answer(row["question"], row["answer"], qtype=row["qtype"], focus=row["focus"] or "", origin=row["source"])


def medquad_hub(row: dict, i: int) -> dict:
    return question_answer(row["Question"], row["Answer"], qtype=row["qtype"] or "")


def medinstruct(row: dict, i: int) -> dict:
    return question_answer(row["instruction"], row["gpt-4-answer"], difficulty=int(row["difficulty"]))


def medicationqa(row: dict, i: int) -> dict:
    return question_answer(row["Question"], row["Answer"], drug=row["Focus (Drug)"] or "", qtype=row["Question Type"])


def liveqa(row: dict, i: int) -> dict:
    asked = "\n".join(part for part in (row["subject"], row["message"]) if part)
    answers = [a["answer"] for a in row["reference_answers"] if a["answer"]]
    return {"id": f"liveqa:{row['qid']}", **open_question(asked, answers[0] if answers else "", references=answers)}


def kqa(row: dict, i: int) -> dict:
    statements = {"must_have": list(row["Must_have"]), "nice_to_have": list(row["Nice_to_have"])}
    return question_answer(row["Question"], row["Free_form_answer"], **statements)


def curemed(row: dict, i: int) -> dict:
    answer = re.sub(r"</?answer>", "", row["answer"]).strip()
    return question_answer(row["question"], answer, language=row["language"], reasoning=row["reasoning"] or "")


def mts_dialog(row: dict, i: int) -> dict:
    asked = f"Write the section {row['section_header']} of the clinical note of this visit.\n\n{row['dialogue'].strip()}"
    return question_answer(asked, row["section_text"], section=row["section_header"])


def safety(row: dict, i: int) -> dict:
    return question_answer(row["harmful_medical_request"], row["safe_response"], category=int(row["category"]))


def remedy(row: dict, i: int) -> dict:
    return question_answer(row["question"], row["ground_truth"], subject=row["subject_name"] or "")


def huatuo(row: dict, i: int) -> dict:
    thought = {"reasoning": row["Complex_CoT"], "reference": row["Ground-True Answer"]}
    return question_answer(row["Open-ended Verifiable Question"], row["Response"], **thought)


def mirage(row: dict, i: int) -> dict:
    answers = [{k: a[k] for k in ("model", "setting", "predicted")} for a in row["answers"]]
    options = row["options"] or {"A": "yes", "B": "no", "C": "maybe"}
    return {
        "id": f"mirage:{row['id']}",
        "question": row["question"],
        "options": lettered(options),
        "gold": row["answer"],
        "subset": "mirage",
        "meta": {"answers": answers},
    }


def open_question(text: str, reference: str = "", **meta) -> dict:
    return {"prompt": [{"role": "user", "content": text.strip()}], "reference": reference, "meta": meta}


def mt_bench(row: dict, i: int) -> dict:
    turns = list(row["turns"])
    return {"id": f"mt_bench:{row['question_id']}", **open_question(turns[0], category=row["category"], turns=turns)}


def alpaca_eval(row: dict, i: int) -> dict | list:
    """AlpacaEval 2's instructions, with its baseline's output (GPT-4 turbo of November 2023) as reference. Files of annotated
    pairs name each instruction once a model: the first model's rows are taken."""
    if "output_1" not in row:
        return open_question(row["instruction"], row["output"])
    return open_question(row["instruction"], row["output_1"]) if row["generator_2"] == "gpt-3.5-turbo-1106" else []


def wizardlm(row: dict, i: int) -> dict:
    return open_question(row["Instruction"], skill=row["Skill"], difficulty=int(row["Difficulty"]))


def med_seed(row: dict, i: int) -> dict:
    given = "" if row["input"] in (None, "<noinput>") else f"\n{row['input']}"
    return open_question(row["instruction"] + given, topic=row["topic"], kind=row["type"], difficulty=int(row["difficulty"]))


VIGNETTE = (
    "demographics",
    "chief_complaints",
    "presentation",
    "absent_findings",
    "physical_history",
    "family_history",
    "social_history",
)


def avey(row: dict, i: int) -> dict:
    case = {k: row[k] if row[k] not in (None, "-") else "" for k in VIGNETTE}
    return {"id": f"avey:{row['vignette_id']}", **open_question(case["chief_complaints"], row["correct_diagnosis"], **case)}


def preference(row: dict, i: int) -> dict:
    """UltraMedical-Preference: `chosen` and `rejected` as message lists that end with the reply; subset is `label_type`.

    GPT-4's scores (1 to 5) and who wrote the replies are in `metadata`, a dictionary a side.
    """
    meta, told = {}, row.get("metadata") or {}
    for side in ("chosen", "rejected"):
        about = told.get(side) or {}
        if (score := row.get(f"{side}_score", about.get("score"))) is not None:
            meta[f"{side}_score"] = float(score)
        if about.get("model"):
            meta[f"{side}_model"] = about["model"]
    if row.get("prompt_id") is not None:
        meta["prompt_id"] = str(row["prompt_id"])
    turns = {"prompt": row["chosen"][:-1], "chosen": row["chosen"][-1:], "rejected": row["rejected"][-1:]}
    return {"subset": row.get("label_type") or "all", **turns, "meta": meta}


def ordered_pairs(name: str, subset: str, question: str, replies: list[tuple[str, float | None, str]]) -> list[dict]:
    """Every pair of replies (text, score, model) to a question of which one has the higher score."""
    unique = {text: (text, score, model) for text, score, model in replies if score is not None and text.strip()}
    ranked = sorted(unique.values(), key=lambda reply: -reply[1])
    pairs = [(a, b) for a, b in combinations(ranked, 2) if a[1] > b[1]]
    return [
        {
            "id": f"{name}#{n}",
            "subset": subset,
            "prompt": [{"role": "user", "content": question}],
            "chosen": as_completion(better[0]),
            "rejected": as_completion(worse[0]),
            "meta": {
                "prompt_id": name,
                "chosen_score": better[1],
                "rejected_score": worse[1],
                "chosen_model": better[2],
                "rejected_model": worse[2],
            },
        }
        for n, (better, worse) in enumerate(pairs)
    ]


def ultrafeedback(row: dict, i: int) -> list[dict]:
    """openbmb/UltraFeedback: the pairs of four completions by the mean of their fine-grained ratings (`overall_score` was
    read wrongly out of some critiques, as the set's own later card says)."""
    replies = [(c["response"], c["fine-grained_score"], c["model"]) for c in row["completions"]]
    return ordered_pairs(f"ultrafeedback:{i}", row["source"], row["instruction"], replies)


def ultrasafety(row: dict, i: int) -> list[dict]:
    """openbmb/UltraSafety: completions rated harmless (1) against those rated harmful (0)."""

    def rating(completion: dict) -> float | None:
        told = completion["annotations"]["harmlessness"]
        told = (told[0] if told else {}) if isinstance(told, list) else told
        return float(told["Rating"]) if str(told.get("Rating", "")).isdecimal() else None

    replies = [(c["response"], rating(c), c["model"]) for c in row["completions"]]
    return ordered_pairs(f"ultrasafety:{i}", "safety", row["instruction"], replies)


def ultrainteract(row: dict, i: int) -> dict:
    """openbmb/UltraInteract_pair: two next actions after the same conversation; subset is the task."""
    turns = [{"role": turn["from"], "content": turn["value"]} for turn in row["trajectory"]]
    pair = {side: as_completion(row[side]) for side in ("chosen", "rejected")}
    return {"subset": row["task"], "prompt": turns, **pair}


def rewardbench(row: dict, i: int) -> dict:
    turns = {k: as_completion(row[k]) for k in ("chosen", "rejected")}
    return {
        "id": f"rewardbench:{row['subset']}:{row['id']}",
        "subset": row["subset"],
        "prompt": [{"role": "user", "content": row["prompt"]}],
        **turns,
    }


def rewardbench2(row: dict, i: int) -> list[dict]:
    """The right reply against each of the wrong ones; `meta.prompt_id` keeps them together. Prompts of *Ties* have several
    right ones, whose score no pair can tell, and give none."""
    if len(row["chosen"]) != 1:
        return []
    prompt = [{"role": "user", "content": row["prompt"]}]
    return [
        {
            "id": f"rewardbench2:{row['id']}#{n}",
            "subset": row["subset"],
            "prompt": prompt,
            "chosen": as_completion(row["chosen"][0]),
            "rejected": as_completion(wrong),
            "meta": {"prompt_id": str(row["id"])},
        }
        for n, wrong in enumerate(row["rejected"])
    ]


def messages(row: dict, i: int) -> dict:
    """UltraChat's `messages`: the first exchange."""
    return {"prompt": row["messages"][:1], "completion": row["messages"][1:2]}


def first_exchange(row: dict, i: int) -> dict:
    """ShareGPT-like `conversations` of 'human' and 'gpt': the first exchange."""
    first = next(k for k, turn in enumerate(row["conversations"]) if turn["from"] == "human")
    return question_answer(row["conversations"][first]["value"], row["conversations"][first + 1]["value"])


def guanaco(row: dict, i: int) -> dict:
    """OpenAssistant conversations as one text, '### Human: ...### Assistant: ...': the first exchange."""
    found = re.match(r"### Human:(.*?)### Assistant:(.*?)(?=### Human:|\Z)", row["text"], re.DOTALL)
    return question_answer(found[1].strip(), found[2].strip())


def orca(row: dict, i: int) -> dict:
    made = question_answer(row["question"], row["response"])
    return (
        made
        if not row.get("system_prompt")
        else {**made, "prompt": [{"role": "system", "content": row["system_prompt"]}, *made["prompt"]]}
    )


def gsm8k(row: dict, i: int) -> dict:
    """Also of orca_math."""
    return question_answer(row["question"], row["answer"])
