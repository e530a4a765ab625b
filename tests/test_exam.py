"""The bundled exam at its full size: counts, one right answer by the tree, and no concept on two sides."""

from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultramed.core.errors import ConfigError
from ultramed.core.schema import ExamConfig
from ultramed.data import exam, knowledge
from ultramed.data.rows import read_instructions, read_questions


@pytest.fixture(scope="module")
def full():
    return exam.exam(ExamConfig())


@pytest.fixture(scope="module")
def sides(full):
    return {side: read_questions(full / f"{side}.parquet") for side in ("train", "dev", "test")}


def test_at_least_six_thousand_to_train_on_and_a_thousand_held_out_of_every_step(sides):
    assert Counter(r["subset"] for r in sides["train"]) == {"step1": 6000, "step2": 6000, "step3": 6000}
    assert Counter(r["subset"] for r in sides["test"]) == {"step1": 1000, "step2": 1000, "step3": 1000}


def test_no_concept_is_on_two_sides_under_any_of_its_names(sides):
    hpo, icd = knowledge.knowledge()
    names = defaultdict(list)
    for code, category in icd.category.items():
        names[category] += icd.names[code]
    where = defaultdict(set)
    for side, rows in sides.items():
        for concept in {r["meta"]["concept"] for r in rows}:
            for name in hpo.names(concept) if concept in hpo.terms else names[concept]:
                where[knowledge.normalise(name)].add(side)
    assert [name for name, found in where.items() if len(found) > 1] == []


def test_gold_letters_are_uniform(sides):
    for rows in sides.values():
        for step in exam.STEP_QUESTION:
            count = Counter(r["gold"] for r in rows if r["subset"] == step)
            n = sum(count.values())
            chi2 = sum((count[k] - n / 4) ** 2 / (n / 4) for k in "ABCD")
            assert chi2 < 16.3, (step, count)  # 0.1% of a chi-square with 3 degrees of freedom


def test_exactly_one_option_is_right_by_the_tree(sides):
    """Worked out again from the trees, not from the code that made the question."""
    hpo, icd = knowledge.knowledge()
    systems = {label: term for term, label in knowledge.SYSTEMS.items()}
    chapters = {label: number for number, label in knowledge.CHAPTERS.items()}
    for row in [r for rows in sides.values() for r in rows]:
        key = row["id"].split(":", 1)[1]
        if row["subset"] == "step1":
            right = {k for k, v in row["options"].items() if systems[v] in hpo.ancestors(key)}
        elif row["subset"] == "step2":
            right = {k for k, v in row["options"].items() if chapters[v] == icd.chapter[key.split("#")[0]]}
        else:
            right = {k for k, v in row["options"].items() if v == icd.label[icd.block[key.split("#")[0]]]}
        assert right == {row["gold"]}, row
        assert len(set(row["options"].values())) == 4


def test_distractors_of_step3_are_siblings(sides):
    _, icd = knowledge.knowledge()
    for row in sides["test"]:
        if row["subset"] == "step3":
            code = row["id"].split(":", 1)[1].split("#")[0]
            near = {icd.label[b] for b in icd.siblings[icd.block[code]]}
            assert set(row["options"].values()) <= near


def test_how_common_a_label_is_gives_little_hint(sides):
    """Choosing the label that is most often right on the training side must not do much better than chance."""
    for step in exam.STEP_QUESTION:
        common = Counter(r["options"][r["gold"]] for r in sides["train"] if r["subset"] == step)
        test = [r for r in sides["test"] if r["subset"] == step]
        hits = sum(max(r["options"], key=lambda k: common[r["options"][k]]) == r["gold"] for r in test)
        assert hits / len(test) < 0.36, (step, hits / len(test))


def test_a_slice_of_the_test_side_goes_round_the_concepts(sides):
    first = [r for r in sides["test"] if r["subset"] == "step2"][:200]
    assert len({r["meta"]["concept"] for r in first}) == 200


def test_general_rows_are_right(full):
    rows = read_questions(full / "general_train.parquet")
    sums = [r for r in rows if r["question"].startswith("What is")]
    assert len(sums) > 2000
    for row in sums:
        a, op, b = row["question"].removeprefix("What is ").rstrip("?").split()
        right = int(a) + int(b) if op == "+" else int(a) - int(b)
        assert [k for k, v in row["options"].items() if int(v) == right] == [row["gold"]]
    asked = {r["question"] for r in rows}
    assert not asked & {r["question"] for r in read_questions(full / "general_test.parquet")}


def test_open_instructions_are_of_the_training_side(full, sides):
    concepts = {r["meta"]["concept"] for r in read_questions(full / "test.parquet")}
    rows = read_instructions(full / "open.parquet")
    assert len(rows) == 2000
    assert not concepts & {r["meta"]["concept"] for r in rows}


def test_the_same_seed_makes_the_same_exam(fresh_store):
    small = ExamConfig(train_per_step=5, dev_per_step=5, test_per_step=5, general_train=4, general_test=4, open_instructions=3)
    first = exam.exam(small).manifest["files"]
    store = fresh_store / "exam"
    store.rename(fresh_store / "elsewhere")
    assert exam.exam(small).manifest["files"] == first
    assert exam.exam(small.model_copy(update={"seed": 1})).manifest["files"] != first


def test_asking_for_too_much_says_how_much_there_is(tmp_path):
    with pytest.raises(ConfigError, match=r"has [0-9]+ rows for step1, test; 99999 were asked for"):
        exam.exam.__wrapped__(tmp_path, ExamConfig(test_per_step=99999, train_per_step=1, dev_per_step=1))


@given(st.permutations(["renal", "cysts", "multiple"]))
def test_word_order_and_plurals_do_not_make_another_name(words):
    assert knowledge.normalise(" ".join(words)) == knowledge.normalise("Multiple renal cyst")
