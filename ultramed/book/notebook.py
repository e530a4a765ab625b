"""What every notebook's first cell calls: resolve the parameters, refuse unknown ones, say what will run where."""

import ast

import pandas as pd

from ultramed.core import config
from ultramed.core.errors import ConfigError
from ultramed.core.log import quiet_libraries
from ultramed.core.schema import Profile
from ultramed.lm.device import placement
from ultramed.report import figures

PARAMETERS = {"profile", "overrides"}


def start(profile: str, overrides: list[str] = (), **own) -> Profile:
    """The resolved profile. `own`: the notebook's own parameters, by name, so that they are known, too.

    papermill only warns about a parameter that no notebook reads; here that is an error. A parameter written with
    double underscores is an override: `-p train__epochs 2` is `train.epochs=2`.
    """
    quiet_libraries()
    extra = []
    for name, value in injected().items():
        if "__" in name:
            extra.append(f"{name.replace('__', '.')}={_yaml(value)}")
        elif name not in PARAMETERS | set(own):
            known = sorted(PARAMETERS | set(own))
            raise ConfigError(f"unknown notebook parameter {name!r}{config.nearest(name, known)}")
    resolved = config.load_profile(profile, [*overrides, *extra])
    figures.style()
    pd.set_option("display.max_colwidth", 120, "display.precision", 3, "display.max_rows", 80)
    print(f"profile  {resolved.name}: {resolved.description}")
    print(f"models   {', '.join(m.label for m in resolved.models)}")
    print(f"runs on  {placement()}")
    if overrides or extra:
        print(f"changed  {', '.join([*overrides, *extra])}")
    return resolved


def _yaml(value) -> str:
    import yaml

    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def injected() -> dict:
    """Names and values of papermill's injected cell, if this kernel was started by papermill."""
    try:
        from IPython import get_ipython

        history = get_ipython().user_ns["In"]
    except (ImportError, AttributeError, KeyError):
        return {}
    values = {}
    for cell in history:
        if cell.startswith("# Parameters\n"):
            for node in ast.parse(cell).body:
                if isinstance(node, ast.Assign):
                    values[node.targets[0].id] = ast.literal_eval(node.value)
    return values


def percent(frame: pd.DataFrame, value: str = "accuracy") -> pd.Series:
    """'48.7 [45.4, 51.9]' of the columns value, low, high."""
    return pd.Series(
        [
            f"{100 * v:.1f} [{100 * lo:.1f}, {100 * hi:.1f}]"
            for v, lo, hi in zip(frame[value], frame.low, frame.high, strict=True)
        ],
        index=frame.index,
    )
