"""Memory and time of a training run before it starts, out of the model's shape.

Weights, gradients and optimiser states are counted; activations are taken from a run of one and of two layers on tensors
without data (PyTorch's fake tensors), which record what the backward pass keeps. Notebook 12 and
`tests/benchmarks/cost.py` show the error against measured runs.
"""

import torch

from ultramed.core.errors import ConfigError
from ultramed.core.schema import OptimConfig, Strict
from ultramed.lm.attention import cpu_attention

# Shapes of models whose weights are gated, out of their config.json: hidden, intermediate, layers, heads, kv heads, words.
SHAPES = {
    "huggyllama/llama-7b": (4096, 11008, 32, 32, 32, 32000),
    "huggyllama/llama-13b": (5120, 13824, 40, 40, 40, 32000),
    "meta-llama/Meta-Llama-3-8B-Instruct": (4096, 14336, 32, 32, 8, 128256),
    "meta-llama/Meta-Llama-3-70B-Instruct": (8192, 28672, 80, 64, 8, 128256),
    "bundled:smollm2-135m": (576, 1536, 30, 9, 3, 49152),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (576, 1536, 30, 9, 3, 49152),
    "HuggingFaceTB/SmolLM2-360M-Instruct": (960, 2560, 32, 15, 5, 49152),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": (2048, 8192, 24, 32, 32, 49152),
    "small": (512, 1408, 4, 8, 8, 8192),  # of no model: what a CPU trains in seconds
    "tiny:llama": (64, 128, 2, 4, 2, 2048),
    "tiny:llama-larger": (96, 192, 3, 4, 2, 2048),
}
TIED = {name for name in SHAPES if "smollm2" in name.lower()}
QUANTISED = {"lora_8bit": 1.0, "lora_4bit": 0.5625}  # bytes of a weight in the layers; NF4 with its scales


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
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=layers or self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=words or self.words,
            tie_word_embeddings=self.tied,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
            attn_implementation=attention,
        )

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
            "q_proj": (self.hidden, self.hidden),
            "k_proj": (self.hidden, small),
            "v_proj": (self.hidden, small),
            "o_proj": (self.hidden, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }
        return self.layers * sum(rank * sum(sizes[t]) for t in targets)


def shape_of(name: str) -> Shape:
    """Of a known model, a local folder, or a hub id that can be read. Raises ConfigError otherwise."""
    fields = ("hidden", "intermediate", "layers", "heads", "kv_heads", "words")
    if name in SHAPES:
        return Shape(**dict(zip(fields, SHAPES[name], strict=True)), tied=name in TIED)
    from transformers import AutoConfig

    try:
        c = AutoConfig.from_pretrained(name, trust_remote_code=False)
        kv = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
        sizes = (c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_attention_heads, kv, c.vocab_size)
    except (OSError, ValueError, AttributeError):
        raise ConfigError(
            f"the shape of {name!r} is not known here; known are {', '.join(SHAPES)}, and local folders"
        ) from None
    return Shape(**dict(zip(fields, sizes, strict=True)), tied=bool(c.tie_word_embeddings))


