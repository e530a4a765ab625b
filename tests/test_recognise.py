"""Files as their authors released them: the same questions and pairs, whatever the form; what is ambiguous is an error."""

import csv
import gzip
import io
import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ultramed.core.errors import ConfigError
from ultramed.data.columns import parse_map
from ultramed.data.formats import BadRow, read_table
from ultramed.data.recognise import questions, read

TEXTS = [
    ["eye", "ear", "nose", "skin"],
    ["beta, blocker", "ACE inhibitor", "statin", "B vitamins"],
    ["0.5 mg", "1 mg", "2 mg", "4 mg"],
]
GOLD = [1, 3, 0]
ASKED = ["Which organ hears?", "Which is\na vitamin?", "Which is the least?"]


def rows(make):
    return [{"question": q, **make(t, g)} for q, t, g in zip(ASKED, TEXTS, GOLD, strict=True)]


def lettered(texts):
    return dict(zip("ABCD", texts, strict=True))


def columns(names):
    return lambda t, g: dict(zip(names, t, strict=True))


FORMS = {
    "medqa": lambda t, g: {"options": lettered(t), "answer_idx": "ABCD"[g], "answer": t[g], "meta_info": "step1"},
    "lower case": lambda t, g: {"options": {k.lower(): v for k, v in lettered(t).items()}, "answer": "abcd"[g]},
    "label from 0": lambda t, g: {"options": t, "label": g},
    "mmlu": lambda t, g: {"choices": t, "answer": g, "subject": "anatomy"},
    "medmcqa": lambda t, g: {**columns(("opa", "opb", "opc", "opd"))(t, g), "cop": g, "exp": None},
    "columns": lambda t, g: {**columns("ABCD")(t, g), "answer": "ABCD"[g]},
    "named columns": lambda t, g: {**columns([f"Option {k}" for k in "ABCD"])(t, g), "Correct Answer": "ABCD"[g]},
    "endings": lambda t, g: {**columns([f"ending{i}" for i in range(4)])(t, g), "label": str(g)},
    "arc": lambda t, g: {"choices": {"text": t, "label": list("ABCD")}, "answerKey": "ABCD"[g]},
    "bigbio": lambda t, g: {"options": [{"key": k, "value": v} for k, v in lettered(t).items()], "answer": [t[g]]},
    "text": lambda t, g: {"options": t, "answer": t[g]},
    "letter and text": lambda t, g: {"options": t, "answer": f"{'ABCD'[g]}. {t[g]}"},
    "brackets": lambda t, g: {"options": t, "gold": f"({'ABCD'[g]})"},
    "lists with letters": lambda t, g: {"options": [f"{k}. {v}" for k, v in lettered(t).items()], "answer": "ABCD"[g]},
    "numbered options": lambda t, g: {"options": {f"option{i}": v for i, v in enumerate(t, 1)}, "correct_answer": t[g]},
    "options in text": lambda t, g: {"options": json.dumps(t), "answer": "ABCD"[g]},
    "options as python wrote them": lambda t, g: {"options": str(lettered(t)), "answer": "ABCD"[g]},
}


def as_expected(made):
    return [(r["question"], r["options"], r["gold"]) for r in made] == [
        (q, lettered(t), "ABCD"[g]) for q, t, g in zip(ASKED, TEXTS, GOLD, strict=True)
    ]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_says_the_same(form):
    made, told = questions(rows(FORMS[form]), "here")
    assert as_expected(made), made
    assert "gold from" in told


def separated(table, mark):
    out = io.StringIO()
    names = list(dict.fromkeys(k for row in table for k in row))
    writer = csv.DictWriter(out, names, delimiter=mark)
    writer.writeheader()
    writer.writerows(table)
    return out.getvalue()


