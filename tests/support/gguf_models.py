"""Write small GGUF files: a Llama with a tokenizer of bytes, as llama.cpp stores it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from tokenizers import pre_tokenizers

__all__ = ["llama", "write_gguf"]

_BLOCK = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
_OUTER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"


def llama() -> Any:
    """A random Llama whose axes the blocks of GGUF divide."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def write_gguf(
    file: Path, model: Any, kind: str = "F32", metadata: dict[str, str] | None = None
) -> dict[str, torch.Tensor]:
    """Write a model with matrices in a type of GGUF, and return the weights that it then has."""
    config, made = model.config, {}
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    for key, value in (metadata or {}).items():
        writer.add_string(key, value)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer)
    names = {**_OUTER}
    for i in range(config.num_hidden_layers):
        names |= {f"blk.{i}.{a}": f"model.layers.{i}.{b}" for a, b in _BLOCK.items()}
    for theirs, ours in names.items():
        name = f"{ours}.weight"
        x = model.get_parameter(name).detach().numpy()
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        n = heads.get(theirs.rpartition(".")[2])
        form = gguf.GGMLQuantizationType["F32" if x.ndim == 1 else kind]
        stored = gguf.quants.quantize(x if n is None else _interleaved(x, n), form)
        writer.add_tensor(f"{theirs}.weight", stored, raw_dtype=form)
        made[name] = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(x, form), form))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


def _interleaved(x: np.ndarray, heads: int) -> np.ndarray:
    """Order the rows of each head as llama.cpp does: the halves of a rotary pair together."""
    halves = x.reshape(heads, 2, len(x) // heads // 2, *x.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(x.shape))


def _add_tokenizer(writer: Any) -> None:
    """Add a token for every byte, for "th" and for the end of a text."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "<end>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 257 + [3])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(257)
    writer.add_unk_token_id(257)
    writer.add_chat_template(TEMPLATE)
