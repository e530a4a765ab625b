"""OpenVINO GenAI as an engine for CPUs: other kernels for the same weights, to check ours by (docs/PERFORMANCE.md; an extra
package). At these sizes it is no faster than our batching (tests/benchmarks/engines.py).

The weights, adapter merged, go through a GGUF file; prompts go in as the token ids that every other engine gets.
"""

import random
import re
import sys
from pathlib import Path

import numpy as np
import torch

from ultramed.core.errors import ConfigError
from ultramed.core.store import Artifact
from ultramed.evaluate.engine import fitting
from ultramed.evaluate.generate import Sampling, cut, ends
from ultramed.lm import models
from ultramed.lm.architecture import context_length
from ultramed.lm.device import free_memory
from ultramed.lm.gguf import write_gguf
from ultramed.lm.templates import Template

CACHE_GB = 2  # of keys and values; requests beyond it wait
PART = 512  # conversations handed over at once: an interrupted run keeps what came before


class OpenVino:
    """Weights in memory of OpenVINO's continuous batching. `precision`: 'f32', or 'bf16' where the CPU multiplies that."""

    def __init__(self, model: Artifact, template: Template, out: Path, precision: str):
        sys.modules.setdefault("openvino_telemetry", None)  # OpenVINO then takes its stub, which tells nobody anything
        try:
            import openvino_genai
        except ImportError:
            raise ConfigError("engine openvino: pip install 'ultramed[openvino]' first (openvino-genai)") from None
        self._genai, self.tokenizer, self.template = openvino_genai, models.load_tokenizer(model), template
        file = out / "model.gguf"
        net = models.load(model, dtype=torch.float32, device="cpu")
        write_gguf(net, self.tokenizer, file)
        self.ends, self.context = ends(net, self.tokenizer), context_length(net)
        del net
        free_memory()
        plan = openvino_genai.SchedulerConfig()
        plan.cache_size, plan.max_num_seqs, plan.enable_prefix_caching = CACHE_GB, 256, True
        self.pipe = openvino_genai.ContinuousBatchingPipeline(str(file), plan, "CPU", {"INFERENCE_PRECISION_HINT": precision})
        file.unlink()

    def shown(self, messages: list[dict]) -> str:
        return self.template.render(messages, self.tokenizer)

    def close(self) -> None:
        del self.pipe

    def _settings(self, sampling: Sampling, seed: int):
        made = self._genai.GenerationConfig()
        made.max_new_tokens, made.apply_chat_template, made.stop_token_ids = sampling.max_new_tokens, False, self.ends
        made.repetition_penalty = sampling.repetition_penalty
        if sampling.temperature:
            made.do_sample, made.temperature, made.top_p, made.rng_seed = True, sampling.temperature, sampling.top_p, seed
            if sampling.top_k:
                made.top_k = sampling.top_k
        return made

    def replies(self, conversations, sampling, done, rngs: list[random.Random] | None = None, unfit=None) -> None:
        import openvino

        stop = re.compile(sampling.stop) if sampling.stop else None
        ids = [self.tokenizer(self.shown(m), add_special_tokens=False)["input_ids"] for m in conversations]
        fits = [len(tokens) + sampling.max_new_tokens <= self.context for tokens in ids]
        fit = fitting(fits, f"{self.context} positions", unfit)
        for start in range(0, len(fit), PART):
            batch = fit[start : start + PART]
            given = [openvino.Tensor(np.array([ids[i]], dtype=np.int64)) for i in batch]
            settings = [self._settings(sampling, rngs[i].getrandbits(31) if rngs else 0) for i in batch]
            made = []
            for result in self.pipe.generate(given, settings):
                tokens = result.m_generation_ids[0]
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                made.append(cut(text, len(tokens), tokens[-1] in self.ends, stop))
            done(batch, made)
