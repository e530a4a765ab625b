"""Claims and published cells as data: what stands in them, and the rule that decides a claim."""

import json

import pandas as pd
import pytest
from conftest import REPO
from pydantic import ValidationError
from test_arms import answers

from ultramed.core.config import home
from ultramed.evaluate.arms import Comparison
from ultramed.papers import published
from ultramed.papers.claims import Claim, claims, claims_of
from ultramed.report import scorecard
from ultramed.report.beside import beside, cell_entries

CLAIM = {
    "id": "medalpaca:x",
    "paper": "MedAlpaca",
    "place": "main table",
    "notebook": "11_medalpaca_usmle",
    "statement": "One arm beats another",
    "a": "a",
    "b": "b",
    "kind": "beats",
    "margin": 0,
    "published_note": "in prose",
}


def claim(**changes) -> Claim:
    return Claim(**{**CLAIM, **changes})


@pytest.mark.parametrize(
    ("kind", "margin", "low", "high", "p", "verdict"),
    [
        ("beats", 0, 0.1, 5, 0.049, "reproduced"),
        ("beats", 0, 0.0, 5, 0.01, "inconclusive"),  # the interval must be above 0
        ("beats", 0, 0.1, 5, 0.05, "inconclusive"),  # and p below 0.05
        ("beats", 0, -3, 0.5, 0.5, "inconclusive"),
        ("beats", 0, -3, 0.0, 0.9, "inconclusive"),
        ("beats", 0, -3, -0.1, 0.049, "contradicted"),
        ("beats", 0, -3, -0.1, 0.05, "inconclusive"),  # by the same rule on either side
        ("level", 5, -5, 5, 0.9, "reproduced"),
        ("level", 5, -5.1, 4, 0.01, "inconclusive"),
        ("level", 5, -4, 5.1, 0.01, "inconclusive"),
        ("level", 5, 5.0, 9, 0.01, "inconclusive"),
        ("level", 5, 5.1, 9, 0.01, "contradicted"),
        ("level", 5, -9, -5.1, 0.01, "contradicted"),
        ("level", 5, -9, -5.0, 0.01, "inconclusive"),
        ("not_worse", 5, -5, 1, 0.9, "reproduced"),
        ("not_worse", 5, -5.1, 1, 0.9, "inconclusive"),
        ("not_worse", 5, 6, 9, 0.9, "reproduced"),
        ("not_worse", 5, -9, -5.1, 0.9, "contradicted"),
        ("not_worse", 5, -9, -5.0, 0.9, "inconclusive"),
    ],
)
def test_the_verdict_follows_from_the_kind(kind, margin, low, high, p, verdict):
    assert claim(kind=kind, margin=margin).decide(low, high, p) == verdict


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "level"}, "'level' and 'not_worse' have a margin"),
        ({"margin": 5}, "'beats' has none"),
        ({"published_a": 1}, "give both published values"),
        ({"paper": "UltraMedical"}, "begins with the paper's name"),
        ({"kind": "better"}, "kind"),
        ({"id": "x"}, "id"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_line_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        claim(**changes)


def test_the_claims_of_both_papers_are_there_once():
    every = claims()
    assert len({c.id for c in every}) == len(every) >= 30
    assert {c.paper for c in every} == {"MedAlpaca", "UltraMedical"}
    names = {path.stem for path in (REPO / "notebooks").glob("*.ipynb")}
    assert {c.notebook for c in every} <= names
    assert all(c.needs for c in every if c.unit != "points"), "what has no test needs something"


def mean(table: str, rows: list[str], columns: list[str]) -> float:
    cells = {(c["row"], c["column"]): float(c["published"]) for c in published.cells(table)}
    scale = published.TABLES[table].scale
    return scale * sum(cells[row, column] for row in rows for column in columns) / len(rows) / len(columns)


STEPS = ["step1", "step2", "step3"]
EIGHT, SEVENTY = "8B UltraMedical / {}", "70B UltraMedical / {}"
XPO = ["UltraMed + Vanilla DPO", "UltraMed + Vanilla KTO", "UltraMix + Vanilla DPO", "UltraMix + Vanilla KTO"]
SFT = ["UltraMed + SFT", "UltraMix + SFT"]


@pytest.mark.parametrize(
    ("name", "table", "a", "b", "columns"),
    [
        (
            "medalpaca:finetuned-beats-base",
            "medalpaca_usmle",
            ["MedAlpaca 7b / 7b / full"],
            ["LLaMA 7b / 7b / pretrained"],
            STEPS,
        ),
        (
            "medalpaca:full-beats-lora",
            "medalpaca_usmle",
            ["MedAlpaca 7b / 7b / full"],
            ["MedAlpaca 7b LoRA / 7b / lora"],
            STEPS,
        ),
        (
            "medalpaca:8bit-level-with-lora",
            "medalpaca_usmle",
            ["MedAlpaca 7b LoRA 8bit / 7b / lora 8bit"],
            ["MedAlpaca 7b LoRA / 7b / lora"],
            STEPS,
        ),
        (
            "medalpaca:medical-beats-general",
            "medalpaca_usmle",
            ["MedAlpaca 7b / 7b / full"],
            ["Alpaca 7b naive / 7b / alpaca full"],
            STEPS,
        ),
        (
            "medalpaca:larger-beats-smaller",
            "medalpaca_usmle",
            ["MedAlpaca 13b / 13b / full"],
            ["MedAlpaca 7b / 7b / full"],
            STEPS,
        ),
        (
            "ultramedical:sft-beats-base",
            "ultramedical_table2",
            [EIGHT.format("UltraMed + SFT")],
            ["~7B / Llama-3-8B-Instruct"],
            ["avg"],
        ),
        (
            "ultramedical:xpo-beats-sft",
            "ultramedical_table2",
            [EIGHT.format(x) for x in XPO],
            [EIGHT.format(x) for x in SFT],
            ["avg"],
        ),
        (
            "ultramedical:xpo-beats-sft-70b",
            "ultramedical_table2",
            [SEVENTY.format(x) for x in XPO],
            [SEVENTY.format(x) for x in SFT],
            ["avg"],
        ),
        (
            "ultramedical:mix-costs-nothing",
            "ultramedical_table2",
            [EIGHT.format("UltraMix + SFT")],
            [EIGHT.format("UltraMed + SFT")],
            ["avg"],
        ),
        (
            "ultramedical:medical-rm-beats-general",
            "ultramedical_table4",
            ["UltraMedRM-8B"],
            ["RLHFlow/PairRM-LLaMA3-8B"],
            ["um_avg"],
        ),
        (
            "ultramedical:medical-rm-competitive",
            "ultramedical_table4",
            ["UltraMedRM-8B"],
            ["RLHFlow/PairRM-LLaMA3-8B"],
            ["rb_avg"],
        ),
    ],
)  # the published values of a claim are those of the published tables
def test_published_values_are_those_of_the_tables(name, table, a, b, columns):
    found = next(c for c in claims() if c.id == name)
    assert found.published_a == pytest.approx(mean(table, a, columns), abs=0.011)
    assert found.published_b == pytest.approx(mean(table, b, columns), abs=0.011)


def comparison(difference, se, n=300) -> Comparison:
    low, high = difference - 2 * se, difference + 2 * se
    return Comparison(0.5 + difference, 0.5, difference, low, high, ((se, float("inf")),), n, 1, 0.01, 0.02)


def test_the_p_is_that_of_the_claims_own_test():
    """d = 1, se = 2, margin 5 (points): z = (5 - 1) / 2 = 2 and (1 + 5) / 2 = 3, so one-sided p 0.0228 and 0.0013."""
    pair = comparison(0.01, 0.02)
    assert scorecard.claim_p(claim(), pair) == 0.02, "no difference: the larger of the two tests"
    assert scorecard.claim_p(claim(kind="level", margin=5), pair) == pytest.approx(0.02275, abs=1e-4)
    assert scorecard.claim_p(claim(kind="not_worse", margin=5), pair) == pytest.approx(0.00135, abs=1e-4)


def test_an_entry_says_what_the_run_could_have_seen():
    entry = scorecard.Entry(**scorecard.claim_entry(claim(published_a=60, published_b=57), comparison(0.01, 0.02), "p"))
    assert entry.detectable == pytest.approx(2.8 * 2, abs=0.01)
    assert (entry.difference, entry.se) == pytest.approx((1, 2))
    assert entry.holds_published is True
    assert entry.statement == "One arm beats another"
    assert entry.ours == "51.0 against 50.0"
    (row,) = scorecard.shown([entry]).to_dict("records")
    assert row["A - B, 95% interval"] == "+1.0 [-3.0, 5.0]"
    assert (row["standard error"], row["detectable"], row["holds the published"]) == ("2.0", "5.6", "yes")
    outside = scorecard.claim_entry(claim(published_a=67, published_b=57), comparison(0.01, 0.02), "p")
    assert outside["holds_published"] is False
    assert scorecard.claim_entry(claim(), comparison(0.01, 0.02), "p")["holds_published"] is None


def test_holm_runs_over_a_paper_and_all_its_notebooks():
    """Raw p 0.02 and 0.03 in two notebooks: 0.02 * 2 = 0.04 and max(0.04, 0.03) = 0.04; the other paper is apart."""
    first, second = (c for c in claims() if c.id in ("ultramedical:sft-beats-base", "ultramedical:rm-beats-sc"))
    other = next(c for c in claims() if c.id == "medalpaca:full-beats-lora")
    for found, p in ((first, 0.02), (second, 0.03), (other, 0.04)):
        pair = Comparison(0.6, 0.5, 0.1, 0.01, 0.19, ((0.05, float("inf")),), 300, 1, p, p)
        scorecard.record("family", found.notebook, [scorecard.claim_entry(found, pair, "p")])
    entries = {e.id: e for e in scorecard.build("family")}
    assert [entries[c.id].p_holm for c in (first, second, other)] == pytest.approx([0.04, 0.04, 0.04])
    assert entries[first.id].verdict == "reproduced"
    assert entries[first.id].p == 0.02, "the raw one stays"


def test_claims_that_their_interval_decides_make_no_other_p_larger():
    beats = next(c for c in claims() if c.id == "ultramedical:sft-beats-base")
    level = next(c for c in claims() if c.id == "ultramedical:mix-costs-nothing")
    for found, p in ((beats, 0.03), (level, 0.9)):
        pair = Comparison(0.6, 0.5, 0.1, 0.01, 0.19, ((0.05, float("inf")),), 300, 1, p, p)
        scorecard.record("kinds", found.notebook, [scorecard.claim_entry(found, pair, "p")])
    entries = {e.id: e for e in scorecard.build("kinds")}
    assert (entries[beats.id].p_holm, entries[beats.id].verdict) == (0.03, "reproduced")
    assert (entries[level.id].p_holm, entries[level.id].verdict) == (None, "reproduced")


def test_correction_can_take_a_verdict_back():
    found = claims_of("25_ultramedical_rerank")[:2]
    for c, p in zip(found, (0.03, 0.03), strict=True):
        pair = Comparison(0.6, 0.5, 0.1, 0.01, 0.19, ((0.05, float("inf")),), 300, 1, p, p)
        entry = scorecard.claim_entry(c, pair, "p")
        assert entry["verdict"] == "reproduced"
        scorecard.record("back", c.notebook, [entry])
    assert {e.verdict for e in scorecard.build("back") if e.id in {c.id for c in found}} == {"inconclusive"}


def test_the_scorecard_holds_every_claim_and_every_published_cell():
    entries = {e.id: e for e in scorecard.build("empty")}
    assert {c.id for c in claims()} | {c["id"] for c in published.cells()} == set(entries)
    assert {e.verdict for e in entries.values()} == {"not run", "context"}
    assert all(e.reason for e in entries.values() if e.verdict == "not run")
    assert entries["medalpaca:larger-beats-smaller"].reason == "needs a second, larger set of weights"
    others = [e for e in entries.values() if e.verdict == "context"]
    assert any("GPT-4" in e.statement for e in others)
    assert not any("8B UltraMedical" in e.id for e in others)
    assert {e["id"] for e in json.loads((home() / "figures" / "empty" / "scorecard.json").read_text())} == set(entries)


def test_a_notebook_that_runs_again_forgets_what_it_recorded():
    entry = scorecard.claim_entry(claims_of("11_medalpaca_usmle")[0], comparison(0.1, 0.01), "p")
    scorecard.record("again", "11_medalpaca_usmle", [entry])
    scorecard.forget("again", "11_medalpaca_usmle")
    assert not [e for e in scorecard.build("again") if e.kind == "claim" and e.verdict != "not run"]


def test_diagnostics_get_no_verdict():
    entry = scorecard.Entry(notebook="25_x", **scorecard.diagnostic_entry("25:a-b", "Ours", comparison(0.2, 0.01), "p"))
    assert (entry.kind, entry.verdict) == ("diagnostic", "no verdict")


def test_every_cell_of_an_arm_and_task_is_recorded():
    accuracy = pd.DataFrame(
        [
            {"arm": "full", "subset": "step1", "accuracy": 0.3, "low": 0.25, "high": 0.35, "n": 92},
            {"arm": "full", "subset": "step3", "accuracy": 0.3, "low": 0.25, "high": 0.35, "n": 122},
            {"arm": "full", "subset": "all", "accuracy": 0.3, "low": 0.25, "high": 0.35, "n": 214},
            {"arm": "ours alone", "subset": "step1", "accuracy": 0.3, "low": 0.25, "high": 0.35, "n": 92},
        ]
    )
    names = {"full": "MedAlpaca 7b / 7b / full"}
    entries = cell_entries("medalpaca_usmle", accuracy, names, same_scale=True, protocol="p")
    by_id = {e["id"].rpartition(":")[2]: e for e in entries}
    assert set(by_id) == {"step1", "step3"}, "no published cell for 'all', none for an arm without a row"
    assert (by_id["step1"]["published"], by_id["step1"]["ours"], by_id["step1"]["verdict"]) == (0.297, 0.3, "reproduced")
    assert by_id["step3"]["verdict"] == "not reproduced", "0.398 is not in [0.25, 0.35]"
    assert {e["verdict"] for e in cell_entries("medalpaca_usmle", accuracy, names, same_scale=False, protocol="p")} == {
        "differs in scale"
    }
    shown = beside(entries, {names["full"]: "full"})
    assert list(shown.columns) == ["paper's row", "ours", "paper: step1", "ours: step1", "paper: step3", "ours: step3", "n"]
    with pytest.raises(KeyError, match="has no rows"):
        cell_entries("medalpaca_usmle", accuracy, {"full": "nobody"}, same_scale=False, protocol="p")


def test_per_cent_tables_and_plain_numbers():
    accuracy = pd.DataFrame([{"arm": "base", "subset": "all", "accuracy": 0.5, "low": 0.4, "high": 0.6, "n": 10}])
    (cell,) = cell_entries(
        "ultramedical_table2", accuracy, {"base": "~7B / Llama-3-8B-Instruct"}, {"all": "avg"}, same_scale=False, protocol="p"
    )
    assert (cell["published"], cell["ours"], cell["interval"]) == (68.56, 50.0, (40.0, 60.0))
    row = accuracy.assign(low=0.6, high=0.7)
    for size, verdict in (("8B", "reproduced"), ("70B", "differs in scale")):
        names, how = {"base": "~7B / Llama-3-8B-Instruct"}, {"same_scale": True, "protocol": "p", "size": size}
        (cell,) = cell_entries("ultramedical_table2", row, names, {"all": "avg"}, **how)
        assert cell["verdict"] == verdict, "a row of 8B is no measure of 70B"
    counts = pd.DataFrame([{"part": "MEDIQA", "subset": "n", "value": 2208}, {"part": "CORD-19", "subset": "n", "value": 1000}])
    names = {"MEDIQA": "MEDIQA", "CORD-19": "CORD-19"}
    cells = cell_entries("medalpaca_meadow", counts, names, same_scale=True, protocol="rows counted")
    assert [c["verdict"] for c in cells] == ["reproduced", "not reproduced"]
    memory = pd.DataFrame([{"arm": "LoRA", "subset": "vram_gb", "value": 17.0}])
    names = {"LoRA": "LLaMA 7b / False / True / True / False / False"}
    cells = [cell_entries("medalpaca_cost", memory, names, same_scale=True, protocol="p", tolerance=t)[0] for t in (0.15, 0.05)]
    assert [c["verdict"] for c in cells] == ["reproduced", "not reproduced"], "18.8 is 10% off"
    minutes = memory.assign(subset="minutes_per_epoch")
    [cell] = cell_entries("medalpaca_cost", minutes, names, same_scale=True, protocol="p")
    assert cell["verdict"] == "differs in scale", "another machine's minutes"


def test_tested_claims_carry_their_arms(places):
    from ultramed.book.notebook import Book
    from ultramed.core.config import load_profile
    from ultramed.evaluate.arms import Arms

    book = Book("25_ultramedical_rerank", load_profile("smoke"))
    arms = Arms(greedy=answers([0] * 30 + [1] * 10), self_consistency=answers([1] * 40))
    shown = book.claims(arms)
    assert len(shown) == 1, "only the claim whose two arms are there"
    assert shown.verdict[0] == "reproduced"
    scorecard.forget("smoke", book.name)


def test_two_trained_models_are_compared_over_seeds_enough(places):
    from ultramed.book.notebook import Book
    from ultramed.core.config import load_profile
    from ultramed.core.store import Artifact
    from ultramed.evaluate.arms import Answers, Arms, joined

    def arm(right: int, seeds: int, *stages: str) -> Answers:
        made = answers([1] * right + [0] * (40 - right))
        whole = joined(made.assign(seed=seed, id=[f"{seed}-{i}" for i in range(40)]) for seed in range(seeds))
        return Answers(whole.frame, tuple(Artifact(stage, stage, places) for stage in stages))

    def claims_made(seeds: int) -> list[str]:
        arms = Arms(xpo=arm(39, seeds, "preference", "answers"), sft_of_xpo=arm(20, 3, "sft", "answers"))
        arms |= {"ultramed_sft": arms["sft_of_xpo"], "base": arm(2, 3, "base_model", "answers")}
        made = book.claims(arms)
        assert book.diagnostics(arms, {("xpo", "ultramed_sft"): "DPO beats SFT"}).empty == (seeds < 2)
        scorecard.forget("smoke", book.name)
        return [text.split()[0] for text in made.statement]

    book = Book("22_ultramedical_main", load_profile("smoke", ["seeds_to_compare=2"]))
    assert claims_made(1) == ["SFT"], "against a model that nobody trained one seed will do"
    assert claims_made(2) == ["SFT", "Preference"]
    greedy, reranked = arm(20, 1, "sft", "answers"), arm(30, 1, "sft", "reward", "samples")
    assert book.comparable(reranked, greedy), "one policy's answers, chosen in two ways"


def test_nothing_is_tested_at_the_floor_and_70b_has_its_own_claim(places):
    """GSM8K at 4% cannot fall by 5 points; at 70B the pooled gain is the claim about 70B, tested once."""
    from ultramed.book.notebook import Book, at_floor
    from ultramed.core.config import load_profile
    from ultramed.evaluate.arms import Arms

    claim = next(claim for claim in claims() if claim.id == "ultramedical:general-falls-a-little")
    assert at_floor(claim, answers([1] * 4 + [0] * 96))
    assert not at_floor(claim, answers([1] * 30 + [0] * 70))
    book = Book("22_ultramedical_main", load_profile("smoke", ["ultramedical.published_size=70B"]), "ultramed run 22")
    shown = book.claims(Arms(xpo=answers([1] * 60 + [0] * 40), sft_of_xpo=answers([1] * 40 + [0] * 60)))
    assert [text.startswith("At 70B") for text in shown.statement] == [True]
    two = Arms(best_ensemble=answers([1] * 60 + [0] * 40), best_greedy=answers([1] * 40 + [0] * 60))
    [text] = book.claims(two).statement
    assert not text.startswith("At 70B"), "the claim about 70B has another B"
    scorecard.forget(book.profile.name, book.name)
