"""Profiles: YAML files with `extends`, and overrides that all go through one door.

`load_profile("laptop", ["train.epochs=2"])` is what the command line's `--set train.epochs=2`, papermill's
`-p overrides '["train.epochs=2"]'` and `-p train__epochs 2`, and a sweep's grid all end in. A key nobody knows is an
error that names the nearest known one.
"""

import difflib
import functools
import hashlib
import os
import re
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ultramed.core.errors import ConfigError
from ultramed.core.profile import ChangesTo, Profile
from ultramed.core.schema import Merging, PreferenceConfig, TrainConfig

NOTHING_SPECIAL = Merging()
PROCESSES = "ULTRAMED_PROCESSES"  # environment variable: how many processes train together (train/launch.py)

# ------------------------------------------------------------------------------------------------- files and overrides


def home() -> Path:
    """The repository (or a copy of its `params/` and `notebooks/`) that this process works in."""
    if "ULTRAMED_HOME" in os.environ:
        return Path(os.environ["ULTRAMED_HOME"]).resolve()
    places = [Path.cwd(), *Path.cwd().parents, Path(__file__).resolve().parents[2]]
    return next((p for p in places if (p / "params").is_dir() and (p / "notebooks").is_dir()), Path.cwd())


def profiles() -> list[str]:
    """Names of the profiles at hand."""
    return sorted(p.stem for p in (home() / "params").glob("*.yaml"))


def merge(base: dict, changes: dict, kind: Any) -> dict:
    """`base` with `changes`, both plain data of type `kind` (a pydantic model, or a dictionary's annotation).

    Dictionaries merge key by key, and an empty one empties. Lists and values are replaced, and so are dictionaries whose
    type says so (schema.Merging). `null` removes a dictionary.
    """
    out = dict(base)
    for key, value in changes.items():
        below, how = types_at(kind, key)
        if value and isinstance(value, dict) and isinstance(out.get(key), dict) and not how.replaced:
            out[key] = merge(out[key], value, below)
        elif value is None and isinstance(out.get(key), dict):
            del out[key]
        else:
            out[key] = value
    return out


def types_at(kind: Any, key: Any) -> tuple[Any, Merging]:
    """(type of what is at `key` of a value of type `kind`, how it takes part in profiles); (None, ...) if not known.

    A dictionary of changes to a model (profile.ChangesTo) has the types of that model.
    """
    annotation, marks = None, ()
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        if key in kind.model_fields:
            annotation, marks = kind.model_fields[key].annotation, tuple(kind.model_fields[key].metadata)
    elif typing.get_origin(kind) is dict:
        annotation = typing.get_args(kind)[1]
    while typing.get_origin(annotation) in (typing.Annotated, typing.Union, types.UnionType):
        first, *more = typing.get_args(annotation)
        marks += tuple(more) if typing.get_origin(annotation) is typing.Annotated else ()
        annotation = first
    if changed := next((mark.model for mark in marks if isinstance(mark, ChangesTo)), None):
        annotation = changed
    return annotation, next((mark for mark in marks if isinstance(mark, Merging)), NOTHING_SPECIAL)


