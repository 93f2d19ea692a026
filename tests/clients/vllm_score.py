"""vLLM on a checkpoint: prompt logprobs and greedy tokens. Runs in vLLM's environment, where this package is not.

    python vllm_score.py REQUEST.json    (one JSON object on the last line)
"""

import json
import os
import sys
import time

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}

from vllm import LLM, SamplingParams
from vllm.model_executor.layers.fused_moe.experts import cpu_moe
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding


def allow_group_limited_routing() -> None:
    """vLLM's CPU kernels for quantized experts do not list DeepSeek-V3's routing, though they get its result."""
    for name in ("CPUExpertsInt4", "CPUExpertsInt8", "CPUExpertsFp8"):
        getattr(cpu_moe, name)._supports_routing_method = staticmethod(lambda *arguments: True)


def repair_plain_rope() -> None:
    """On a CPU vLLM 0.32 rotates several heads, and keys that are part of a wider row, wrongly without YaRN."""
    RotaryEmbedding.forward_cpu = RotaryEmbedding.forward_native


def main(request: dict) -> None:
    if request["routing"]:
        allow_group_limited_routing()
    if request["rope"]:
        repair_plain_rope()
    speculative = {"method": "mtp", "num_speculative_tokens": 1, "attention_backend": "CPU_MLA"}
    start = time.monotonic()
    llm = LLM(
        request["model"],
        dtype=request["dtype"],
        attention_backend="CPU_MLA",
        block_size=16,
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=128,
        max_num_seqs=4,
        max_logprobs=-1,
        seed=0,
        speculative_config=speculative if request["mtp"] else None,
        disable_log_stats=False,
    )
    parameters = SamplingParams(
        temperature=0, max_tokens=request["new"], prompt_logprobs=-1, detokenize=False, ignore_eos=True
    )
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in request["prompts"]], parameters, use_tqdm=False)
    counters = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    result = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        # per prompt and position after the first: the logprobs of all tokens, in order of their ids
        "logprobs": [
            [[row[token].logprob for token in sorted(row)] for row in output.prompt_logprobs[1:]] for output in outputs
        ],
        "drafts": counters.get("vllm:spec_decode_num_draft_tokens"),
        "accepted": counters.get("vllm:spec_decode_num_accepted_tokens"),
        "foreign": [name for name in sys.modules if name.startswith("deepseek_v3")],
        "seconds": time.monotonic() - start,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        main(json.load(file))
