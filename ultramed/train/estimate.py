"""Memory and time of a training run before it starts, out of the model's shape.

Weights, gradients and optimiser states are counted; activations are taken from a run of one and of two layers on tensors
without data (PyTorch's fake tensors), which record what the backward pass keeps. Notebook 12 and
`tests/benchmarks/cost.py` show the error against measured runs: on a CPU full fine-tuning comes out 2 to 20% low, adapters
40% and more, because what the kernels hold for a moment is not in it.
"""

import torch

from ultramed.attention import attention_for
from ultramed.schema import ConfigError, OptimConfig, Strict

# Shapes of models whose weights are gated, out of their config.json: hidden, intermediate, layers, heads, kv heads, words.
SHAPES = {
    "huggyllama/llama-7b": (4096, 11008, 32, 32, 32, 32000),
    "huggyllama/llama-13b": (5120, 13824, 40, 40, 40, 32000),
    "meta-llama/Meta-Llama-3-8B-Instruct": (4096, 14336, 32, 32, 8, 128256),
    "meta-llama/Meta-Llama-3-70B-Instruct": (8192, 28672, 80, 64, 8, 128256),
    "bundled:smollm2-135m": (576, 1536, 30, 9, 3, 49152),
    "small": (512, 1408, 4, 8, 8, 8192),  # of no model: what a CPU trains in seconds
    "tiny:llama": (64, 128, 2, 4, 2, 2048),
}
TIED = {"bundled:smollm2-135m"}
BYTES = {"full": 4.0, "lora": 2.0, "lora_8bit": 1.0, "lora_4bit": 0.5625}  # of a weight in the layers; NF4 with its scales


class Shape(Strict):
    """A Llama-like model. `words`: size of the vocabulary; `tied`: embedding and head are one matrix."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    words: int
    tied: bool = False

    def config(self, layers: int | None = None, words: int | None = None, attention: str = "sdpa"):
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.hidden, intermediate_size=self.intermediate, num_hidden_layers=layers or self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads, vocab_size=words or self.words,
            tie_word_embeddings=self.tied, bos_token_id=0, eos_token_id=1, pad_token_id=2, attn_implementation=attention,
        )  # fmt: skip

    @property
    def in_layers(self) -> int:
        """Parameters of all layers."""
        head = self.hidden // self.heads
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * head * self.kv_heads
        return self.layers * (attention + 3 * self.hidden * self.intermediate + 2 * self.hidden)

    @property
    def parameters(self) -> int:
        return self.in_layers + self.hidden + self.words * self.hidden * (1 if self.tied else 2)

    def adapter(self, rank: int, targets: list[str]) -> int:
        """Parameters of LoRA matrices on the named projections."""
        small = self.hidden // self.heads * self.kv_heads
        sizes = {
            "q_proj": (self.hidden, self.hidden), "k_proj": (self.hidden, small), "v_proj": (self.hidden, small),
            "o_proj": (self.hidden, self.hidden), "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate), "down_proj": (self.intermediate, self.hidden),
        }  # fmt: skip
        return self.layers * sum(rank * sum(sizes[t]) for t in targets)


def shape_of(name: str) -> Shape:
    """Of a known model, a local folder, or a hub id that can be read. Raises ConfigError otherwise."""
    fields = ("hidden", "intermediate", "layers", "heads", "kv_heads", "words")
    if name in SHAPES:
        return Shape(**dict(zip(fields, SHAPES[name], strict=True)), tied=name in TIED)
    from transformers import AutoConfig

    try:
        c = AutoConfig.from_pretrained(name)
        kv = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
        sizes = (c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_attention_heads, kv, c.vocab_size)
    except (OSError, ValueError, AttributeError):
        raise ConfigError(
            f"the shape of {name!r} is not known here; known are {', '.join(SHAPES)}, and local folders"
        ) from None
    return Shape(**dict(zip(fields, sizes, strict=True)), tied=bool(c.tie_word_embeddings))


def kept(shape: Shape, layers: int, rows: int, length: int, full: bool, checkpointing: bool, device: str) -> int:
    """Bytes that the backward pass of `layers` layers keeps for a micro-batch, without head and adapters.

    full: fp32 weights under autocast, whose bf16 copies count, too; otherwise frozen bf16 weights.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import LlamaModel

    before, sizes, alive = torch.get_default_dtype(), {}, []
    with FakeTensorMode():
        torch.set_default_dtype(torch.float32 if full else torch.bfloat16)
        try:
            net = LlamaModel(shape.config(layers, words=16, attention=attention_for(device))).train()
        finally:
            torch.set_default_dtype(before)
        if not full:
            net.requires_grad_(False)
            net.enable_input_require_grads()
        if checkpointing:
            net.activation_checkpointing_enable({"use_reentrant": False})
        weights = {p.untyped_storage()._cdata for p in net.parameters()}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                sizes[storage._cdata] = storage.nbytes()
            alive.append(tensor)  # so that no other storage gets its address
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
            net(input_ids=torch.zeros(rows, length, dtype=torch.long), use_cache=False)
    return sum(sizes.values())


def memory(
    shape: Shape, config: OptimConfig, rows: int, length: int, *, processes: int = 1, labelled: int | None = None,
    device: str = "cuda",
) -> dict:  # fmt: skip
    """Bytes for each process, by part, and their `total`. rows: of a micro-batch; labelled: tokens of it with a label.

    Weights, gradients and optimiser states are divided among the processes, as FSDP does; activations are not. What a
    device needs for itself (about half a GB on CUDA) comes on top.
    """
    full, method = config.method == "full", config.method
    outside = shape.parameters - shape.in_layers
    trained = shape.parameters if full else shape.adapter(config.lora.r, config.lora.target_modules)
    weights = shape.parameters * 4 if full else shape.in_layers * BYTES[method] + outside * 2 + trained * 4
    states = trained * (2 if config.optim == "adamw_8bit" else 8)
    one, two = (kept(shape, n, rows, length, full, config.gradient_checkpointing, device) for n in (1, 2))
    again = kept(shape, 1, rows, length, full, False, device) if config.gradient_checkpointing else 0
    activations = one + (two - one) * (shape.layers - 1) + again
    if not full:  # what an adapter reads: a bf16 copy of its input after dropout, and the mask
        inputs = sum(shape.intermediate if t == "down_proj" else shape.hidden for t in config.lora.target_modules)
        activations += 3 * inputs * rows * length * (1 if config.gradient_checkpointing else shape.layers)
    labelled = rows * length if labelled is None else labelled
    # fp32 logits, their gradient, and in bf16 what the matrix product gave; the whole head's weights are cast for it
    head = labelled * shape.words * 10 + (shape.words * shape.hidden * 2 if full else 0)
    parts = {
        "weights": weights / processes, "gradients": trained * 4 / processes, "optimiser": states / processes,
        "activations": activations, "head": head,
    }  # fmt: skip
    return {**parts, "total": sum(parts.values())}


def flops_per_token(shape: Shape, config: OptimConfig, length: int) -> float:
    """Floating point operations of one training step for each token: 2 a weight forward, 2 for the gradient of what came
    in, 2 for the gradient of the weights (not with an adapter), and the forward pass again with checkpointing."""
    weights = shape.in_layers + shape.words * shape.hidden
    attention = 2 * shape.layers * shape.hidden * length  # both products, half of it masked
    passes = (3 if config.method == "full" else 2) + (1 if config.gradient_checkpointing else 0)
    return passes * (2 * weights + attention)
