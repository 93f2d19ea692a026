"""A small whole GGUF file of a Llama, and one of a DeepSeek-V3 model, to damage."""

import struct
from pathlib import Path

import gguf
import numpy as np

LAYERS, WIDTH, HEADS, INNER, TOKENS = 2, 16, 2, 24, 261


def write_llama(path: Path) -> Path:
    """Two layers of width 16, byte-level tokens without merges."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(TOKENS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    letters = [chr(i + 256) if i < 33 or 126 < i < 161 or i == 173 else chr(i) for i in range(256)]
    writer.add_token_list(["<unk>", "<s>", "</s>", *letters, "ab", "cd"])
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 258)
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    generator = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, generator.standard_normal(shape, dtype=np.float32))

    add("token_embd.weight", TOKENS, WIDTH)
    for i in range(LAYERS):
        for part in ("attn_norm", "ffn_norm"):
            add(f"blk.{i}.{part}.weight", WIDTH)
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{i}.{part}.weight", WIDTH, WIDTH)
        for part in ("ffn_gate", "ffn_up"):
            add(f"blk.{i}.{part}.weight", INNER, WIDTH)
        add(f"blk.{i}.ffn_down.weight", WIDTH, INNER)
    add("output_norm.weight", WIDTH)
    add("output.weight", TOKENS, WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def position(content: bytes, key: str) -> int:
    """Where the value of a metadata key, or the tensor's number of dimensions, begins in a GGUF file."""
    raw = key.encode()
    return content.index(struct.pack("<Q", len(raw)) + raw) + 8 + len(raw)


def patched(content: bytes, at: int, layout: str, *values: int) -> bytes:
    new = struct.pack(f"<{layout}", *values)
    return content[:at] + new + content[at + len(new) :]
