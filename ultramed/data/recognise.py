"""Anyone's rows as canonical ones (data/rows.py): what each column is, told in a line; what is ambiguous, an error.

A question's text, options and answer are looked for under the names that public sets use. An answer may be a letter, a text
or a number; numbers from 0 and from 1 are told apart by the values that occur. Two columns that could be the answer must
agree on every row. Everything else is kept as `meta`.
"""

import ast
import functools
import json
import logging
import re
from pathlib import Path

from ultramed.core.errors import ConfigError
from ultramed.data import rows as canonical
from ultramed.data.columns import IDS, Columns, objects, plain_meta
from ultramed.data.conversations import instructions, pairs
from ultramed.data.formats import BadRow, read_table
from ultramed.data.knowledge import uniform_hash

log = logging.getLogger(__name__)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
QUESTION = ("question", "query", "sent1", "question_text", "qtext", "stem", "problem", "input", "prompt", "instruction")
CONTEXT = ("context", "contexts", "passage", "abstract", "vignette")
GOLD = [
    "gold",
    "answer_idx",
    "answer_index",
    "answer_key",
    "answerkey",
    "cop",
    "label",
    "correct_option",
    "correct_answer",
    "correct",
    "correct_idx",
    "correct_letter",
    "gold_label",
    "ra",
    "ground_truth",
    "final_decision",
    "answer_id",
    "target",
    "answer",
    "solution",
]
OPTIONS = ("options", "choices", "answers", "endings", "candidates", "answer_options", "option")
SUBSETS = ("subset", "subject", "subject_name", "category", "topic", "domain")
RIGHT = ("correct_answer", "right_answer", "answer", "solution")
WRONG = re.compile(r"(?:distractor|(?:incorrect|wrong)[ _]?(?:answer|option)s?)[ _]?[0-9]?", re.IGNORECASE)  # SciQ, GPQA
# Columns that hold an option each, by the letter or number that is the group; beyond ten only where the name leaves no doubt
# (`options` is no option S).
NAMED = "opt|option|choice|answer|ending|cand"
OPTION_COLUMN = re.compile(rf"(?:op|{NAMED})?[ _]?([a-j]|[0-9])|(?:{NAMED})(?:[ _]([k-z])|[ _]?([1-9][0-9]))", re.IGNORECASE)


# ------------------------------------------------------------------------------------------------------------- questions


def questions(rows: list, where: str, given: dict[str, str] | None = None) -> tuple[list[dict], str]:
    """(canonical question rows, what was understood). Raises BadRow or ConfigError for what cannot be."""
    rows = _flat(objects(rows, where))
    columns = Columns(where, rows, given or {})
    text = columns.find("question", QUESTION)
    if text is None:
        raise BadRow(
            f"{where}, row 1: question: none of the columns {', '.join(columns.names)}; name it with --map question=COLUMN"
        )
    options, told = _options(columns)
    if options is None:
        if columns.all(("final_decision",)):
            options, told = [{"A": "yes", "B": "no", "C": "maybe"}] * len(rows), "options yes, no, maybe"
        else:
            raise BadRow(
                f"{where}, row 1: options: none found in {', '.join(columns.names)}; name the column with --map options=COLUMN"
            )
    gold, source = _gold(columns, options)
    context, name, subset = (columns.find(k, u) for k, u in (("context", CONTEXT), ("id", IDS), ("subset", SUBSETS)))
    repeated = name is not None and len({str(row.get(name)) for row in rows}) < len(rows)
    if repeated:
        columns.used.discard(name)
    meta = [c for c in columns.names if c not in columns.used]
    made = []
    for number, row in enumerate(rows):
        one = {
            "id": str(row[name]) if name and not repeated and row.get(name) is not None else str(number + 1),
            "question": row.get(text),
            "options": options[number],
        }
        one |= {"gold": gold[number], "context": _context(row.get(context)) if context else None}
        if subset and row.get(subset) not in (None, ""):
            one["subset"] = str(row[subset])
        one["dataset"], one["source"] = (str(row.get(k) or "own") for k in ("dataset", "source"))
        one["meta"] = {c: row[c] for c in meta if c not in ("dataset", "source", "meta") and row.get(c) is not None}
        own = row.get("meta") or {}
        one["meta"] |= {k: v for k, v in own.items() if v is not None} if isinstance(own, dict) else {"meta": own}
        made.append(one)
    plain_meta(made)
    numbered = f", rows numbered because `{name}` repeats" if repeated else ""
    return canonical.check_rows(
        canonical.Question, made, where
    ), f"gold from {source}, {told}, question from `{text}`{numbered}"