FILES = {
    "q.jsonl": lambda t: "\n".join(map(json.dumps, t)),
    "lines.json": lambda t: "\n".join(map(json.dumps, t)) + "\n",
    "list.json": json.dumps,
    "indented.json": lambda t: json.dumps(t, indent=2),
    "columns.json": lambda t: json.dumps({k: [r[k] for r in t] for k in t[0]}),
    "pandas.json": lambda t: json.dumps({k: {str(i): r[k] for i, r in enumerate(t)} for k in t[0]}),
    "by_id.json": lambda t: json.dumps({f"q{i}": r for i, r in enumerate(t)}),
    "inside.json": lambda t: json.dumps({"version": 1, "data": t}),
    "q.csv": lambda t: separated(t, ","),
    "semicolon.csv": lambda t: separated(t, ";"),
    "q.tsv": lambda t: separated(t, "\t"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_every_kind_of_file_is_read(tmp_path, name, packed, mark, caplog):
    table = rows(FORMS["named columns"])
    data = (mark + FILES[name](table)).encode()
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(data) if packed else data)
    with caplog.at_level(logging.INFO):
        assert as_expected(read(path, "questions"))
    assert "read 3 questions" in caplog.text
    assert "gold from `Correct Answer`, 4 options from `Option A`..`Option D`" in caplog.text


def test_a_long_column_of_dictionaries_is_a_column(tmp_path):
    table = [{"options": dict(zip("AB", t, strict=False)), "question": f"q{n}", "gold": "A"} for n, t in enumerate(TEXTS * 10)]
    (tmp_path / "q.json").write_text(json.dumps({k: [r[k] for r in table] for k in table[0]}))
    assert len(read(tmp_path / "q.json", "questions")) == 30


def test_a_line_separator_inside_a_cell_is_no_line(tmp_path):
    (tmp_path / "q.csv").write_text("question,A,B,gold\nwhich\u2028organ,eye,ear,B\n", encoding="utf-8")
    (row,) = read(tmp_path / "q.csv", "questions")
    assert row["question"] == "which\u2028organ"


def test_parquet_with_options_of_different_length(tmp_path):
    table = rows(FORMS["medqa"])
    del table[2]["options"]["D"]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "q.parquet")
    assert [len(r["options"]) for r in read(tmp_path / "q.parquet", "questions")] == [4, 4, 3]


def test_numbers_are_counted_from_where_the_values_say():
    counted = [{"question": "q", "options": ["w", "x", "y", "z"], "cop": n} for n in (1, 2, 4)]
    assert [r["gold"] for r in questions(counted, "here")[0]] == ["A", "B", "D"]
    with pytest.raises(BadRow, match="could count from 0 or from 1"):
        questions(counted[:2], "here")
    assert [r["gold"] for r in questions(counted[:2], "here", parse_map(["base=1"]))[0]] == ["A", "B"]
    assert [r["gold"] for r in questions(counted[:2], "here", parse_map(["base=0"]))[0]] == ["B", "C"]
    with pytest.raises(BadRow, match="its numbers go from 0 to 4, and there are 4 options"):
        questions([{**counted[0], "cop": 0}, {**counted[0], "cop": 4}], "here")


def test_two_answers_that_differ_are_an_error_that_names_both():
    table = rows(lambda t, g: {"options": t, "label": g, "answer": t[0]})
    with pytest.raises(ConfigError, match=r"answer of row 1 is B by `label` and A by `answer`.*--map gold=label or"):
        questions(table, "here")
    assert as_expected(questions(table, "here", parse_map(["gold=label"]))[0])


def test_two_readings_of_the_options_are_an_error():
    table = rows(lambda t, g: {**columns(("opa", "opb", "opc", "opd"))(t, g), **columns("ABCD")(t, g), "cop": g})
    with pytest.raises(ConfigError, match=r"options could be `opa`..`opd` or `A`..`D`"):
        questions(table, "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": None, "vraag": "x"}, "question"),
        ({"options": "eye"}, "row 1: options: wanted a dictionary or a list of texts in `options`, got 'eye'"),
        ({"label": None}, "gold"),
        ({"label": "liver"}, "row 1: wanted one of A, B, C, D, or the text of one of the options, got 'liver'"),
    ],
)
def test_what_cannot_be_read_is_named(change, message):
    table = rows(lambda t, g: {"options": t, "label": t[g]})
    table[0].update(change)
    with pytest.raises(BadRow, match=message):
        questions(table, "here")


def test_a_wrong_map_says_what_there_is():
    with pytest.raises(ConfigError, match="wanted NAME=COLUMN"):
        parse_map(["answer=label"])
    with pytest.raises(ConfigError, match=r"'gold': 'lable'.*question, options, label"):
        questions(rows(FORMS["label from 0"]), "here", {"gold": "lable"})