def nearest(word: str, known) -> str:
    """'; did you mean X?' or a list of what there is."""
    known = sorted(map(str, known))
    close = difflib.get_close_matches(word, known, 1, 0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def known(name: str, there, where: str) -> None:
    """Raises ConfigError, with the nearest one, if `name` is none of the names `there` are."""
    if name not in there:
        raise ConfigError(f"no {name!r} in {where}{nearest(name, there)}")


def read_yaml(path: Path) -> dict:
    try:
        data = yaml.load(path.read_text(), Loader=_UniqueKeys)
    except OSError as err:
        raise ConfigError(f"{path}: cannot be read ({err.strerror})") from None
    except yaml.YAMLError as err:
        raise ConfigError(f"{path}: not valid YAML: {err}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: wanted a mapping of keys to values, got {type(data).__name__}")
    return data


class _UniqueKeys(yaml.SafeLoader):
    """YAML lets a key be written twice and keeps the last: in a parameter file that is a mistake. And 2e-5 is a number."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(k, deep=deep) for k, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"key {key!r} is written twice (line {node.start_mark.line + 1})")
        return super().construct_mapping(node, deep)


_UniqueKeys.add_implicit_resolver(  # YAML 1.1 reads 2e-5 as text; everybody else as a number
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def is_path(profile: str) -> bool:
    """Whether a profile is named by its file, and not by its name in params/."""
    return profile.endswith((".yaml", ".yml"))


def profile_path(name: str) -> Path:
    """Of a file of params/ by its name, or of a path. Raises ConfigError, with the nearest name, if there is none."""
    path = Path(name) if is_path(name) else home() / "params" / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"no profile {name!r} (looked for {path}){nearest(name, profiles())}")
    return path


def chain(name: str, _seen: tuple = ()) -> list[tuple[Path, dict]]:
    """The profile's file and those it extends, each with what it says itself, the last ancestor first. A path that is extended
    is seen from the folder of the file that names it."""
    path = profile_path(name)
    if path in _seen:
        raise ConfigError(f"{path}: `extends` goes round in a circle")
    data = read_yaml(path)
    parent = data.pop("extends", None)
    if parent and is_path(parent):
        parent = str(path.parent / parent)
    return [*(chain(parent, (*_seen, path)) if parent else ()), (path, data)]


def raw_profile(name: str) -> dict:
    """The profile as a plain dictionary, its `extends` chain merged."""
    files = chain(name)
    data = functools.reduce(lambda base, changes: merge(base, changes, Profile), [said for _, said in files])
    return {**data, "name": files[-1][0].stem}


def set_by(name: str) -> dict[str, str]:
    """'train.epochs' -> 'params/gpu.yaml:9', for every key that a file of the profile's chain writes; the last one counts."""
    places: dict[str, str] = {}

    def visit(node: yaml.Node, key: str, file: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for name, value in node.value:
                visit(value, f"{key}.{name.value}".lstrip("."), file)
            return
        places[key] = f"{file}:{node.start_mark.line + 1}"
        if isinstance(node, yaml.SequenceNode):
            for number, value in enumerate(node.value):
                visit(value, f"{key}.{number}", file)

    for path, _ in chain(name):
        visit(yaml.compose(path.read_text()), "", str(path.relative_to(home()) if path.is_relative_to(home()) else path))
    return places


def resolved_values(name: str, overrides: list[str] | tuple[str, ...] = ()) -> list[tuple[str, Any, str]]:
    """Every value of a profile: (dotted key, value, where it was set: a file and line, an override, or the default)."""
    places = set_by(name) | {".".join(parse_override(text)[0]): f"--set {text}" for text in overrides}
    rows = []

    def visit(value: Any, key: str, place: str) -> None:
        place = places.get(key, place)
        if isinstance(value, dict) and value:
            for name, inner in value.items():
                visit(inner, f"{key}.{name}".lstrip("."), place)
        elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
            for number, inner in enumerate(value):
                visit(inner, f"{key}.{number}", place)
        else:
            rows.append((key, value, place))

    for key, value in load_profile(name, overrides).model_dump(mode="json").items():
        visit(value, key, "default")
    return rows


def parse_override(text: str) -> tuple[list[str], Any]:
    """'train.epochs=2' -> (['train', 'epochs'], 2). The value is read as YAML."""
    key, sep, value = text.partition("=")
    if not sep or not key.strip():
        raise ConfigError(f"override {text!r}: wanted key=value, as in train.epochs=2")
    try:
        return key.strip().split("."), yaml.load(value, Loader=_UniqueKeys)
    except yaml.YAMLError as err:
        raise ConfigError(f"override {text!r}: the value is not valid YAML: {err}") from None


def apply_override(data: dict, keys: list[str], value: Any) -> dict:
    """A copy of `data` with the value at the dotted path set; list items are addressed by number."""
    head, *rest = keys
    if isinstance(data, list):
        if not head.isdigit() or int(head) >= len(data):
            raise ConfigError(f"override: {head!r} is not an index into a list of {len(data)}")
        if rest and not isinstance(data[int(head)], dict | list):
            raise ConfigError(f"override {'.'.join(keys)}: {head!r} is a value, not a section")
        new = list(data)
        new[int(head)] = apply_override(data[int(head)], rest, value) if rest else value
        return new
    if rest and not isinstance(data.get(head, {}), dict | list):
        raise ConfigError(f"override {'.'.join(keys)}: {head!r} is a value, not a section")
    return {**data, head: apply_override(data.get(head, {}), rest, value) if rest else value}


def overridden(data: dict, overrides: Iterable[str]) -> dict:
    """`data` with every override ('a.b=value') applied, in their order."""
    for text in overrides:
        data = apply_override(data, *parse_override(text))
    return data


def limited(data: Any, limit: int, kind: Any, how: Merging = NOTHING_SPECIAL) -> Any:
    """`data` of type `kind` with no count of rows, questions or prompts above `limit` (multiples of a source count as more)."""
    if isinstance(data, dict):
        out = {}
        for key, value in data.items():
            below, inner = types_at(kind, key)
            out[key] = limited(value, limit, below, Merging(rows=how.rows or inner.rows))
        return out
    if how.rows and isinstance(data, int | float) and not isinstance(data, bool):
        return limit if isinstance(data, float) else min(data or limit, limit)  # 0: all
    return data


def results_name(name: str, overrides: Iterable[str]) -> str:
    """Folder of figures/ for a profile with overrides, such as 'laptop+train.lora.r=16': a trial replaces no profile's results.
    What a file's name cannot hold becomes a dash, with a hash of it all."""
    said = "+".join(overrides)
    kept = re.sub(r"[^\w.=+-]+", "-", said)[:80]
    return name + (f"+{kept}" if said else "") + ("" if kept == said else f"-{hashlib.sha256(said.encode()).hexdigest()[:6]}")


def load_profile(name: str = "laptop", overrides: list[str] | tuple[str, ...] = ()) -> Profile:
    """Profile `name` with overrides applied and checked; its own name is then that of the folder of its results. Raises
    ConfigError on anything unknown or impossible."""
    data = overridden(raw_profile(name), overrides)
    if profile_path(name).resolve().parent != (home() / "params").resolve() and data["name"] in profiles():
        raise ConfigError(f"{name} has the name of a profile of params/, whose results it would replace; give it another")
    data["name"] = results_name(data["name"], overrides)
    source = f"profile {name!r}" + (f" with {list(overrides)}" if overrides else "")
    profile = validate(Profile, data, source)
    if profile.limit:
        profile = validate(Profile, limited(profile.model_dump(mode="json"), profile.limit, Profile), source)
    for arm in profile.usmle.arms:
        arm_config(profile, arm)  # an impossible arm should fail now, not an hour into the run
    for arm in profile.ultramedical.preference.arms if profile.ultramedical else ():
        preference_config(profile, arm)
    return profile


def changed(base: BaseModel, *changes: dict, where: str) -> Any:
    """`base` with the changes merged into it one after the other, checked as its own type."""
    data = base.model_dump(mode="json")
    for change in changes:
        data = merge(data, change, type(base))
    return validate(type(base), data, where)


def arm_config(profile: Profile, arm: str, **changes) -> TrainConfig:
    """The training configuration of one arm of notebook 11: `train`, the arm's changes, then `changes`."""
    where = f"profile {profile.name!r}, usmle.arms"
    known(arm, profile.usmle.arms, where)
    return changed(profile.train, profile.usmle.arms[arm], changes, where=f"{where}.{arm}")


def preference_config(profile: Profile, arm: str, **changes) -> PreferenceConfig:
    """One arm of `ultramedical.preference.arms`: `preference.train`, the arm's changes, then `changes`."""
    section, where = profile.ultramedical.preference, f"profile {profile.name!r}, ultramedical.preference.arms"
    known(arm, section.arms, where)
    return changed(section.train, section.arms[arm], changes, where=f"{where}.{arm}")


def validate(model: type[BaseModel], data: dict, source: str):
    """`model(**data)`, with pydantic's complaints turned into sentences that name the key and the nearest known one."""
    try:
        return model.model_validate(data)
    except ValidationError as err:
        lines = []
        for e in err.errors():
            path = ".".join(str(p) for p in e["loc"])
            if e["type"] == "extra_forbidden":
                prefix = e["loc"][:-1]
                fields = _fields_at(model, prefix)
                known = [".".join([*map(str, prefix), f]) for f in fields]
                lines.append(f"unknown key {path!r}{nearest(path, known)}")
            elif e["type"] == "missing":
                lines.append(f"{path!r} is missing")
            else:
                lines.append(f"{path or 'value'!s}: {e['msg']} (got {e['input']!r:.80})")
        raise ConfigError(f"{source}: " + "; ".join(lines)) from None


def _fields_at(kind: Any, loc) -> list[str]:
    """Field names of the (nested) model that an error location points into."""
    for part in loc:
        kind = typing.get_args(kind)[0] if isinstance(part, int) else types_at(kind, part)[0]
    return list(kind.model_fields)
