"""Figures as PNG and SVG with provenance; one look for all of them."""

import io
import re
import textwrap

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import Image

from ultramed.core.store import Artifact, write_json
from ultramed.evaluate.arms import label
from ultramed.papers.claims import claims as all_claims
from ultramed.report.scorecard import folder
from ultramed.report.tables import provenance

matplotlib.rcParams["svg.hashsalt"] = "ultramed"  # the same figure gives the same file
CHANCE = 0.25


def style() -> None:
    """Look of every figure; called by the notebooks' first cell."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind", rc={"figure.dpi": 110, "axes.titlesize": 11})


def save_figure(fig, name: str, *, profile: str, caption: str, artifacts: list[Artifact] = ()):
    """Write `figures/<profile>/<name>.{png,svg,json}` and return the picture, to be shown with its caption as alternative text.

    What is shown in the notebook has fewer dots, so that executed copies stay small.
    """
    base, name = folder(profile), re.sub(r"[^\w.-]+", "-", name)
    base.mkdir(parents=True, exist_ok=True)
    fig.savefig(base / f"{name}.png", dpi=160, bbox_inches="tight", metadata={"Software": None})
    fig.savefig(base / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
    write_json(base / f"{name}.json", provenance(profile, name, caption, list(artifacts), "figure"))
    width, shown = round(fig.get_size_inches()[0] * 96), io.BytesIO()
    fig.savefig(shown, dpi=100, bbox_inches="tight", metadata={"Software": None})
    plt.close(fig)  # the file is shown; without this Jupyter would show the figure, too
    return Image(data=shown.getvalue(), format="png", width=width, alt=caption)


def intervals(frame: pd.DataFrame, *, row: str, facet: str, hue: str | None = None, chance: float | None = CHANCE):
    """Dots with 95% intervals. frame: columns `row`, `facet`, `hue` (if any), accuracy, low, high (fractions)."""
    if hue is None:
        frame, hue = frame.assign(hue="accuracy"), "hue"
    frame = frame.assign(**{row: frame[row].map(label)})
    facets, rows, hues = (list(dict.fromkeys(frame[c])) for c in (facet, row, hue))
    size = (3.1 * len(facets) + 1.2, 0.42 * len(rows) * max(1, 0.6 * len(hues)) + 1.4)
    fig, axes = plt.subplots(1, len(facets), figsize=size, sharey=True, sharex=True, squeeze=False)
    colors = sns.color_palette("colorblind", len(hues))
    for ax, part in zip(axes[0], facets, strict=True):
        for h, (name, color) in enumerate(zip(hues, colors, strict=True)):
            sub = frame[(frame[facet] == part) & (frame[hue] == name)]
            y = [rows.index(r) + 0.22 * (h - (len(hues) - 1) / 2) for r in sub[row]]
            error = [(sub.accuracy - sub.low) * 100, (sub.high - sub.accuracy) * 100]
            ax.errorbar(sub.accuracy * 100, y, xerr=error, fmt="o", ms=5, capsize=2, lw=1.4, color=color, label=name)
        if chance is not None:
            ax.axvline(100 * chance, color="0.4", ls=":", lw=1.2, label="chance")
        ax.set_title(part)
        ax.set_xlabel("accuracy (%), 95% interval")
        ax.set_yticks(range(len(rows)), rows)
    axes[0][0].set_ylim(len(rows) - 0.5, -0.5)  # the first row on top, none on the frame
    handles, labels = axes[0][-1].get_legend_handles_labels()
    fig.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False, bbox_to_anchor=(0.5, -0.02))
    fig.tight_layout(rect=(0, 0.06, 1, 1))
    return fig


def tuning(frame: pd.DataFrame, *, best: dict[str, float], paper: float):
    """Accuracy on dev questions (95% intervals) against learning rate, a line an arm; the chosen rate is ringed, the paper's
    marked."""
    fig, ax = plt.subplots(figsize=(7.2, 3.6))
    for number, (arm, part) in enumerate(frame.groupby("arm", sort=False)):
        part = part.sort_values("learning_rate")
        place = part.learning_rate * 1.04**number  # intervals of arms with the same rates stand beside each other
        sides = 100 * np.stack([part.accuracy - part.low, part.high - part.accuracy])
        line = ax.errorbar(place, 100 * part.accuracy, sides, marker="o", capsize=3, label=label(arm)).lines[0]
        chosen = part.learning_rate == best[arm]
        ax.plot(place[chosen], 100 * part.accuracy[chosen], "o", ms=13, mfc="none", color=line.get_color())
    ax.axvline(paper, color="0.4", ls=":", lw=1.2)
    ax.text(paper, 0.97, " MedAlpaca's rate", transform=ax.get_xaxis_transform(), va="top", fontsize=9, color="0.3")
    ax.set_xscale("log")
    ax.set(xlabel="learning rate", ylabel="accuracy on dev questions (%)")
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    fig.tight_layout()
    return fig


def curves(parts: list[pd.DataFrame]):
    """Training loss by step. parts: arm, seed, step, loss; thin lines are seeds, thick ones their mean."""
    frame = pd.concat(parts)
    frame = frame.assign(arm=frame.arm.map(label))
    fig, ax = plt.subplots(figsize=(6.4, 3.6))
    for (arm, part), color in zip(frame.groupby("arm", sort=False), sns.color_palette("colorblind", 10), strict=False):
        for _, one in part.groupby("seed"):
            ax.plot(one.step, one.loss, color=color, lw=0.7, alpha=0.45)
        mean = part.groupby("step").loss.mean()
        ax.plot(mean.index, mean, color=color, lw=2, label=arm)
    ax.set(xlabel="optimiser step", ylabel="training loss (nats per answer token)")
    ax.legend(frameon=False)
    return fig


VERDICTS = {  # colour and shape, so that neither alone carries the meaning
    "reproduced": ("#1b7f4b", "o"),
    "contradicted": ("#b8321f", "X"),
    "inconclusive": ("#8a6d1a", "s"),
}


def forest(claims: pd.DataFrame):
    """Difference A - B of every tested claim with its 95% interval, the published difference, the margin, and the verdict.

    claims: columns id, statement, difference, interval, published_difference, verdict (points). One column of text above each
    interval, so that it can be read on a phone.
    """
    claims, written = claims.reset_index(drop=True), {claim.id: claim for claim in all_claims()}
    fig, ax = plt.subplots(figsize=(5.4, 0.62 * len(claims) + 1.4))
    ax.axvline(0, color="0.35", lw=1)
    for y, row in claims.iterrows():
        color, marker = VERDICTS[row.verdict]
        low, high = row.interval
        ax.plot([low, high], [y, y], color=color, lw=2.2, solid_capstyle="butt")
        ax.plot(row.difference, y, marker, color=color, ms=8, mec="white", mew=0.8)
        if pd.notna(row.published_difference):
            ax.plot(row.published_difference, y, "D", color="0.15", ms=6, mfc="none", mew=1.4)
        claim = written[row.id]
        for bound in {"beats": [], "level": [-claim.margin, claim.margin], "not_worse": [-claim.margin]}[claim.kind]:
            ax.plot(bound, y, "|", color="0.15", ms=13, mew=1.4)
        over = {"facecolor": ax.get_facecolor(), "edgecolor": "none", "pad": 1}  # so that no line runs through the words
        text = textwrap.fill(f"{row.statement}", 64)
        where = {"transform": ax.get_yaxis_transform(), "va": "bottom"}
        ax.text(0, y - 0.28, text, fontsize=8.5, linespacing=1.05, bbox=over, **where)
    ax.set(ylim=(len(claims) - 0.4, -0.95), yticks=[], xlabel="difference A - B, points, 95% interval")
    handles = [plt.Line2D([], [], color=c, marker=m, lw=2.2, ms=8, label=name) for name, (c, m) in VERDICTS.items()]
    handles.append(plt.Line2D([], [], color="0.15", marker="D", mfc="none", lw=0, label="published difference"))
    handles.append(plt.Line2D([], [], color="0.15", marker="|", lw=0, ms=11, mew=1.4, label="margin, else 0"))
    fig.legend(handles=handles, loc="lower center", ncols=3, frameon=False, fontsize=9, bbox_to_anchor=(0.5, 0.0))
    ax.grid(axis="y", visible=False)
    sns.despine(fig, left=True)
    fig.tight_layout(rect=(0, 0.6 / (0.62 * len(claims) + 1.4), 1, 1))
    return fig


def lines(frame: pd.DataFrame, *, x: str, hue: str, xlabel: str, levels: dict[str, float] | None = None):
    """Accuracy against `x` with its 95% interval, a line a `hue`, side by side so that intervals can be told apart. `levels`:
    name -> accuracy, drawn dotted in grey."""
    fig, ax = plt.subplots(figsize=(6.6, 4.4))
    groups, step = list(frame.groupby(hue, sort=False)), 0.012 * np.ptp(frame[x])
    for number, ((name, part), color) in enumerate(zip(groups, sns.color_palette("colorblind", 10), strict=False)):
        part, shift = part.sort_values(x), (number - (len(groups) - 1) / 2) * step
        ax.plot(part[x] + shift, 100 * part.accuracy, marker="o", ms=4, color=color, label=label(name))
        ax.vlines(part[x] + shift, 100 * part.low, 100 * part.high, color=color, lw=1.2, alpha=0.7)
    for name, accuracy in (levels or {}).items():
        ax.axhline(100 * accuracy, color="0.45", ls=":", lw=1.4, label=name)
    ax.set(xlabel=xlabel, ylabel="accuracy (%), 95% interval", xticks=sorted(frame[x].unique()))
    fig.legend(loc="lower center", ncols=3, frameon=False, fontsize=9)
    fig.tight_layout(rect=(0, 0.12, 1, 1))
    return fig


def diagnostics(log: pd.DataFrame):
    """Preference training by step, a line an arm: log-probabilities, margin, accuracy and the policy's distance.

    log: arm, step, logps/chosen, logps/rejected, rewards/margins, rewards/accuracies, rewards/chosen (beta times the
    log-ratio: its mean is a one-sample estimate of how far the policy has moved from the reference).
    """
    panels = {
        "log-probability of the reply (nats)": [("logps/chosen", "-"), ("logps/rejected", "--")],
        "margin of implicit rewards": [("rewards/margins", "-")],
        "pairs ranked right (share)": [("rewards/accuracies", "-")],
        "implicit reward (beta x log-ratio)": [("rewards/chosen", "-"), ("rewards/rejected", "--")],
    }
    fig, axes = plt.subplots(2, 2, figsize=(9.4, 6.0), sharex=True)
    colors = dict(zip(dict.fromkeys(log.arm), sns.color_palette("colorblind", 10), strict=False))
    for ax, (title, columns) in zip(axes.flat, panels.items(), strict=True):
        for arm, part in log.groupby("arm", sort=False):
            for column, style_ in columns:
                ax.plot(part.step, part[column], style_, color=colors[arm], lw=1.5, label=arm if style_ == "-" else None)
        ax.set_title(title)
    for ax in axes[1]:
        ax.set_xlabel("optimiser step")
    axes[0][0].legend(frameon=False, fontsize=9)
    fig.text(0.5, -0.01, "solid: chosen, dashed: rejected", ha="center", fontsize=9, color="0.35")
    fig.tight_layout()
    return fig


def rounds(frame: pd.DataFrame):
    """Test accuracy (95% interval) and mean reward by round, a colour an arm. frame: arm, round, accuracy, low, high,
    reward."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(9.0, 3.6))
    for (arm, part), color in zip(frame.groupby("arm", sort=False), sns.color_palette("colorblind", 10), strict=False):
        error = [100 * (part.accuracy - part.low), 100 * (part.high - part.accuracy)]
        left.errorbar(part["round"], 100 * part.accuracy, yerr=error, marker="o", capsize=3, color=color, label=arm)
        right.plot(part["round"], part.reward, marker="o", color=color, label=arm)
    left.set(xlabel="round (0: before)", ylabel="accuracy (%), 95% interval")
    right.set(xlabel="round (0: before)", ylabel="mean reward of samples")
    for ax in (left, right):
        ax.set_xticks(sorted(frame["round"].unique()))
    left.legend(frameon=False)
    fig.tight_layout()
    return fig


