"""Anyone's preference pairs and conversations as canonical rows (data/rows.py)."""

import re
from collections import Counter

from ultramed.data import rows as canonical
from ultramed.data.adapters import alpaca_row
from ultramed.data.columns import IDS, Columns, objects, plain_meta
from ultramed.data.formats import BadRow
from ultramed.data.messages import as_completion

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


def pairs(rows: list, where: str, given: dict[str, str] | None = None) -> tuple[list[dict], str]:
    """(canonical pair rows, what was understood). A list of chosen or rejected replies gives a pair for each two of them."""
    columns = Columns(where, objects(rows, where), given or {})
    prompt = columns.find(
        "prompt", ("prompt", "instruction", "conversations", "messages", "question", "query", "input", "history")
    )
    sides = [columns.find(side, (side, f"{side}_response", f"response_{side}")) for side in ("chosen", "rejected")]
    two = [columns.find(f"output {i}", (f"output_{i}", f"response_{i}")) for i in (1, 2)]
    if None in sides and None not in two and columns.find("preference", ("preference", "preference_strength", "label")):
        rows, sides = _by_preference(columns, two), ["chosen", "rejected"]
    if None in sides:
        lacks = "chosen" if sides[0] is None else "rejected"
        names = ", ".join(columns.names)
        raise BadRow(f"{where}, row 1: {lacks}: no such column among {names}; name it with --map {lacks}=COLUMN")
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
    plain_meta(made)
    start = f"prompt from `{prompt}`" if prompt else "prompt from what both replies begin with"
    left_out = f", {torn} left out whose sides answer different prompts" if torn else ""
    return canonical.check_rows(canonical.Pair, made, where), f"{start}, `{sides[0]}` against `{sides[1]}`{left_out}"


def _by_preference(columns: Columns, two: list[str]) -> list[dict]:
    """AlpacaEval's pairs (1: the first output, 2: the second; 1.5 is a tie) or HelpSteer's (-3 to 3: below 0 the first); ties
    are left out. Raises BadRow where numbers could mean either, or neither."""
    mark = columns.find("preference", ("preference", "preference_strength", "label"))
    numbers = [float(row[mark]) for row in columns.rows]
    strength = min(numbers) < 0 or mark.lower() == "preference_strength"
    if not strength and not all(1 <= n <= 2 for n in numbers):
        raise BadRow(
            f"{columns.where}: `{mark}` goes from {min(numbers):g} to {max(numbers):g}; wanted 1 (the first is better) to 2, or a "
            "column `preference_strength`, below 0 where the first is better"
        )
    middle = 0.0 if strength else 1.5
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
    """(turns before it, text of the reply) of a text, a message, a list of messages with or without the prompt, a
    transcript."""
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
