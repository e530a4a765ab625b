"""Anyone's rows as canonical ones (data/rows.py): what each column is, told in a line; what is ambiguous, an error.

A question's text, options and answer are looked for under the names that public sets use. An answer may be a letter, a text
or a number; numbers from 0 and from 1 are told apart by the values that occur. Two columns that could be the answer must
agree on every row. Everything else is kept as `meta`.
"""

import ast
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ultramed.core.errors import ConfigError
from ultramed.data import rows as canonical
from ultramed.data.formats import BadRow, read_table
from ultramed.data.messages import as_completion

log = logging.getLogger(__name__)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
QUESTION = ("question", "query", "sent1", "question_text", "stem", "problem", "input", "prompt", "instruction")
CONTEXT = ("context", "contexts", "passage", "abstract", "vignette")
GOLD = (
    "gold", "answer_idx", "answer_index", "answer_key", "answerkey", "cop", "label", "correct_option", "correct_answer", "correct",
    "correct_idx", "correct_letter", "gold_label", "ground_truth", "final_decision", "answer_id", "target", "answer", "solution",
)  # fmt: skip
OPTIONS = ("options", "choices", "answers", "endings", "candidates", "answer_options", "option")
IDS = ("id", "qid", "question_id", "pmid", "pubid", "realidx", "uid", "idx", "index")
SUBSETS = ("subset", "subject", "subject_name", "category", "topic", "domain")
# Columns that hold an option each: the letter or number is the group.
OPTION_COLUMN = re.compile(r"(?:op|opt|option|choice|answer|ending|cand)?[ _]?([a-j]|[0-9])", re.IGNORECASE)
MAPPABLE = ("question", "context", "options", "gold", "id", "subset", "base")


def parse_map(given: Iterable[str]) -> dict[str, str]:
    """['gold=label', 'base=1'] as a dictionary. Raises ConfigError for a name that cannot be mapped."""
    found = {}
    for text in given:
        name, sign, column = text.partition("=")
        if not sign or name not in MAPPABLE:
            raise ConfigError(f"--map {text!r}: wanted NAME=COLUMN with NAME one of {', '.join(MAPPABLE)} (base=0 or base=1)")
        found[name] = column
    return found


@dataclass
class Columns:
    """The columns of a table, and a way to find one by its usual names."""

    where: str
    rows: list[dict]
    given: dict[str, str] = field(default_factory=dict)  # `--map`
    used: set[str] = field(default_factory=set)

    def __post_init__(self):
        self.names = list(dict.fromkeys(name for row in self.rows for name in row))
        unknown = {n: c for n, c in self.given.items() if n not in ("base", "options") and c not in self.names}
        if unknown:
            raise ConfigError(
                f"{self.where}: --map names columns that are not there: {unknown}; there are {', '.join(self.names)}"
            )

    def find(self, what: str, usual: Iterable[str]) -> str | None:
        """The column of that meaning: the mapped one, else the first usual name, spelled so or in other capitals."""
        if what in self.given:
            return self.take(self.given[what])
        for name in usual:
            like = [column for column in self.names if column.lower().replace(" ", "_") == name]
            if like:
                return self.take(name if name in like else like[0])
        return None

    def all(self, usual: Iterable[str]) -> list[str]:
        found = [c for name in usual for c in self.names if c.lower().replace(" ", "_") == name]
        return [
            c for c in dict.fromkeys(found) if c not in self.used and any(row.get(c) not in (None, "") for row in self.rows)
        ]

    def take(self, column: str) -> str:
        self.used.add(column)
        return column


def _objects(rows: list, where: str) -> list[dict]:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise BadRow(f"{where}, row {number}: wanted an object with named values, got {row!r:.60}")
    return rows


# ------------------------------------------------------------------------------------------------------------- questions


