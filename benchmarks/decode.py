"""Claim: one decoding step at a long context costs a fraction of stock transformers'.

    python benchmarks/decode.py [--context 4096]

276M parameters (hidden 1024, 16 heads, kv_lora 512, 8 layers, 16 experts top-4), batch 1, one thread. Each side runs
in its own process at each of its settings; the speed-up compares with stock's best setting of the same dtype. The
cache is filled with random states, since the cost does not depend on them.
"""

import argparse
import json
import sys

from common import in_process, median_seconds, report

SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 8,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 768,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 32768,
    "num_nextn_predict_layers": 0,
}


def measure(side: str, dtype: str, cache_kind: str, attention: str, experts: str, context: int) -> float:
    """Milliseconds of process CPU time per decoded token."""
    import torch
    from transformers import DynamicCache, StaticCache

    torch.set_num_threads(1)
    torch.manual_seed(0)
    if side == "ours":
        from deepseek_v3 import DeepseekV3Config as Config
        from deepseek_v3 import DeepseekV3ForCausalLM as Model
    else:
        from transformers.models.deepseek_v3 import DeepseekV3Config as Config
        from transformers.models.deepseek_v3 import DeepseekV3ForCausalLM as Model
    config = Config(**SHAPE, attn_implementation=attention)
    model = Model(config).to(getattr(torch, dtype)).eval()
    if experts != "default":
        model.set_experts_implementation(experts)
    steps = 7
    cache = (
        DynamicCache(config=config)
        if cache_kind == "dynamic"
        else StaticCache(config, max_cache_len=context + 2 * steps)
    )
    latent = torch.randn(1, 1, context, config.kv_lora_rank, dtype=model.dtype)
    key_rope = torch.randn(1, 1, context, config.qk_rope_head_dim, dtype=model.dtype)
    for layer in range(config.num_hidden_layers):
        cache.update(latent, key_rope, layer)
    token = torch.tensor([[5]])
    with torch.inference_mode():
        return 1e3 * median_seconds(lambda: model(token, past_key_values=cache, use_cache=True), repeats=steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps({"ms": measure(*args.worker, args.context)}))
        return
    rows = []
    for dtype in ("float32", "bfloat16"):
        settings = [
            ("stock", c, a, e)
            for c in ("dynamic", "static")
            for a in ("sdpa", "eager")
            for e in ("grouped_mm", "eager")
        ]
        settings += [("ours", cache, "sdpa", "default") for cache in ("dynamic", "static")]
        for side, cache, attention, experts in settings:
            worker = ("--context", str(args.context), "--worker", side, dtype, cache, attention, experts)
            ms = in_process(__file__, *worker)["ms"]
            row = {"side": side, "dtype": dtype, "cache": cache, "attention": attention, "experts": experts}
            rows.append(row | {"context": args.context, "ms_per_token": round(ms, 2)})
            print(rows[-1], file=sys.stderr)
        best = min(r["ms_per_token"] for r in rows if r["side"] == "stock" and r["dtype"] == dtype)
        for row in rows:
            if row["dtype"] == dtype:
                row["speed_up"] = round(best / row["ms_per_token"], 2)
    report("decode", rows)


if __name__ == "__main__":
    main()
