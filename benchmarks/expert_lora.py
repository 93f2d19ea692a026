"""Claim: LoRA on the experts costs less memory and time than PEFT's own, which adds `B A` to a copy of the weights.

    python benchmarks/expert_lora.py

A training step (forward, backward, AdamW of the adapters) of a model with Moonlight's ratios scaled down: hidden 768,
three MoE layers of 64 experts, top-6, of width 528. Rank 16 on the experts' two weights and nothing else, gradients
through the whole stack. One thread, every setting in its own process, base weights and dtype the same.

Settings: this package's wrappers; PEFT's `ParamWrapper` on the same model; and PEFT's on stock transformers' model
with its experts implementations, of which the best counts (`batched_mm` copies weights per choice: 40 GB here).
`frozen` is the same step without any adapter, the gradient flowing to the embeddings: what the base alone costs.

`seconds`: median process CPU seconds of a step. `step_mib`: peak resident memory of the steps above what is resident
before the first one, that is above weights, adapters and imports; gradients and the optimizer's state of the adapters
(110 MiB on every side) are in it. `above_frozen_mib`: `step_mib` less the frozen base's of the same model, dtype and
experts implementation: the extra memory of adapting, near or below zero where an adapted layer keeps less than a plain
one does.
"""

import argparse
import json
import sys
from pathlib import Path

from common import in_process, median_seconds, peak_rss_mib, report

SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 768,
    "intermediate_size": 2112,
    "moe_intermediate_size": 528,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 192,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "max_position_embeddings": 512,
    "num_nextn_predict_layers": 0,
}
LENGTH, RANK = 512, 16
SIDES = ("ours", "PEFT on ours", "PEFT on stock", "frozen ours", "frozen stock")
STOCK_EXPERTS = ("grouped_mm", "eager")


def resident_mib() -> float:
    """This process's resident memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def build(side: str, dtype: str, experts: str):
    import torch
    from peft import LoraConfig, get_peft_model

    torch.set_num_threads(1)
    torch.manual_seed(0)
    if side.endswith("stock"):
        from transformers.models.deepseek_v3 import DeepseekV3Config as Config
        from transformers.models.deepseek_v3 import DeepseekV3ForCausalLM as Model
    else:
        from deepseek_v3 import DeepseekV3Config as Config
        from deepseek_v3 import DeepseekV3ForCausalLM as Model
    torch.set_default_dtype(getattr(torch, dtype))
    model = Model(Config(**SHAPE, attn_implementation="sdpa"))
    torch.set_default_dtype(torch.float32)
    if experts != "deepseek_v3":
        model.set_experts_implementation(experts)
    if side.startswith("frozen"):
        model.requires_grad_(False)
        model.enable_input_require_grads()
    elif side == "ours":
        from deepseek_v3.finetuning.lora import apply_lora

        model = apply_lora(model, ["experts"], rank=RANK)
    else:
        parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=[], target_parameters=parameters)
        model = get_peft_model(model, config)
    return model.train()


def measure(side: str, dtype: str, experts: str, batch: int, repeats: int) -> dict[str, float]:
    import torch

    model = build(side, dtype, experts)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
    tokens = torch.randint(0, SHAPE["vocab_size"], (batch, LENGTH))
    before, peak_before = resident_mib(), peak_rss_mib()

    def step() -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    seconds = median_seconds(step, repeats, warm_up=1)
    assert peak_rss_mib() > peak_before, "building the model took more memory than a step: step_mib would be wrong"
    return {"seconds": seconds, "step_mib": peak_rss_mib() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        side, dtype, experts, batch, repeats = args.worker
        print(json.dumps(measure(side, dtype, experts, int(batch), int(repeats))))
        return
    rows = []
    for dtype in ("float32", "bfloat16"):
        for batch in (2, 4):
            here = []
            for side in SIDES:
                for experts in STOCK_EXPERTS if side.endswith("stock") else ("deepseek_v3",):
                    result = in_process(__file__, "--worker", side, dtype, experts, str(batch), "3")
                    here.append({"side": side, "dtype": dtype, "tokens": batch * LENGTH, "experts": experts} | result)
                    print(here[-1], file=sys.stderr)
            rows += compared(here)
    report("expert_lora", rows)


def compared(rows: list[dict]) -> list[dict]:
    """Of one dtype and batch: with what the frozen base costs taken off, and ratios to this package's."""
    frozen = {(row["side"].split()[-1], row["experts"]): row["step_mib"] for row in rows if "frozen" in row["side"]}
    ours = rows[0]
    for row in rows:
        row["above_frozen_mib"] = row["step_mib"] - frozen[row["side"].split()[-1], row["experts"]]
        row["seconds_to_ours"] = row["seconds"] / ours["seconds"]
        row["step_mib_to_ours"] = row["step_mib"] / ours["step_mib"]
    return [{k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()} for row in rows]


if __name__ == "__main__":
    main()
