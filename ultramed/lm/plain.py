"""A model as a plain Hugging Face folder, for servers that know nothing of this package."""

from pathlib import Path

import torch

from ultramed.core.store import Artifact, stage
from ultramed.lm import models
from ultramed.lm.device import quietly
from ultramed.lm.templates import TEMPLATES

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json")


@stage(version=1)
def plain_model(out: Path, config: None = None, *, model: Artifact, template: str, dtype: str) -> dict:
    """Weights, tokenizer with `template` as its chat template, and generation config with every token at which a reply ends.

    An adapter is merged into its base, in `dtype`; whole models are not copied but linked to.
    """
    adapter = models.card(model)["kind"] == "adapter"
    if adapter:
        with quietly():
            models.load(model, dtype=getattr(torch, dtype), device="cpu").save_pretrained(out)
    else:
        for path in (p for pattern in WEIGHTS for p in sorted(models.folder(model).glob(pattern))):
            (out / path.name).unlink(missing_ok=True)  # of an attempt that was interrupted
            (out / path.name).symlink_to(path.resolve())
    tokenizer = models.load_tokenizer(model)
    models.save_tokenizer(tokenizer, TEMPLATES[template], out)
    made = models.generation(model, tokenizer)
    made.save_pretrained(out)
    return {"merged": adapter, "ends": made.eos_token_id}
