"""Figures as PNG and SVG with provenance; one look for all of them."""

import re

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from IPython.display import Image

from ultramed.report.scorecard import folder
from ultramed.report.tables import provenance
from ultramed.store import Artifact, canonical, write_json

matplotlib.rcParams["svg.hashsalt"] = "ultramed"  # the same figure gives the same file
CHANCE = 0.25


def style() -> None:
    """Look of every figure; called by the notebooks' first cell."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind", rc={"figure.dpi": 110, "axes.titlesize": 11})


def save_figure(fig, name: str, *, profile: str, caption: str, artifacts: list[Artifact] = ()):
    """Write `figures/<profile>/<name>.{png,svg,json}` and return the picture, to be shown with its caption as alternative text."""
    base, name = folder(profile), re.sub(r"[^\w.-]+", "-", name)
    base.mkdir(parents=True, exist_ok=True)
    fig.savefig(base / f"{name}.png", dpi=160, bbox_inches="tight", metadata={"Software": None})
    fig.savefig(base / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
    write_json(base / f"{name}.json", canonical(provenance(profile, name, caption, list(artifacts), "figure")))
    width = round(fig.get_size_inches()[0] * 96)
    plt.close(fig)  # the file is shown; without this Jupyter would show the figure, too
    return Image(filename=str(base / f"{name}.png"), width=width, alt=caption)


def intervals(frame: pd.DataFrame, *, row: str, facet: str, hue: str, chance: float | None = CHANCE, xlabel: str = "accuracy"):
    """Dots with 95% intervals. frame: columns `row`, `facet`, `hue`, accuracy, low, high (fractions)."""
    facets, rows, hues = (list(dict.fromkeys(frame[c])) for c in (facet, row, hue))
    size = (3.1 * len(facets) + 1.2, 0.42 * len(rows) * max(1, 0.6 * len(hues)) + 1.4)
    fig, axes = plt.subplots(1, len(facets), figsize=size, sharey=True, sharex=True, squeeze=False)
    colors = sns.color_palette("colorblind", len(hues))
    for ax, part in zip(axes[0], facets, strict=True):
        for h, (label, color) in enumerate(zip(hues, colors, strict=True)):
            sub = frame[(frame[facet] == part) & (frame[hue] == label)]
            y = [rows.index(r) + 0.22 * (h - (len(hues) - 1) / 2) for r in sub[row]]
            error = [(sub.accuracy - sub.low) * 100, (sub.high - sub.accuracy) * 100]
            ax.errorbar(sub.accuracy * 100, y, xerr=error, fmt="o", ms=5, capsize=2, lw=1.4, color=color, label=label)
        if chance is not None:
            ax.axvline(100 * chance, color="0.4", ls=":", lw=1.2, label="chance")
        ax.set_title(part)
        ax.set_xlabel(f"{xlabel} (%), 95% interval")
        ax.set_yticks(range(len(rows)), rows)
    axes[0][0].invert_yaxis()
    handles, labels = axes[0][-1].get_legend_handles_labels()
    fig.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False, bbox_to_anchor=(0.5, -0.02))
    fig.tight_layout(rect=(0, 0.06, 1, 1))
    return fig


def tuning(frame: pd.DataFrame, *, best: dict[str, float], paper: float):
    """Dev loss against learning rate, a line an arm; the chosen rate is ringed, the paper's marked."""
    fig, ax = plt.subplots(figsize=(6.4, 3.6))
    for arm, part in frame.groupby("arm", sort=False):
        part = part.sort_values("learning_rate")
        (line,) = ax.plot(part.learning_rate, part.dev_loss, marker="o", label=arm)
        chosen = part[part.learning_rate == best[arm]]
        ax.plot(chosen.learning_rate, chosen.dev_loss, "o", ms=13, mfc="none", color=line.get_color())
    ax.axvline(paper, color="0.4", ls=":", lw=1.2)
    ax.text(paper, 0.97, " MedAlpaca's rate", transform=ax.get_xaxis_transform(), va="top", fontsize=9, color="0.3")
    ax.set_xscale("log")
    ax.set(xlabel="learning rate", ylabel="loss on dev answers (nats per token)")
    ax.legend(frameon=False)
    return fig


def curves(frame: pd.DataFrame):
    """Training loss by step. frame: arm, seed, step, loss; thin lines are seeds, thick ones their mean."""
    fig, ax = plt.subplots(figsize=(6.4, 3.6))
    for (arm, part), color in zip(frame.groupby("arm", sort=False), sns.color_palette("colorblind", 10), strict=False):
        for _, one in part.groupby("seed"):
            ax.plot(one.step, one.loss, color=color, lw=0.7, alpha=0.45)
        mean = part.groupby("step").loss.mean()
        ax.plot(mean.index, mean, color=color, lw=2, label=arm)
    ax.set(xlabel="optimiser step", ylabel="training loss (nats per answer token)")
    ax.legend(frameon=False)
    return fig


def verdicts(counts: pd.DataFrame):
    """Stacked bars of verdict counts. counts: a row a table, a column a verdict."""
    order = [v for v in ("reproduced", "differs in scale", "not reproduced", "not run") if v in counts]
    colors = {"reproduced": "#2a9d5c", "differs in scale": "#d6a12b", "not reproduced": "#c8553d", "not run": "#c9ced6"}
    fig, ax = plt.subplots(figsize=(7, 0.36 * len(counts) + 1.2))
    counts[order].iloc[::-1].plot.barh(stacked=True, ax=ax, color=[colors[v] for v in order], width=0.75)
    ax.set(xlabel="published cells", ylabel="")
    ax.legend(frameon=False, loc="lower right")
    return fig
