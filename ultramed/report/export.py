"""A model that leaves the house: safetensors, tokenizer, chat template, generation config, card, results and lineage.

What comes out loads with transformers (or, an unmerged adapter, with PEFT) and nothing of this package.
"""

import shutil
from importlib.metadata import version
from pathlib import Path

import jinja2
import torch

from ultramed.core import store
from ultramed.core.errors import ConfigError
from ultramed.core.store import Artifact, write_json, write_text
from ultramed.data.catalog import SOURCES
from ultramed.evaluate.accuracy import read_answers
from ultramed.evaluate.stats import wilson
from ultramed.lm import models
from ultramed.lm.device import quietly
from ultramed.lm.gguf import write_gguf
from ultramed.lm.templates import turn_end

TRAINED = ("sft", "preference", "reward")  # stages whose artifacts can be exported


def export(model: Artifact, out: Path, *, merge: bool = False, gguf: bool = False) -> dict:
    """Write `model` into the new folder `out` and return what was written.

    merge: put an adapter into its base (checked: the logits stay). gguf: add model.gguf, for llama.cpp and its kin. Raises
    ConfigError for what was not trained here, for a folder that exists, for `merge` of a whole model, and for `gguf` of what
    is none.
    """
    metadata = models.card(model)
    if model.stage not in TRAINED:
        raise ConfigError(f"{model.stage}/{model.key} was not trained here: take {metadata['name']} from where it came from")
    if gguf and not (metadata["kind"] == "weights" or merge):
        raise ConfigError("GGUF holds a whole language model: merge the adapter, and a reward model stays as it is")
    if merge and metadata["kind"] != "adapter":
        raise ConfigError(f"{model.stage}/{model.key} is a whole model: export it without --merge")
    if out.exists():
        raise ConfigError(f"{out} exists; give a new folder")
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    tokenizer = models.load_tokenizer(model)
    if merge:
        with quietly():
            models.load(model, device="cpu").save_pretrained(part)
    else:
        for pattern in ("*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json"):
            for path in model.path.glob(pattern):
                shutil.copyfile(path, part / path.name)
    models.give_template(tokenizer, models.template_of(model))
    if metadata["kind"] == "reward":
        _end_as_trained(tokenizer)
    tokenizer.save_pretrained(part)
    if gguf:
        with quietly():
            write_gguf(models.load(model, dtype=torch.float32, device="cpu"), tokenizer, part / "model.gguf")
    if metadata["kind"] != "reward":
        how = models.generation(model, tokenizer)
        how.max_new_tokens = 256
        how.save_pretrained(part)
    results = results_of(model)
    write_json(part / "results.json", lm_eval_shape(model, results))
    write_json(part / "lineage.json", [{k: v for k, v in m.items() if k != "files"} for m in model.lineage()])
    kind = "adapter" if metadata["kind"] == "adapter" and not merge else metadata["kind"]
    write_text(part / "README.md", card(model, kind, merge, results))
    _without_paths(part, model)
    part.rename(out)
    return {"files": sorted(p.name for p in out.iterdir()), "results": len(results), "bytes": store.size(out)}


def _end_as_trained(tokenizer) -> None:
    """Let the chat template end a conversation with the end token, at which the reward model was trained to be read, where it
    puts something else there: others render the whole conversation by it."""
    if (end := turn_end(tokenizer)) != tokenizer.eos_token:
        keep = f"[:-{len(end)}]" if end else ""
        shown = f"text if add_generation_prompt else text{keep} + eos_token"
        tokenizer.chat_template = f"{{% set text %}}{tokenizer.chat_template}{{% endset %}}{{{{ {shown} }}}}"


def _without_paths(folder: Path, model: Artifact) -> None:
    """Name local folders that were bases by their last part: what leaves the house says nothing of where it stood."""
    used = {m["config"][key] for m in model.lineage() if m["stage"] == "base_model" for key in ("name", "tokenizer")}
    local = [Path(name).expanduser() for name in used if name and Path(name).expanduser().is_dir()]
    for file in [*folder.glob("*.json"), *folder.glob("*.md")] if local else ():
        text = file.read_text()
        for path in local:
            for whole in {str(path.resolve()), str(path.absolute())}:
                text = text.replace(whole, path.resolve().name)
        file.write_text(text)


def results_of(model: Artifact) -> list[dict]:
    """A row for each set of questions and protocol that the model has answered in this store."""
    out = []
    for art in store.artifacts():
        given = art.manifest["inputs"].get("model", {})
        if art.stage != "answers" or given.get("key") != model.key:
            continue
        m, config = art.metrics, art.manifest["config"]
        data = store.find(art.manifest["inputs"]["questions"]["key"])
        name = data.manifest["config"].get("name", data.stage) if isinstance(data.manifest["config"], dict) else data.stage
        for subset, part in read_answers(art).groupby("subset"):
            e = wilson(part.correct)
            out.append(
                {
                    "task": f"{name}:{subset}",
                    **e.row(),
                    "unparsed": int(part.letter.isna().sum()),
                    "protocol": m["protocol"],
                    "dtype": m["dtype"],
                    "answer_form": config["answer_form"],
                    "max_new_tokens": config["max_new_tokens"],
                    "artifact": art.key,
                }
            )
    return sorted(out, key=lambda r: (r["task"], r["protocol"], r["artifact"]))