def _flat(rows: list[dict]) -> list[dict]:
    """Rows whose question stands in an object of its own (`data` on the hub, `question` in ARC) with its columns beside the
    others."""
    for name in ("data", "question"):
        if all(isinstance(row.get(name), dict) for row in rows):
            rows = [{k: v for k, v in row.items() if k != name} | row[name] for row in rows]
    return rows


def _context(value) -> str | None:
    if isinstance(value, dict):  # PubMedQA on the hub: {'contexts': [...], 'labels': [...]}
        value = next((v for k, v in value.items() if k.lower() in CONTEXT), None)
    return "\n".join(map(str, value)) if isinstance(value, list) else (str(value) if value else None)


def _options(columns: Columns) -> tuple[list[dict[str, str]] | None, str]:
    """(options of every row, how they were found), from one column of them or from a column each."""
    column = columns.find("options", OPTIONS)
    if column is not None and (made := [_one_columns(row.get(column)) for row in columns.rows]) and all(made):
        sizes = sorted({len(m) for m in made})
        return made, f"{sizes[0] if len(sizes) == 1 else f'{sizes[0]} to {sizes[-1]}'} options from `{column}`"
    if column is not None:
        bad = next(i for i, m in enumerate(made) if not m)
        if column in columns.given.values() or column.lower() in ("options", "choices"):
            raise BadRow(
                f"{columns.where}, {_with_id(f'row {bad + 1}', columns)}: options: wanted a dictionary or a list of texts in `{column}`, "
                f"got {columns.rows[bad].get(column)!r:.60}"
            )
        columns.used.discard(column)
    if (right := columns.all(RIGHT)) and (wrong := [name for name in columns.names if WRONG.fullmatch(name.strip())]):
        return _dealt(columns, right[0], wrong), f"`{right[0]}` and {len(wrong)} wrong options, dealt to letters"
    groups: dict[str, list[tuple[str, str]]] = {}
    for name in columns.names:
        if mark := _mark(name):
            groups.setdefault(name.strip(" .):")[: -len(mark)].lower(), []).append((mark, name))
    groups = {k: sorted(v, key=_in_order) for k, v in groups.items() if len(v) > 1}
    groups = {k: v for k, v in groups.items() if v[0][0] in ("A", "0", "1")}
    if len(groups) > 1:
        readings = " or ".join(f"`{v[0][1]}`..`{v[-1][1]}`" for v in groups.values())
        raise ConfigError(f"{columns.where}: the options could be {readings}; drop one of them from the file")
    for found in groups.values():
        for _, name in found:
            columns.take(name)
        made = [
            {LETTERS[i]: str(row[name]).strip() for i, (_, name) in enumerate(found) if row.get(name) not in (None, "")}
            for row in columns.rows
        ]
        return made, f"{len(found)} options from `{found[0][1]}`..`{found[-1][1]}`"
    return None, ""


def _dealt(columns: Columns, right: str, wrong: list[str]) -> list[dict[str, str]]:
    """Options of rows that keep the right one apart from the wrong ones, in an order that tells nothing and is always the
    same."""
    names, made = [right, *map(columns.take, wrong)], []
    for row in columns.rows:
        texts = sorted(str(row[name]).strip() for name in names if row.get(name) not in (None, ""))
        texts = sorted(texts, key=functools.partial(uniform_hash, "options", *texts))
        made.append(dict(zip(LETTERS, texts, strict=False)))
    return made


def _mark(name) -> str | None:
    """The letter or number of an option's column (or key), in capitals; None for another column."""
    found = OPTION_COLUMN.fullmatch(str(name).strip(" .):"))
    return found[found.lastindex].upper() if found else None