def kept(
    shape: Shape, layers: int, rows: int, length: int, method: str, checkpointing: bool, device: str, dtype: torch.dtype
) -> int:
    """Bytes that the backward pass of `layers` layers keeps for a micro-batch, without head and adapters.

    method 'full': fp32 weights under autocast, whose copies in `dtype` count, too; otherwise frozen weights in `dtype`.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import LlamaModel

    before, sizes, alive = torch.get_default_dtype(), {}, []
    with FakeTensorMode():
        torch.set_default_dtype(torch.float32 if method == "full" else dtype)
        try:
            net = LlamaModel(shape.config(layers, words=16, attention=cpu_attention() if device == "cpu" else "sdpa")).train()
        finally:
            torch.set_default_dtype(before)
        if method != "full":
            for name, weight in net.named_parameters():  # bitsandbytes' LLM.int8 keeps the input of a product, too
                weight.requires_grad_(method == "lora_8bit" and name.endswith("proj.weight"))
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

        autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), autocast:
            net(input_ids=torch.zeros(rows, length, dtype=torch.long), use_cache=False)
    return sum(sizes.values())


def memory(
    shape: Shape,
    config: OptimConfig,
    rows: int,
    length: int,
    *,
    accumulation: int = 2,
    processes: int = 1,
    labelled: int | None = None,
    reference: bool = False,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> dict:
    """Bytes of tensors for each process at the worst moment of a step, by part, and their `total`.

    rows: of a micro-batch; accumulation: micro-batches of a step (of more than one, the gradients are there all the time);
    labelled: tokens of a micro-batch with a label; reference: beside all weights that are trained a frozen copy is held;
    dtype: of the products and of frozen weights, fp32 on a CPU without bf16 instructions.
    Weights, gradients and optimiser states are divided among the processes where all weights are trained, as FSDP does;
    activations are not, and the layer that FSDP has gathered at a time is not counted. What a device needs for itself
    (about half a GB on CUDA) comes on top.
    """
    full, method, layers, tokens = config.method == "full", config.method, shape.layers, rows * length
    size = dtype.itemsize
    processes = processes if full else 1  # adapters are trained data parallel
    outside = shape.parameters - shape.in_layers
    trained = shape.parameters if full else shape.adapter(config.lora.r, config.lora.target_modules)
    weights = shape.parameters * 4 if full else shape.in_layers * QUANTISED.get(method, size) + outside * size + trained * 4
    matrix = shape.words * shape.hidden * 4 if full else 0  # of the vocabulary, in fp32
    small_states = config.optim == "adamw_8bit"
    states = trained * 2 + matrix * 6 / 4 if small_states else trained * 8  # an embedding's states stay in fp32
    unpacked = 5 * matrix if small_states and device == "cpu" else 0  # bitsandbytes steps there in fp32, a tensor at a time

    def activations(checkpointing: bool) -> tuple[int, int]:
        """(of a layer, around the layers)."""
        one, two = (kept(shape, n, rows, length, method, checkpointing, device, dtype) for n in (1, 2))
        return two - one, 2 * one - two

    layer, around = activations(config.gradient_checkpointing)
    if full:
        adapters = 0
    else:  # a copy of what goes into each adapter after dropout, and the mask (numbers on a CPU, bytes on CUDA)
        inputs = sum(shape.intermediate if t == "down_proj" else shape.hidden for t in config.lora.target_modules)
        adapters = (size + (size if device == "cpu" else 1)) * inputs * tokens
    again = 0  # what checkpointing computes a second time, one layer after the other
    if config.gradient_checkpointing:
        again = adapters + activations(False)[0]
    else:
        layer += adapters
    labelled = tokens if labelled is None else labelled
    # Logits, their softmax and two gradients, of which three are there at once; the whole head's weights are cast for it.
    head = labelled * shape.words * 12 + (shape.words * shape.hidden * size if full and size < 4 else 0)
    passing = 3 * tokens * shape.intermediate * size  # gradients of the widest tensors of a layer
    gradients = trained * 4
    of_layer = (gradients - (outside * 4 if full else 0)) / layers
    earlier = gradients if accumulation > 1 else 0  # of micro-batches before this one
    forward = around + layer * layers
    moments = [  # (gradients, activations, head)
        (earlier, forward, head),  # the loss is there
        (max(earlier, matrix), forward + again + passing, 0),  # the last layer's backward pass begins
        (max(earlier, gradients - matrix - of_layer), around + layer + again + passing, 0),  # the first layer's
        (gradients, unpacked, 0),  # the optimiser's step
    ]
    gradients, held, head = max(moments, key=lambda m: m[0] / processes + m[1] + m[2])
    parts = {
        "weights": weights / processes,
        "gradients": gradients / processes,
        "optimiser": states / processes,
        "activations": held,
        "head": head,
        "reference": shape.parameters * (4 if processes == 1 else size) / processes if full and reference else 0,
    }
    return {**parts, "total": sum(parts.values())}


def flops_per_token(shape: Shape, config: OptimConfig, length: int) -> float:
    """Floating point operations of one training step for each token: 2 a weight forward, 2 for the gradient of what came
    in, 2 for the gradient of the weights (not with an adapter), and the forward pass again with checkpointing."""
    weights = shape.in_layers + shape.words * shape.hidden
    attention = 2 * shape.layers * shape.hidden * length  # both products, half of it masked
    passes = (3 if config.method == "full" else 2) + (1 if config.gradient_checkpointing else 0)
    return passes * (2 * weights + attention)
