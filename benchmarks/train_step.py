"""Claim: a training step is faster and smaller than stock transformers'.

    python benchmarks/train_step.py            tokens per CPU second on the 62M shape, each side at its best setting
    python benchmarks/train_step.py --memory   peak memory with a vocabulary of 32k

62M parameters (hidden 384, 8 layers, 32 experts top-4), batch 4 x 512, MTP off, fused AdamW, one thread; every setting
in its own process. bf16 trains bf16 weights on both sides.
"""

import argparse
import json
import sys

from common import in_process, median_seconds, peak_rss_mib, report

SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "moe_intermediate_size": 192,
    "num_hidden_layers": 8,
    "first_k_dense_replace": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 192,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "max_position_embeddings": 512,
    "num_nextn_predict_layers": 0,
}
BATCH, LENGTH = 4, 512


def measure(side: str, dtype: str, attention: str, experts: str, vocab: int, repeats: int) -> dict[str, float]:
    """Tokens per process CPU second of a whole step, and the peak memory above what the weights and imports take."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    if side == "ours":
        from deepseek_v3 import DeepseekV3Config as Config
        from deepseek_v3 import DeepseekV3ForCausalLM as Model
    else:
        from transformers.models.deepseek_v3 import DeepseekV3Config as Config
        from transformers.models.deepseek_v3 import DeepseekV3ForCausalLM as Model
    model = (
        Model(Config(**SHAPE | {"vocab_size": vocab}, attn_implementation=attention)).to(getattr(torch, dtype)).train()
    )
    if experts != "default":
        model.set_experts_implementation(experts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, vocab, (BATCH, LENGTH))
    before = peak_rss_mib()

    def step() -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = median_seconds(step, repeats)
    return {
        "tokens_per_second": BATCH * LENGTH / seconds,
        "peak_mib": peak_rss_mib(),
        "step_mib": peak_rss_mib() - before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--worker", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        side, dtype, attention, experts, vocab, repeats = args.worker
        print(json.dumps(measure(side, dtype, attention, experts, int(vocab), int(repeats))))
        return
    vocab, repeats = ("32768", "1") if args.memory else (str(SHAPE["vocab_size"]), "5")
    settings = [
        ("stock", d, a, e) for d in ("float32", "bfloat16") for a in ("sdpa", "eager") for e in ("grouped_mm", "eager")
    ]
    settings += [("ours", d, "sdpa", "default") for d in ("float32", "bfloat16")]
    rows = []
    for side, dtype, attention, experts in settings:
        result = in_process(__file__, "--worker", side, dtype, attention, experts, vocab, repeats)
        row = {"side": side, "dtype": dtype, "attention": attention, "experts": experts, "vocab": int(vocab)}
        rows.append(row | {name: round(value, 1) for name, value in result.items()})
        print(rows[-1], file=sys.stderr)
    key, best = ("peak_mib", min) if args.memory else ("tokens_per_second", max)
    reference = best(row[key] for row in rows if row["side"] == "stock")
    for row in rows:
        row["relative_to_best_stock"] = round(row[key] / reference, 2)
    report("train_step_memory" if args.memory else "train_step", rows)


if __name__ == "__main__":
    main()