def _in_order(marked: tuple[str, object]) -> tuple[bool, int, str]:
    """Numbers by their size, then letters."""
    mark = marked[0]
    return (not mark.isdigit(), int(mark) if mark.isdigit() else 0, mark)


def _are_letters(marks: list[str], texts: list) -> bool:
    """Whether each text has a letter of its own."""
    return len(set(marks)) == len(texts) and all(len(mark) == 1 and mark in LETTERS for mark in marks)


def _one_columns(value) -> dict[str, str] | None:
    """letter -> text out of one cell: a dictionary, a list of texts or of labelled texts, or either of them as a text."""
    if isinstance(value, str):
        value = _literal(value)
    if isinstance(value, dict) and isinstance(value.get("text"), list):  # ARC: {'text': [...], 'label': [...]}
        marks, texts = [str(mark).strip().upper() for mark in value.get("label") or ()], value["text"]
        value = dict(zip(marks, texts, strict=True)) if _are_letters(marks, texts) else texts
    if isinstance(value, dict):
        there = {mark: v for k, v in value.items() if v is not None and (mark := _mark(k))}
        if len(there) < sum(v is not None for v in value.values()):
            return None
        if all(k in LETTERS for k in there):
            return {k: str(v).strip() for k, v in sorted(there.items())} if len(there) > 1 else None
        if any(k in LETTERS for k in there):
            return None
        value = [v for _, v in sorted(there.items(), key=_in_order)]
    if not isinstance(value, list) or len(value) < 2 or len(value) > len(LETTERS):
        return None
    if all(isinstance(v, dict) for v in value):  # bigbio: [{'key': 'A', 'value': 'text'}, ...]
        texts = [next((v[k] for k in ("value", "text", "atext", "option", "content") if k in v), None) for v in value]
        marks = [str(v.get("key", v.get("label", v.get("aid", "")))).strip().upper() for v in value]
        named = zip(marks if _are_letters(marks, texts) else LETTERS, map(str, texts), strict=False)
        return dict(sorted(named)) if None not in texts else None
    there = [(k, str(v).strip()) for k, v in zip(LETTERS, value, strict=False) if v is not None]
    return {k: re.sub(rf"^\(?{k}[).:]\s+", "", text) for k, text in there}


def _literal(text: str):
    """A list or dictionary that stands in a cell as JSON or as Python wrote it; or 'A. eye B. ear' in its parts."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    parts = re.split(r"(?:^|\s)\(?([A-J])[).:]\s+", text)
    return parts[2::2] if len(parts) > 4 and "".join(parts[1::2]) == LETTERS[: len(parts[1::2])] else None


def _gold(columns: Columns, options: list[dict]) -> tuple[list[str], str]:
    """(gold letter of every row, the column it came from)."""
    where, rows = columns.where, columns.rows
    names = [columns.given["gold"]] if "gold" in columns.given else columns.all(GOLD)
    names = ["gold"] if "gold" in names else names
    readings = {name: _letters([row.get(name) for row in rows], options, columns.given.get("base")) for name in names}
    good = {name: letters for name, letters in readings.items() if isinstance(letters, list)}
    if not good:
        if not names:
            raise BadRow(
                f"{where}, row 1: gold: no column of the answer among {', '.join(columns.names)}; name it with --map gold=COLUMN"
            )
        raise BadRow(f"{where}: gold: " + "; ".join(f"`{name}`: {_with_id(why, columns)}" for name, why in readings.items()))
    first = next(iter(good))
    for name, letters in good.items():
        if letters != good[first]:
            n = next(i for i, (a, b) in enumerate(zip(good[first], letters, strict=True)) if a != b)
            raise ConfigError(
                f"{where}: the answer of row {n + 1} is {good[first][n]} by `{first}` and {letters[n]} by `{name}`; "
                f"say which with --map gold={first} or --map gold={name}"
            )
        columns.take(name)
    return good[first], " and ".join(f"`{name}`" for name in good)


def _with_id(why: str, columns: Columns) -> str:
    """The complaint about 'row 3' with that row's id, if it has one."""
    found, name = re.match(r"row (\d+)", why), columns.find("id", IDS)
    known = columns.rows[int(found[1]) - 1].get(name) if found and name else None
    return f"{found[0]} ({known}){why[found.end() :]}" if known is not None else why