def questions(rows: list, where: str, given: dict[str, str] | None = None) -> tuple[list[dict], str]:
    """(canonical question rows, what was understood). Raises BadRow or ConfigError for what cannot be."""
    columns = Columns(where, _objects(rows, where), given or {})
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
            "id": str(row[name]) if name and not repeated else str(number + 1),
            "question": row.get(text),
            "options": options[number],
        }
        one |= {"gold": gold[number], "context": _context(row.get(context)) if context else None}
        if subset and row.get(subset) not in (None, ""):
            one["subset"] = str(row[subset])
        one["dataset"], one["source"] = (str(row.get(k) or "own") for k in ("dataset", "source"))
        one["meta"] = {c: row[c] for c in meta if c not in ("dataset", "source", "meta") and row.get(c) is not None}
        one["meta"] |= {k: v for k, v in (row.get("meta") or {}).items() if v is not None}
        made.append(one)
    _plain_meta(made)
    numbered = f", rows numbered because `{name}` repeats" if repeated else ""
    return canonical.check_rows(
        canonical.Question, made, where
    ), f"gold from {source}, {told}, question from `{text}`{numbered}"


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
    groups: dict[str, list[tuple[str, str]]] = {}
    for name in columns.names:
        if found := OPTION_COLUMN.fullmatch(name.strip()):
            groups.setdefault(name.strip()[: found.start(1)].lower(), []).append((found[1].upper(), name))
    groups = {k: sorted(v) for k, v in groups.items() if len(v) > 1 and sorted(v)[0][0] in ("A", "0", "1")}
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


def _one_columns(value) -> dict[str, str] | None:
    """letter -> text out of one cell: a dictionary, a list of texts or of labelled texts, or either of them as a text."""
    if isinstance(value, str):
        value = _literal(value)
    if isinstance(value, dict) and isinstance(value.get("text"), list):  # ARC: {'text': [...], 'label': [...]}
        value = value["text"]
    if isinstance(value, dict):
        there = {
            found[1].upper(): v
            for k, v in value.items()
            if v is not None and (found := OPTION_COLUMN.fullmatch(str(k).strip()))
        }
        if len(there) < sum(v is not None for v in value.values()):
            return None
        if all(k in LETTERS for k in there):
            return {k: str(v).strip() for k, v in sorted(there.items())} if len(there) > 1 else None
        if any(k in LETTERS for k in there):
            return None
        value = [v for _, v in sorted(there.items())]
    if not isinstance(value, list) or len(value) < 2 or len(value) > len(LETTERS):
        return None
    if all(isinstance(v, dict) for v in value):  # bigbio: [{'key': 'A', 'value': 'text'}, ...]
        texts = [next((v[k] for k in ("value", "text", "option", "content") if k in v), None) for v in value]
        return dict(zip(LETTERS, map(str, texts), strict=False)) if None not in texts else None
    return {k: re.sub(rf"^\(?{k}[).:]\s+", "", str(v).strip()) for k, v in zip(LETTERS, value, strict=False)}


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
        lowest, over = min(numbers), any(n >= len(o) for n, o in zip(numbers, options, strict=True))
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
        out = [list(o)[n - start] if n - start < len(o) else None for n, o in zip(numbers, options, strict=True)]
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


def _plain_meta(rows: list[dict]) -> None:
    """Meta of one type a name, which Parquet can hold: what is neither text nor number, or both, becomes text."""
    kinds: dict[str, set[type]] = {}
    for row in rows:
        for name, value in row["meta"].items():
            kinds.setdefault(name, set()).add(type(value))
    for row in rows:
        for name, value in row["meta"].items():
            if kinds[name] - {str} and (len(kinds[name]) > 1 or kinds[name] - {int, float, bool}):
                row["meta"][name] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


# ----------------------------------------------------------------------------------------------------------------- pairs


