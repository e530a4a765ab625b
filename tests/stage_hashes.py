"""Which code feeds each stage of the store, and a hash of it, so that no cache goes stale unnoticed.

    python tests/stage_hashes.py              # what has changed
    python tests/stage_hashes.py --accept     # record it: the stage's version was raised, or its output is unchanged

A stage's artifacts are reused by key, and the key holds the stage's version. Code that changes what comes out must raise
that version. `stage_hashes.json` keeps for each stage its version and, for every function, class and constant that it
reaches (followed through imports, without comments and docstrings), a hash. tests/test_stages.py fails, naming the stage,
when they differ. After a change that leaves the output as it was, `--accept` records the new code; say why in the commit.
"""

import ast
import functools
import hashlib
import json
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
RECORD = Path(__file__).with_suffix(".json")
# The store, configurations and clients keep their own keys or change no output; what the papers say feeds no stage.
LEFT_OUT = ("ultramed.core", "ultramed.papers")


# Code that a stage runs in a process of its own, where no name leads to it.
ELSEWHERE = {"cost": ("ultramed.train.cost", "measure")}


def path_of(module: str) -> Path:
    path = REPO / Path(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def is_module(name: str) -> bool:
    return path_of(name).exists()


@functools.cache
def symbols(module: str) -> tuple[dict[str, ast.stmt], dict[str, tuple[str, str]]]:
    """(definitions at the top of a module by name, imported names: name -> (module, symbol or ''))."""
    tree, defined, imported = ast.parse(path_of(module).read_text()), {}, {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                defined |= {name.id: node for name in ast.walk(target) if isinstance(name, ast.Name)}
    for node in ast.walk(tree):  # imports inside functions, too
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ultramed"):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                imported[alias.asname or alias.name] = (whole, "") if is_module(whole) else (node.module, alias.name)
    return defined, imported


def reached(module: str, name: str, found: dict[str, str] | None = None) -> dict[str, str]:
    """'module:name' -> hash of everything that a definition uses, itself included."""
    found = {} if found is None else found
    defined, imported = symbols(module)
    if f"{module}:{name}" in found or module.startswith(LEFT_OUT) or name not in defined:
        return found
    found[f"{module}:{name}"] = digest(defined[name])
    for node in ast.walk(defined[name]):
        if isinstance(node, ast.Name):
            if node.id in defined:
                reached(module, node.id, found)
            elif node.id in imported and imported[node.id][1]:
                reached(*imported[node.id], found)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            place, symbol = imported.get(node.value.id, ("", "x"))
            if place and not symbol:
                reached(place, node.attr, found)
    return found


def digest(node: ast.stmt) -> str:
    """Of the code without comments, docstrings and layout; of a stage without its version, which is kept apart."""
    copy = ast.parse(ast.unparse(node))
    for part in ast.walk(copy):
        body = getattr(part, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            body[:1] = [ast.Pass()]
        if isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id == "stage":
            part.keywords = [keyword for keyword in part.keywords if keyword.arg != "version"]
    return hashlib.sha256(ast.dump(copy).encode()).hexdigest()[:12]


def stages() -> dict[str, dict]:
    """Stage -> module, version, and the hashes of its code as it stands."""
    out = {}
    for path in sorted((REPO / "ultramed").rglob("*.py")):
        module = ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.parse(path.read_text()).body:
            version = _version(node)
            if version is not None:
                code = reached(module, node.name)
                if node.name in ELSEWHERE:
                    reached(*ELSEWHERE[node.name], code)
                out[node.name] = {"module": module, "version": version, "code": dict(sorted(code.items()))}
    return out


def _version(node: ast.stmt) -> int | None:
    """The version of a function under `@stage(version=N)`, None for anything else."""
    for decorator in getattr(node, "decorator_list", ()):
        if isinstance(decorator, ast.Call) and getattr(decorator.func, "id", "") == "stage":
            return next(k.value.value for k in decorator.keywords if k.arg == "version")
    return None


def changes() -> list[str]:
    """What differs from the record, a sentence a stage."""
    before, now, out = json.loads(RECORD.read_text()) if RECORD.exists() else {}, stages(), []
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) == now.get(name):
            continue
        if name not in now or name not in before:
            out.append(f"stage {name}: {'new' if name in now else 'gone'}")
            continue
        old, new = before[name]["code"], now[name]["code"]
        code = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        raised = before[name]["version"] != now[name]["version"]
        what = f"version {before[name]['version']} -> {now[name]['version']}" if raised else "version not raised"
        out.append(f"stage {name}: {what}; changed: {', '.join(code) or 'nothing else'}")
    return out


if __name__ == "__main__":
    print("\n".join(changes()) or "nothing has changed")
    if "--accept" in sys.argv[1:]:
        RECORD.write_text(json.dumps(stages(), indent=1) + "\n")
        print(f"recorded in {RECORD.name}")
