"""Models made ready for training: all weights in fp32, or an adapter on a base in 16, 8 or 4 bits."""

import torch

from ultramed.core.errors import ConfigError
from ultramed.core.schema import OptimConfig
from ultramed.core.store import Artifact
from ultramed.lm.architecture import probe
from ultramed.lm.attention import use_cpu_attention
from ultramed.lm.device import placement, quietly
from ultramed.lm.models import card, in_bits, location, straight_to_gpu, weights_of
from ultramed.train import launch


def trainable(kind: type, model: Artifact, *, empty: bool = False, **options):
    """Weights in fp32, to be trained in full. kind: a class of transformers' AutoModels. empty: see `blank`."""
    if empty:
        return blank(kind, model, torch.float32, **options)
    net = kind.from_pretrained(**weights_of(model), dtype=torch.float32, **_place(), **options)
    return _with_attention(net)


def _place() -> dict:
    """Where weights are read to: straight to the GPU by a process that trains alone; workers' are placed, or sharded, by
    accelerate."""
    return {} if launch.worker() else straight_to_gpu()


def blank(kind: type, model: Artifact, dtype: torch.dtype, **options):
    """The model in memory that nothing has touched, for a process that gets its part of the weights from another one, so
    that a node need not hold one copy a GPU. (Not on the meta device: an optimiser would not find its parameters again.)
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(**location(model), **options)
    with init_empty_weights(include_buffers=False):
        net = kind.from_config(config, dtype=dtype)
    net._apply(lambda t: torch.empty_like(t, device="cpu") if t.is_meta else t)
    net.tie_weights()
    return _with_attention(net)


def _with_attention(net):
    """Our attention where training runs on CPUs (weights are often made on one: their place tells nothing)."""
    return use_cpu_attention(net) if placement().device == "cpu" else net


def load_for_training(model: Artifact, config: OptimConfig, *, empty: bool = False):
    """The model with what shall be trained marked so: all of it (fp32 master weights) or a LoRA adapter.

    config.method: 'full', 'lora' (base in the dtype of the run), 'lora_8bit' (LLM.int8), 'lora_4bit' (NF4). empty: see
    `blank`; an adapter's base is always loaded.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    if card(model)["kind"] == "adapter":
        raise ConfigError("train on a whole model; merge the adapter first (`ultramed export KEY OUT --merge`)")
    place, method, lora = placement(config.dtype), config.method, config.lora
    if method == "lora_4bit" and place.device == "cpu":
        raise ConfigError(
            "NF4 training does nothing on a CPU: bitsandbytes passes no gradient to the adapters there (measured: 0 of "
            "60 lora_B tensors) and only warns. Use method lora or lora_8bit, or a GPU."
        )
    bits = {"lora_8bit": "8bit", "lora_4bit": "4bit"}.get(method)
    extra = {"quantization_config": in_bits(bits, place.dtype)} if bits else {}
    with quietly():
        if method == "full":
            net = trainable(AutoModelForCausalLM, model, empty=empty)
        else:
            net = AutoModelForCausalLM.from_pretrained(**weights_of(model), dtype=place.dtype, **(extra or _place()))
            net = _with_attention(net)
        net.config.use_cache = False
        if not launch.sharded():
            probe(net)
        if method == "full":
            return net
        settings = LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            task_type="CAUSAL_LM",
        )
        net = get_peft_model(net, settings)
    return net