def timeline(frame: pd.DataFrame):
    """MedQA accuracy by month of release (UltraMedical, Figure 1). frame: model, released ('2024-04'), access, medqa_usmle.

    Models measured here ('here') are drawn large; no accuracy is joined to another by a line, since protocols differ.
    """
    dates = pd.to_datetime(frame.released)
    fig, ax = plt.subplots(figsize=(8.4, 4.6))
    styles = {"closed": ("o", "0.45", 40), "open": ("s", "C0", 40), "here": ("*", "C3", 190)}
    texts = []
    for access, part in frame.groupby("access", sort=False):
        marker, color, size = styles.get(access, ("D", "C2", 40))
        name = "measured here" if access == "here" else access
        ax.scatter(dates[part.index], part.medqa_usmle, marker=marker, c=color, s=size, label=name, zorder=3)
        texts += [(dates[i], part.medqa_usmle[i], part.model[i], access == "here") for i in part.index]
    taken: list[tuple[float, float, float]] = []  # first and last day of a name, and its height
    for when, value, name, ours in sorted(texts, key=lambda t: t[1]):
        day, width = (when - dates.min()).days, 17 * len(str(name)) + 30
        span, height = (day - width, day) if ours else (day, day + width), value
        while any(first < span[1] and span[0] < last and abs(y - height) < 3 for first, last, y in taken):
            height += 1  # names must not lie on one another
        taken.append((*span, height))
        away, side = ((-9 if ours else 6), 3.1 * (height - value)), "right" if ours else "left"
        look = {"textcoords": "offset points", "fontsize": 7.5, "va": "center", "ha": side}
        ax.annotate(str(name), (when, value), away, **look, fontweight="bold" if ours else "normal")
    ax.axhline(25, color="0.4", ls=":", lw=1.2)
    ax.text(dates.min(), 25.6, "chance", fontsize=8, color="0.3")
    ax.set(ylabel="MedQA accuracy (%)", xlabel="released (published) or measured (here)", ylim=(0, 100))
    ax.legend(frameon=False, loc="upper right")
    fig.tight_layout()
    return fig