@pytest.mark.parametrize(
    ("path", "count", "spread"),
    [
        ("medqa/test.parquet", 1273, {"A": 353, "B": 309, "C": 346, "D": 265}),
        ("medqa/train_first1000_5opt.parquet", 1000, {"A": 185, "B": 211, "C": 186, "D": 214, "E": 204}),
        ("medmcqa/validation.parquet", 4183, {"A": 1348, "B": 1085, "C": 925, "D": 825}),
        ("pubmedqa/test.parquet", 500, {"A": 276, "B": 169, "C": 55}),
        ("mmlu_medical/test.parquet", 1089, {"A": 235, "B": 254, "C": 248, "D": 352}),
        ("mirage_answers/medqa.jsonl.gz", 1273, {"A": 353, "B": 309, "C": 346, "D": 265}),
        ("huatuo_o1_demo/demo_data.jsonl.gz", 191, {"A": 40, "B": 53, "C": 42, "D": 54, "E": 2}),
    ],
)
def test_public_questions_as_released(data, path, count, spread):
    made = read(data / path, "questions")
    assert len(made) == count
    assert {k: sum(r["gold"] == k for r in made) for k in spread} == spread


def test_public_pairs_as_released(data):
    for name, count in (("dpo_en_demo", 300), ("hh_rlhf_harmless_base_test", 2307), ("alpaca_eval_gpt4turbo_pairs", 4040)):
        made = read(data / "preference" / f"{name}.parquet", "pairs")
        assert len(made) == count
        assert sum(r["prompt"][-1]["role"] != "user" for r in made) <= 4, "four transcripts of HH-RLHF are torn"


def test_pairs_in_lists_give_every_combination(tmp_path):
    """RM-Bench has three replies a side, RewardBench 2 one against three; RewardBench's ids repeat over subsets."""
    (tmp_path / "rm.json").write_text(
        json.dumps([{"id": 7, "prompt": "p", "chosen": ["a", "b"], "rejected": ["c", "d"], "domain": "chat"}])
    )
    made = read(tmp_path / "rm.json", "pairs")
    assert [(r["chosen"][0]["content"], r["rejected"][0]["content"]) for r in made] == [
        ("a", "c"),
        ("a", "d"),
        ("b", "c"),
        ("b", "d"),
    ]
    assert {(r["meta"]["prompt_id"], r["subset"]) for r in made} == {("7", "chat")}
    rb = [{"id": 1, "subset": s, "prompt": "p", "chosen": "a", "rejected": "b", "chosen_model": "m"} for s in ("easy", "hard")]
    (tmp_path / "rb.json").write_text(json.dumps(rb))
    made = read(tmp_path / "rb.json", "pairs")
    assert [r["subset"] for r in made] == ["easy", "hard"]
    assert len({r["id"] for r in made}) == 2
    assert made[0]["meta"]["chosen_model"] == "m"


def test_preference_data_with_the_prompt_inside_the_replies(tmp_path):
    """UltraMedical-Preference: `prompt` as text, chosen and rejected as whole conversations."""
    turns = [{"role": "user", "content": "Which organ hears?"}]
    sides = {k: [*turns, {"role": "assistant", "content": t}] for k, t in (("chosen", "ear"), ("rejected", "eye"))}
    (tmp_path / "um.jsonl").write_text(
        json.dumps({"prompt_id": "x", "label_type": "hard", "prompt": turns[0]["content"], **sides})
    )
    (made,) = read(tmp_path / "um.jsonl", "pairs")
    assert (made["prompt"], made["chosen"][0]["content"], made["subset"]) == (turns, "ear", "hard")


@pytest.mark.parametrize(
    ("row", "asked", "answer"),
    [
        ({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}, "Q", "A"),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, "Q", "A"),
        ({"instruction": "Sum up.", "input": "Q", "output": "A"}, "Q", "A"),
        ({"question": "Q", "answer": "A"}, "Q", "A"),
        ({"prompt": "Q", "response": "A"}, "Q", "A"),
    ],
)
def test_instructions_in_their_usual_forms(tmp_path, row, asked, answer):
    (tmp_path / "r.json").write_text(json.dumps([row]))
    (made,) = read(tmp_path / "r.json", "rows")
    assert (made["prompt"][-1]["content"], made["completion"][0]["content"]) == (asked, answer)