def as_messages(value, role: str = "user") -> list[dict]:
    """Messages of a text, of one message, or of a list of messages (role and content, or ShareGPT's from and value)."""
    names = {
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "assistant": "assistant",
        "system": "system",
        "bot": "assistant",
    }
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    turns = [value] if isinstance(value, dict) else list(value)
    made = []
    for turn in turns:
        who, text = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if str(who).lower() not in names or not isinstance(text, str):
            raise ValueError(f"a message is {{'role', 'content'}} or {{'from', 'value'}}, got {turn!r:.80}")
        made.append({"role": names[str(who).lower()], "content": text})
    return made


def transcript(text: str) -> list[dict]:
    """Messages of an HH-RLHF transcript, '\\n\\nHuman: …\\n\\nAssistant: …'."""
    parts = re.split(r"\n\n(Human|Assistant): ?", text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": words.strip()} for who, words in zip(parts[::2], parts[1::2], strict=True)]


def pairs(rows: list, where: str) -> tuple[list[dict], str]:
    """(canonical pair rows, what was understood). A list of chosen or rejected replies gives a pair for each two of them."""
    columns = Columns(where, _objects(rows, where))
    prompt = columns.find(
        "prompt", ("prompt", "instruction", "conversations", "messages", "question", "query", "input", "history")
    )
    sides = [columns.find(side, (side, f"{side}_response", f"response_{side}")) for side in ("chosen", "rejected")]
    two = [columns.find(f"output {i}", (f"output_{i}", f"response_{i}")) for i in (1, 2)]
    if None in sides and None not in two and columns.find("preference", ("preference", "preference_strength", "label")):
        rows, sides = _by_preference(columns, two), ["chosen", "rejected"]
    if None in sides:
        lacks = "chosen" if sides[0] is None else "rejected"
        raise BadRow(f"{where}, row 1: {lacks}: no such column among {', '.join(columns.names)}")
    made, name, torn = [], columns.find("id", IDS), 0
    for number, row in enumerate(rows, 1):
        try:
            found = _pairs_of(row, number, prompt, sides, name, columns)
            made.extend(found)
            torn += not found
        except (ValueError, AttributeError, TypeError, KeyError) as err:
            raise BadRow(f"{where}, row {number}: {err}") from None
    counts = Counter(row["id"] for row in made)
    if any(n > 1 for n in counts.values()):  # RewardBench's id is a number within its subset
        made = [{**row, "id": f"{row['subset']}:{n}:{row['id']}"} for n, row in enumerate(made)]
    _plain_meta(made)
    start = f"prompt from `{prompt}`" if prompt else "prompt from what both replies begin with"
    left_out = f", {torn} left out whose sides answer different prompts" if torn else ""
    return canonical.check_rows(canonical.Pair, made, where), f"{start}, `{sides[0]}` against `{sides[1]}`{left_out}"


def _by_preference(columns: Columns, two: list[str]) -> list[dict]:
    """AlpacaEval's pairs (1: the first output, 2: the second) or HelpSteer's (-3 to 3: below 0 the first); ties are left out."""
    mark = columns.find("preference", ("preference", "preference_strength", "label"))
    numbers = [float(row[mark]) for row in columns.rows]
    middle = 0.0 if min(numbers) < 0 else 1.5
    return [
        {**row, "chosen": row[two[0] if n < middle else two[1]], "rejected": row[two[1] if n < middle else two[0]]}
        for row, n in zip(columns.rows, numbers, strict=True)
        if n != middle
    ]


def _pairs_of(row: dict, number: int, prompt: str | None, sides: list[str], name: str | None, columns: Columns) -> list[dict]:
    """Pairs of one row; none where the two sides answer different prompts."""
    asked = as_messages(row[prompt]) if prompt and row.get(prompt) else []
    replies = []
    for side in sides:
        if row.get(side) is None:
            raise ValueError(f"{side}: missing")
        value = row[side]
        several = isinstance(value, list) and all(isinstance(v, str) for v in value)
        replies.append([_reply(v, asked, side) for v in (value if several else [value])])
    start = asked or replies[0][0][0]
    if any(before and before[-1:] != start[-1:] for side in replies for before, _ in side):
        return []
    subset = next((str(row[c]) for c in ("subset", "domain", "label_type", "category", "section") if row.get(c)), "all")
    own = str(row[name]) if name and row.get(name) is not None else str(number)
    meta = {
        c: row[c]
        for c in columns.names
        if c not in {prompt, *sides, name, "subset", "source", "meta"} and row.get(c) is not None
    }
    meta |= row["meta"] if isinstance(row.get("meta"), dict) else {}
    out = []
    for i, (_, chosen) in enumerate(replies[0]):
        for j, (_, rejected) in enumerate(replies[1]):
            each = f"{own}#{i}{j}" if len(replies[0]) * len(replies[1]) > 1 else own
            turns = {"prompt": start, "chosen": as_completion(chosen), "rejected": as_completion(rejected)}
            out.append({"id": each, "source": str(row.get("source") or "own"), "subset": subset, **turns, "meta": {**meta}})
            if each != own:
                out[-1]["meta"]["prompt_id"] = own
    return out


def _reply(value, asked: list[dict], side: str) -> tuple[list[dict], str]:
    """(turns before it, text of the reply) of a text, a message, a list of messages with or without the prompt, a transcript."""
    if isinstance(value, str) and not asked and "\n\nHuman:" in value:
        value = transcript(value)
    if isinstance(value, str):
        return [], value
    turns = as_messages(value, "assistant")
    if turns[-1]["role"] != "assistant":
        raise ValueError(f"{side}: the last message is the {turns[-1]['role']}'s, wanted a reply")
    return turns[:-1], turns[-1]["content"]


# ---------------------------------------------------------------------------------------------------------- instructions


def instructions(rows: list, where: str) -> tuple[list[dict], str]:
    """(canonical rows, what was understood): instructions where every row has an answer, else prompts. Texts or messages,
    Alpaca's instruction/input/output, ShareGPT's conversations, question and answer."""
    from ultramed.data.adapters import alpaca_row

    out, how = [], Counter()
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise BadRow(f"{where}, row {number}: wanted an object with `prompt` or `instruction`, got {row!r:.60}")
        given = {k: row[k] for k in ("reference", "meta") if row.get(k)}
        turns = next((k for k in ("messages", "conversations", "conversation") if isinstance(row.get(k), list)), None)
        try:
            if "instruction" in row:
                made = alpaca_row(
                    {**row, "input": row.get("input") or "", "output": row.get("output") or row.get("response") or ""}, number
                )
                how["instruction"] += 1
            elif turns:
                said = as_messages(row[turns])
                last = said.pop()["content"] if said[-1]["role"] == "assistant" else ""
                made = {"prompt": said, "completion": as_completion(last)}
                how[turns] += 1
            else:
                asked = next((k for k in ("prompt", "question", "query", "Question") if row.get(k)), "prompt")
                answer = next((k for k in ("completion", "answer", "response", "output", "Response") if row.get(k)), None)
                made = {"prompt": as_messages(row[asked])} if row.get(asked) else {}
                made["completion"] = as_messages(row[answer], "assistant") if answer else as_completion("")
                how[asked] += 1
        except (ValueError, TypeError, AttributeError, KeyError, IndexError) as err:
            raise BadRow(f"{where}, row {number}: {err}") from None
        if not made["completion"][0]["content"]:
            del made["completion"]
        out.append({"id": str(row.get("id", number)), "source": str(row.get("source", "own")), **given, **made})
    whole = all("completion" in row for row in out)
    for row in out:
        row.pop("reference" if whole else "completion", None)
    kind = canonical.Instruction if whole else canonical.Prompt
    told = f"{'prompt and answer' if whole else 'prompts'} from `{how.most_common(1)[0][0]}`"
    return canonical.check_rows(kind, out, where), told


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
        made, told = pairs(rows, where) if kind == "pairs" else instructions(rows, where)
    unit = kind if kind != "instructions" else "rows"
    log.info("read %d %s from %s: %s", len(made), unit, Path(path).name, told)
    return made
