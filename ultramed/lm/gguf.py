"""A model as one GGUF file, which llama.cpp, Ollama, OpenVINO GenAI and transformers read.

For Llama-like models with plain rotary positions and a byte-level BPE tokenizer (Llama 3, SmolLM2). Written with the `gguf`
package of llama.cpp; the names of tensors and metadata are those of its converter.
"""

import json
import re
from pathlib import Path

import torch

from ultramed.core.errors import ConfigError

# How llama.cpp cuts text before merging, by what the tokenizer's own pre-tokenizer says (llama.cpp, convert_hf_to_gguf.py).
SPLITS = {"smollm": '"Digits"', "llama-bpe": r"\\p{N}{1,3}", "gpt-2": '"use_regex": true'}
DTYPES = {"f16": (torch.float16, "MOSTLY_F16"), "f32": (torch.float32, "ALL_F32")}


def write_gguf(net, tokenizer, file: Path, dtype: str = "f16") -> None:
    """Write a transformers model with its tokenizer to `file`; matrices as `dtype` ('f16', 'f32'), vectors as fp32.

    Raises ConfigError for an architecture or a tokenizer that this does not know.
    """
    import gguf

    (kept, kind), c = DTYPES[dtype], net.config
    if net.__class__.__name__ != "LlamaForCausalLM":
        raise ConfigError(f"GGUF is written for LlamaForCausalLM, this is {net.__class__.__name__}: use llama.cpp's converter")
    plain = c.rope_parameters.get("rope_type", "default") == "default" and not (c.attention_bias or c.mlp_bias)
    if not plain or (c.head_dim or c.hidden_size // c.num_attention_heads) != c.hidden_size // c.num_attention_heads:
        raise ConfigError("GGUF is written for plain rotary positions and no biases (not Llama 3.1 and later): use llama.cpp's")
    part = file.with_name(f".{file.name}.part")
    writer = gguf.GGUFWriter(part, "llama")
    writer.add_name(file.stem)
    writer.add_file_type(getattr(gguf.LlamaFileType, kind))
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_dimension_count(c.hidden_size // c.num_attention_heads)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_vocab_size(c.vocab_size)
    _tokenizer(writer, tokenizer, c.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    for name, value in net.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        if found := re.search(r"\.(q|k)_proj\.weight$", name):
            value = _interleave(value, c.num_attention_heads if found[1] == "q" else c.num_key_value_heads)
        array = value.cpu().to(kept if value.ndim > 1 else torch.float32).numpy()
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(file)


def _interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rotary halves (transformers) to rotary pairs (llama.cpp): rows of each head 0, n/2, 1, n/2 + 1, ..."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def _tokenizer(writer, tokenizer, words: int) -> None:
    import gguf

    made = json.loads(tokenizer.backend_tokenizer.to_str())
    split = json.dumps(made.get("pre_tokenizer"))
    cut = next((name for name, sign in SPLITS.items() if sign in split), None)
    if made["model"]["type"] != "BPE" or '"ByteLevel"' not in split or cut is None:
        raise ConfigError(
            "GGUF is written for byte-level BPE as in Llama 3, SmolLM2 and GPT-2: use llama.cpp's converter for this one"
        )
    texts = {i: text for text, i in tokenizer.get_vocab().items()}
    added = {t["id"]: t["special"] for t in made["added_tokens"]}
    kinds = {True: gguf.TokenType.CONTROL, False: gguf.TokenType.USER_DEFINED}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list([texts.get(i, f"[PAD{i}]") for i in range(words)])
    writer.add_token_types(
        [
            kinds[added[i]] if i in added else gguf.TokenType.NORMAL if i in texts else gguf.TokenType.UNUSED
            for i in range(words)
        ]
    )
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in made["model"]["merges"]])
    for add, number in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if number is not None:
            add(number)
    writer.add_add_bos_token(tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