def test_more_values_than_columns_are_an_error(tmp_path):
    (tmp_path / "q.csv").write_text("question,answer\na,b,c\n")
    with pytest.raises(BadRow, match="line 2: 1 more values than the header has columns"):
        read_table(tmp_path / "q.csv")


def table(tmp_path, text: str, name: str = "own.csv"):
    path = tmp_path / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "text",
    [
        "question,A,B,C,D,E,answer_idx\nq0,a,b,c,d,e,0\nq1,a,b,,d,e,3\n",  # from 0
        "question,opa,opb,opc,opd,cop\nq0,a,b,c,d,4\nq1,a,,c,d,3\n",  # from 1
        "question,A,B,C,D,E,answer_idx\nq0,a,b,c,d,e,1\nq1,a,b,,d,e,4\nq2,a,b,c,d,e,0\n",
    ],
)
def test_the_letter_of_a_blank_option_counts(tmp_path, text):
    lines = [line.split(",") for line in text.splitlines()]
    start = 1 if "cop" in lines[0] else 0
    made = read(table(tmp_path, text), "questions")
    assert [row["options"][row["gold"]] for row in made] == [line[1:-1][int(line[-1]) - start] for line in lines[1:]]


@pytest.mark.parametrize(
    ("row", "right"),
    [
        ({"options": [{"key": "B", "value": "bee"}, {"key": "A", "value": "ay"}], "answer_idx": "B"}, "bee"),
        ({"choices": {"text": ["one", "two", "three"], "label": ["B", "C", "D"]}, "answerKey": "B"}, "one"),
        ({"options": {"A": "ay", "B": "bee", "C": float("nan")}, "answer": "B"}, "bee"),
        ({"options": ["ay", "bee", None], "answer": "B"}, "bee"),
        ({**{f"option_{k}": k * 2 for k in "abcdefghijkl"}, "answer": "L"}, "ll"),
        ({**{f"option{n}": f"text {n}" for n in range(1, 12)}, "answer": "text 11"}, "text 11"),
    ],
)
def test_options_keep_their_own_letters_and_none_is_lost_or_made_up(tmp_path, row, right):
    made = read(table(tmp_path, json.dumps({"question": "Which?", **row}), "own.jsonl"), "questions")
    assert made[0]["options"][made[0]["gold"]] == right
    assert not {"nan", "None"} & set(made[0]["options"].values())


def test_a_row_without_an_id_and_a_column_called_meta(tmp_path):
    lines = [
        {"id": "a", "question": "1?", "options": ["x", "y"], "answer": "A"},
        {"question": "2?", "options": ["x", "y"], "answer": "B"},
    ]
    assert [r["id"] for r in read(table(tmp_path, "\n".join(map(json.dumps, lines)), "own.jsonl"), "questions")] == ["a", "2"]
    made = read(table(tmp_path, "question,A,B,answer,meta\nq,x,y,B,hard\n"), "questions")
    assert made[0]["meta"] == {"meta": "hard"}


def test_a_stray_quotation_mark_swallows_no_rows(tmp_path):
    lines = ["question,A,B,answer,note", "q1,a,b,A,fine", 'q2,a,b,B,"Stridor is heard', "q3,a,b,A,x"]
    with pytest.raises(BadRow, match=r"line .*: unexpected end of data"):
        read(table(tmp_path, "\n".join(lines)), "questions")
    made = read(table(tmp_path, "\n".join(lines).replace(",", "\t"), "own.tsv"), "questions")
    assert [row["meta"]["note"] for row in made] == ["fine", '"Stridor is heard', "x"]


def test_preferences_whose_scale_is_unknown_are_asked_about(tmp_path):
    def file(name, values):
        rows = [{"prompt": "?", "response_1": "one", "response_2": "two", name: n} for n in values]
        return table(tmp_path, "\n".join(map(json.dumps, rows)), "own.jsonl")

    with pytest.raises(BadRow, match="goes from 0 to 1; wanted 1"):
        read(file("preference", [0, 1]), "pairs")
    strong = read(file("preference_strength", [0, 1, 3]), "pairs")
    assert [row["chosen"][0]["content"] for row in strong] == ["two", "two"], "0 is a tie"
    assert [r["chosen"][0]["content"] for r in read(file("preference", [1, 2, 1.5]), "pairs")] == ["one", "two"]