def lm_eval_shape(model: Artifact, results: list[dict]) -> dict:
    """Results in the shape of lm-evaluation-harness' result files; a task is named once for each protocol and run."""
    tasks = {f"{r['task']}/{r['protocol']}/{r['artifact'][:6]}": r for r in results}
    return {
        "results": {
            name: {
                "alias": r["task"],
                "acc,none": r["accuracy"],
                "acc_stderr,none": (r["accuracy"] * (1 - r["accuracy"]) / max(1, r["n"] - 1)) ** 0.5,
            }
            for name, r in tasks.items()
        },
        "n-samples": {name: {"original": r["n"], "effective": r["n"]} for name, r in tasks.items()},
        "configs": {name: {"task": name, "metadata": r} for name, r in tasks.items()},
        "config": {"model": f"{model.stage}/{model.key}", "model_dtype": results[0]["dtype"] if results else None},
        "higher_is_better": {name: {"acc": True} for name in tasks},
    }


def data_sets(model: Artifact) -> list[dict]:
    """Data sets in the model's lineage with licence and citation."""
    names = {
        m["config"]["name"] if m["stage"] == "source" else m["stage"]
        for m in model.lineage()
        if m["stage"] in ("source", "exam")
    }
    exam = {
        "name": "bundled exam",
        "licence": "HPO's and ICD-10-CM's own, see docs/DATA_LICENSES.md of ultramed",
        "cite": "Gargano et al. 2024; CDC/NCHS",
    }
    return [
        exam if name == "exam" else {"name": name, "licence": SOURCES[name].licence, "cite": SOURCES[name].cite}
        for name in sorted(names)
    ]


def card(model: Artifact, kind: str, merged: bool, results: list[dict]) -> str:
    """The model card, Markdown with the hub's front matter."""
    metadata, manifest = models.card(model), model.manifest
    settings = {k: v for k, v in manifest["config"].items() if v not in (None, {}, []) and not isinstance(v, dict)}
    return _CARD.render(
        name=f"{metadata['name'].split(':')[-1].split('/')[-1]}-{model.stage}-{model.key[:8]}",
        base=metadata["name"],
        kind=kind,
        merged=merged,
        stage=model.stage,
        key=model.key,
        method=metadata.get("method"),
        template=metadata.get("template", "chat"),
        data=data_sets(model),
        settings=settings,
        trained=manifest["metrics"],
        results=results,
        version=version("ultramed"),
        reward=metadata["kind"] == "reward",
    )


_CARD = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True).from_string("""\
---
{% if ":" not in base %}
base_model: {{ base }}
{% endif %}
library_name: {{ "peft" if kind == "adapter" else "transformers" }}
pipeline_tag: {{ "text-classification" if reward else "text-generation" }}
license: other
license_name: see-licences-below
tags: [medical, research, ultramed]
---
# {{ name }}

{{ "A reward model" if reward else "A language model" }} for research on biomedical question answering, {{ stage }} with \
method `{{ method }}` out of `{{ base }}`{{ ", adapter merged into its base" if merged else "" }}. \
**Not for clinical use**: not for diagnosis, treatment or advice to patients, and not a medical device.

Made by ultramed {{ version }}, artifact `{{ stage }}/{{ key }}`; `lineage.json` holds every configuration that led to it.

## Use

```python
{% if reward %}
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForSequenceClassification.from_pretrained(FOLDER)
text = tokenizer.apply_chat_template(messages, tokenize=False)  # user and assistant turns
reward = model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits[0, 0]
{% else %}
{% if kind == "adapter" %}
from peft import AutoPeftModelForCausalLM
{% else %}
from transformers import AutoModelForCausalLM
{% endif %}
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = {{ "AutoPeftModelForCausalLM" if kind == "adapter" else "AutoModelForCausalLM" }}.from_pretrained(FOLDER)
messages = [{"role": "user", "content": "Which vitamin prevents scurvy?"}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
print(tokenizer.decode(model.generate(**ids)[0, ids["input_ids"].shape[1]:], skip_special_tokens=True))
{% endif %}
```

The chat template is the one that it was trained with (`{{ template }}`).{% if kind == "adapter" %} The adapter needs its \
base, `{{ base }}`.{% endif %}


## Training

| setting | value |
| --- | --- |
{% for k, v in settings.items() %}
| {{ k }} | {{ v }} |
{% endfor %}
{% for k in ("steps", "rows", "pairs", "tokens", "train_loss", "dtype", "device") if k in trained %}
| {{ k }} | {{ trained[k] }} |
{% endfor %}

| data | licence | cite |
| --- | --- | --- |
{% for d in data %}
| {{ d.name }} | {{ d.licence }} | {{ d.cite }} |
{% endfor %}

## Results

{% if results %}
Accuracy with 95% Wilson intervals; what could not be parsed counts as wrong.

| questions | protocol | n | accuracy, % | unparsed |
| --- | --- | ---: | ---: | ---: |
{% for r in results %}
| {{ r.task }} | {{ r.protocol }}, {{ r.answer_form }} | {{ r.n }} | {{ "%.1f [%.1f, %.1f]" | format(100 * r.accuracy, 100 * r.low, 100 * r.high) }} | {{ r.unparsed }} |
{% endfor %}
{% else %}
None yet: this model has not been examined in the store that it was exported from.
{% endif %}

## Limitations

Multiple-choice accuracy says little about advice to people. The model repeats errors and biases of its base and its data, \
makes up facts, and does not know when it is wrong. It was not examined for safety, fairness, or other languages unless a \
table above says so.

## Licences and citation

The base model and every data set keep their own licences, which may forbid commercial use. Please cite ultramed, \
MedAlpaca (arXiv 2304.08247), UltraMedical (arXiv 2406.03949), and the data above.
""")


def push(folder: Path, repo: str) -> str:
    """Upload an exported folder to the hub as a private repository. Only ever called on request."""
    from huggingface_hub import HfApi

    HfApi().create_repo(repo, private=True, exist_ok=True)
    return str(HfApi().upload_folder(repo_id=repo, folder_path=folder))