def _letters(values: list, options: list[dict], base: str | None) -> list[str] | str:
    """Letters of a column of answers, or why it cannot be read as such."""
    values = [v[0] if isinstance(v, list) and len(v) == 1 else v for v in values]
    values = [str(v).strip() if v is not None else "" for v in values]
    if missing := [i for i, v in enumerate(values) if not v]:
        return f"row {missing[0] + 1} has none"
    numbers = [int(v.removesuffix(".0")) if re.fullmatch(r"\d{1,2}(\.0)?", v) else None for v in values]
    texts = [v.casefold() in {t.casefold() for t in o.values()} for v, o in zip(values, options, strict=True)]
    if None not in numbers and not all(texts):
        last = [LETTERS.index(max(o)) for o in options]  # place of the last option: the letters of blank ones count, too
        lowest, over = min(numbers), any(n > place for n, place in zip(numbers, last, strict=True))
        starts = {str(b) for b in (0, 1) if (b == 0 and not over) or (b == 1 and lowest > 0)}
        if base is not None:
            starts &= {base}
        if not starts:
            return f"its numbers go from {lowest} to {max(numbers)}, and there are {len(options[0])} options"
        if len(starts) == 2:
            return (
                f"its numbers ({lowest} to {max(numbers)}) could count from 0 or from 1; say which with --map base=0 or base=1"
            )
        start = int(starts.pop())
        letters = [LETTERS[n - start : n - start + 1] for n in numbers]  # nothing beyond Z
        out = [letter if letter in o else None for letter, o in zip(letters, options, strict=True)]
        return out if None not in out else f"row {out.index(None) + 1}: {values[out.index(None)]} is beyond the options"
    bare = all(re.fullmatch(r"\(?[A-Za-z][).:]?", v) for v in values)
    if not bare and all(list(o.values()).count(v) == 1 for v, o in zip(values, options, strict=True)):  # 'B' may be a text, too
        return [next(k for k, t in o.items() if t == v) for v, o in zip(values, options, strict=True)]
    out = []
    for number, (value, choices) in enumerate(zip(values, options, strict=True), 1):
        exact = [k for k, t in choices.items() if t.strip() == value]
        by_text = exact or [k for k, t in choices.items() if t.strip().casefold() == value.casefold()]
        letter = re.fullmatch(r"\(?([A-Za-z])\)?[.:)]?(\s.*)?", value, re.DOTALL)
        named = letter is not None and letter[1].upper() in choices
        if named and not letter[2]:
            out.append(letter[1].upper())
        elif len(by_text) == 1:
            out.append(by_text[0])
        elif named and not by_text and re.match(r"\(?[A-Za-z][.:)]", value):  # 'B. ear'
            out.append(letter[1].upper())
        else:
            why = "stands twice among" if by_text else f"wanted one of {', '.join(choices)}, or the text of one of"
            return f"row {number}: {why} the options, got {value!r:.60}"
    return out


# ----------------------------------------------------------------------------------------------------------------- files


def read(path: Path, kind: str, given: dict[str, str] | None = None) -> list[dict]:
    """Canonical rows of anyone's file, with a line in the log of what was understood.

    kind: 'questions', 'pairs', or 'rows' (questions where there are options, else instructions or prompts).
    """
    rows, where = read_table(path), str(path)
    if kind == "rows":
        asked = isinstance(rows[0], dict) and {"options", "choices"} & {k.lower() for k in rows[0]}
        kind = "questions" if asked else "instructions"
    if kind == "questions":
        made, told = questions(rows, where, given)
    else:
        made, told = pairs(rows, where, given) if kind == "pairs" else instructions(rows, where)
    unit = kind if kind != "instructions" else "rows"
    log.info("read %d %s from %s: %s", len(made), unit, Path(path).name, told)
    return made