def test_a_number_beyond_every_letter_is_named(tmp_path):
    text = "question,A,B,C,D,cop\nq0,a,b,c,d,4\nq1,a,b,c,d,40\n"
    with pytest.raises(BadRow, match="row 2: 40 is beyond the options"):
        read(table(tmp_path, text), "questions")


ORGANS = [
    ("Which organ filters blood?", ["eye", "kidney", "ear", "skin"], "B"),
    ("Where is bile made?", ["lung", "eye", "ear", "liver"], "D"),
]
OTHERS = {  # layouts as they were released, with rows of our own
    "HEAD-QA": [
        {
            "qid": str(n),
            "qtext": q,
            "ra": 1 + "ABCD".index(gold),
            "answers": [{"aid": i + 1, "atext": t} for i, t in enumerate(o)],
        }
        for n, (q, o, gold) in enumerate(ORGANS)
    ],
    "a nested object": [
        {
            "id": str(n),
            "subject_name": "x",
            "data": {"Question": q, "Options": dict(zip("ABCD", o, strict=True)), "Correct Option": gold},
        }
        for n, (q, o, gold) in enumerate(ORGANS)
    ],
    "ARC's own": [
        {
            "id": str(n),
            "question": {"stem": q, "choices": [{"text": t, "label": k} for k, t in zip("ABCD", o, strict=True)]},
            "answerKey": gold,
        }
        for n, (q, o, gold) in enumerate(ORGANS)
    ],
}


@pytest.mark.parametrize("layout", OTHERS)
def test_layouts_with_objects_inside(tmp_path, layout):
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(OTHERS[layout]))
    found = [(row["question"], list(row["options"].values()), row["gold"]) for row in read(path, "questions")]
    assert found == ORGANS


def test_a_file_without_a_header_loses_no_question(tmp_path):
    """As MMLU's own files are."""
    path = tmp_path / "anatomy_test.csv"
    path.write_text("".join(f"{q},{','.join(options)},{gold}\n" for q, options, gold in ORGANS))
    assert [(row["question"], list(row["options"].values()), row["gold"]) for row in read(path, "questions")] == ORGANS
    path.write_text("question,A,B,C,D,answer\n" + path.read_text())
    assert len(read(path, "questions")) == 2


def test_wrong_options_apart_from_the_right_one_are_dealt_to_letters(tmp_path):
    """SciQ and GPQA: the right one has no letter, and must not always get the same."""
    path = tmp_path / "questions.jsonl"
    texts = [
        {"Question": f"Which is {n}?", "Correct Answer": f"r{n}", **{f"Incorrect Answer {k}": f"w{n}{k}" for k in (1, 2, 3)}}
        for n in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in texts))
    rows = read(path, "questions")
    assert all(row["options"][row["gold"]] == f"r{n}" and len(set(row["options"].values())) == 4 for n, row in enumerate(rows))
    assert {row["gold"] for row in rows} == set("ABCD")
    assert rows == read(path, "questions")
    path.write_text(
        "".join(
            json.dumps(
                {
                    "question": r["Question"],
                    "correct_answer": r["Correct Answer"],
                    "distractor1": "x",
                    "distractor2": "y",
                    "distractor3": "z",
                    "support": "because",
                }
            )
            + "\n"
            for r in texts
        )
    )
    rows = read(path, "questions")
    assert all(row["options"][row["gold"]] == f"r{n}" for n, row in enumerate(rows))
    assert rows[0]["meta"]["support"] == "because"


def test_columns_named_like_the_letters_of_a_list(tmp_path):
    path = tmp_path / "questions.csv"
    path.write_text("question,A),B),answer\nWhich organ filters blood?,eye,kidney,B\n")
    assert read(path, "questions")[0]["options"] == {"A": "eye", "B": "kidney"}


def test_columns_of_pairs_can_be_named(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("asked,winner,loser\nWhy?,Because.,No.\n")
    with pytest.raises(BadRow, match="name it with --map chosen=COLUMN"):
        read(path, "pairs")
    (row,) = read(path, "pairs", parse_map(["prompt=asked", "chosen=winner", "rejected=loser"], "pairs"))
    assert [row[side][0]["content"] for side in ("prompt", "chosen", "rejected")] == ["Why?", "Because.", "No."]
    with pytest.raises(ConfigError, match="one of prompt, chosen, rejected, id"):
        parse_map(["gold=winner"], "pairs")
