"""Tiny random models of many architectures, saved as folders that load like any local model."""

import functools

import torch

WINDOW = 24
VOCABULARY = 320
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HYBRID = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": WINDOW}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "mistral_wide": {"sliding_window": 4096},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {"head_dim": 8, "decoder_sparse_step": 1, **EXPERTS},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, **HYBRID},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, **HYBRID},
    "phi": {},
    "phi3": {"sliding_window": WINDOW},
    "phi3_long": {"rope_parameters": {**ROPE, "original_max_position_embeddings": 40}, "original_max_position_embeddings": 40},
    "granite": {"logits_scaling": 3.0, "residual_multiplier": 0.5, "embedding_multiplier": 4.0, "attention_multiplier": 0.2},
    "cohere2": {"logit_scale": 0.3, **HYBRID},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "glm4": {"head_dim": 8},
    "gpt_neox": {},
    "gpt2": {"n_positions": 512, "n_embd": 32, "n_layer": 3, "n_head": 4},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon_alibi": {"alibi": True, "multi_query": False},
    "deepseek_v3": {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
    | {"moe_intermediate_size": 24, "n_shared_experts": 1, "num_key_value_heads": 4, **LATENT},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, **HYBRID},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "afmoe": {"head_dim": 8, "num_dense_layers": 1, "num_shared_experts": 1, **EXPERTS, **HYBRID},
    "recurrent_gemma": {"head_dim": 8, "lru_width": 32, "attention_window_size": WINDOW, "conv1d_width": 4},
    "mamba2": {"head_dim": 8, "num_heads": 8, "state_size": 8, "n_groups": 1, "expand": 2},
}
# Positions go by a sequence's length: reading in two parts, with a cache, is not reading in one, and most tests compare these.
BY_LENGTH = {
    "llama_dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        "max_position_embeddings": 64,
    }
}
TYPES = {"mistral_wide": "mistral", "llama_dynamic": "llama", "phi3_long": "phi3", "falcon_alibi": "falcon"}
NOT_CLASSIFIERS = {
    "granite",
    "cohere2",
    "olmo2",
    "afmoe",
    "recurrent_gemma",
    "mamba2",
}  # transformers has no class for sequence classification


def make(name: str, kind: str = "causal", seed: int = 0):
    """A random model of the family in fp32, with weights large enough that its choices differ."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    config = AutoConfig.for_model(TYPES.get(name, name), **{**COMMON, **{**FAMILIES, **BY_LENGTH}[name]})
    torch.manual_seed(seed)
    if kind == "reward":
        config.num_labels = 1
    net = (AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM).from_config(config).float()
    for p in net.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.25)
    return net


@functools.cache
def tokenizer():
    """Byte-level BPE without merges, ChatML turns."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    words = {t: i for i, t in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    bpe = Tokenizer(BPE(vocab=words, merges=[]))
    bpe.add_special_tokens(special)
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=special[1], eos_token=special[2], pad_token=special[0])
    made.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return made


def save(name: str, folder, kind: str = "causal"):
    """The model's folder as a base-model artifact (kind 'causal') or a path to a reward model."""
    from ultramed.core.schema import ModelConfig
    from ultramed.lm.models import base_model

    path = folder / f"{name}-{kind}"
    make(name, kind).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return base_model(ModelConfig(name=str(path), label=name))
