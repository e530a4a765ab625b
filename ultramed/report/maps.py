"""Topic map of instructions: a plane in which like texts lie together, with named clusters; as a figure and as a page."""

import html
import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from ultramed.core.store import write_text
from ultramed.report.scorecard import folder


def topics(frame: pd.DataFrame, clusters: int = 12, seed: int = 0) -> pd.DataFrame:
    """`frame` (columns text, source) with x, y, cluster and topic: word TF-IDF, 50 components, t-SNE, k-means.

    A cluster is named by the three terms that stand out most against all texts. Rows without a word that others have, too,
    are left out.
    """
    from sklearn.cluster import KMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.manifold import TSNE

    vectorizer = TfidfVectorizer(
        stop_words="english", min_df=min(3, len(frame) // 10 + 1), max_df=0.3, sublinear_tf=True, token_pattern=r"[^\W\d_]{4,}"
    )
    words = vectorizer.fit_transform(frame.text)
    known = words.getnnz(1) > 0  # sums have no words; without a place of their own they would gather in the middle
    frame, words = frame[known], words[known]
    parts = min(50, words.shape[1] - 1, len(frame) - 1)
    dense = TruncatedSVD(parts, random_state=seed).fit_transform(words)
    dense /= np.linalg.norm(dense, axis=1, keepdims=True).clip(1e-9)
    plane = TSNE(2, perplexity=min(30, (len(frame) - 1) / 3), init="random", random_state=seed).fit_transform(dense)
    label = KMeans(min(clusters, len(frame)), n_init=4, random_state=seed).fit_predict(dense)
    terms, overall = vectorizer.get_feature_names_out(), np.asarray(words.mean(0)).ravel()
    names = {}
    for k in np.unique(label):
        stands_out = np.asarray(words[label == k].mean(0)).ravel() - overall
        names[k] = ", ".join(terms[i] for i in stands_out.argsort()[::-1][:3])
    return frame.assign(x=plane[:, 0], y=plane[:, 1], cluster=label, topic=[names[k] for k in label])


def draw(points: pd.DataFrame):
    """The map, coloured by source, with the clusters' names where most of their points are."""
    fig, ax = plt.subplots(figsize=(9, 7))
    colours = sns.color_palette("tab10" if points.source.nunique() <= 10 else "tab20", points.source.nunique())
    sns.scatterplot(points, x="x", y="y", hue="source", palette=colours, s=9, linewidth=0, alpha=0.75, ax=ax)
    low_high = points.y.quantile([0.002, 0.998]).to_numpy()
    apart, last = 0.035 * (low_high[1] - low_high[0]), []
    for name, part in sorted(points.groupby("topic"), key=lambda item: item[1].y.median()):
        x, y = part.x.median(), part.y.median()
        while any(
            abs(x - a) < 0.3 * np.ptp(points.x) and abs(y - b) < apart for a, b in last
        ):  # names keep clear of each other
            y += apart / 4
        last.append((x, y))
        ax.text(x, y, name, ha="center", fontsize=8, bbox={"fc": "white", "alpha": 0.75, "lw": 0, "pad": 1.5})
    ax.set(xlim=points.x.quantile([0.002, 0.998]) * 1.08, ylim=low_high * 1.08)
    ax.set(xticks=[], yticks=[], xlabel="", ylabel="")
    ax.legend(title="source", loc="upper left", bbox_to_anchor=(1, 1), frameon=False, markerscale=2)
    sns.despine(fig, left=True, bottom=True)
    return fig


PAGE = """<!doctype html><meta charset="utf-8"><title>%s</title>
<style>body{font:14px sans-serif;margin:16px}#tip{position:fixed;background:#fff;border:1px solid #999;padding:6px;max-width:420px;
display:none;pointer-events:none}canvas{border:1px solid #ddd;max-width:100%%}label{margin-right:12px}</style>
<h1>%s</h1><p>Point at a dot to read it; tick sources on and off.</p><div id="keys"></div><canvas width="1100" height="760"></canvas>
<div id="tip"></div><script>
const rows=%s,c=document.querySelector("canvas"),g=c.getContext("2d"),tip=document.getElementById("tip"),keys=document.getElementById("keys");
const names=[...new Set(rows.map(r=>r.s))],hue=n=>`hsl(${360*names.indexOf(n)/names.length} 65%% 45%%)`,on=new Set(names);
const xs=rows.map(r=>r.x),ys=rows.map(r=>r.y),lo=[Math.min(...xs),Math.min(...ys)],hi=[Math.max(...xs),Math.max(...ys)];
const at=r=>[20+(r.x-lo[0])/(hi[0]-lo[0]||1)*1060,20+(r.y-lo[1])/(hi[1]-lo[1]||1)*720];
function draw(){g.clearRect(0,0,c.width,c.height);for(const r of rows)if(on.has(r.s)){const[x,y]=at(r);g.fillStyle=hue(r.s);g.beginPath();g.arc(x,y,3,0,7);g.fill()}}
for(const n of names){const l=document.createElement("label"),b=document.createElement("input");b.type="checkbox";b.checked=true;
b.onchange=()=>{b.checked?on.add(n):on.delete(n);draw()};l.append(b," "+n);l.style.color=hue(n);keys.append(l)}
c.onmousemove=e=>{const k=c.width/c.clientWidth,x=e.offsetX*k,y=e.offsetY*k;let best=null,d=100;for(const r of rows)if(on.has(r.s)){const[a,b]=at(r),q=(a-x)**2+(b-y)**2;if(q<d){d=q;best=r}}
tip.style.display=best?"block":"none";if(best){tip.textContent=`${best.s} · ${best.t}: ${best.w}`;tip.style.left=e.clientX+14+"px";tip.style.top=e.clientY+14+"px"}};
draw()</script>
"""


def page(points: pd.DataFrame, name: str, *, profile: str, title: str, shown: int = 220) -> str:
    """Write `figures/<profile>/<name>.html`, one file without anything to fetch; returns its name."""
    rows = [
        {"x": round(float(r.x), 2), "y": round(float(r.y), 2), "s": r.source, "t": r.topic, "w": r.text[:shown]}
        for r in points.itertuples()
    ]
    data = json.dumps(rows, ensure_ascii=False).replace("</", "<\\/")
    write_text(folder(profile) / f"{name}.html", PAGE % (html.escape(title), html.escape(title), data))
    return f"{name}.html"
