"""Peak memory of every export format, on a synthetic checkpoint of 4.8 GB in shards.

Each export runs in a process of its own. Its memory is the high-water mark of the resident set (VmHWM, set back right
before the export) minus the resident set at that moment: own pages and mapped files alike, since exports read files
into fresh memory and map none. The claim: at most 1.5 times the largest layer plus a constant of `CONSTANT_MIB`.

    python benchmarks/export_memory.py [--formats NAME ...] [--folder FOLDER]
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from common import in_process, report

from deepseek_v3 import DeepseekV3Config
from deepseek_v3.configuration import preset
from deepseek_v3.export import Output, Step, export
from deepseek_v3.export.files import Journal, PartialFile, plan_safetensors, write_index
from deepseek_v3.modeling_deepseek_v3.checkpoint import mtp_copies, tensor_shapes
from deepseek_v3.process import peak_memory, reset_peak_memory
from deepseek_v3.tokenization.train import train_tokenizer

CONSTANT_MIB = 300
SHARD = 2**30
RANK = 16
# name -> format, options
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bf16": ("bf16", {}),
    "bf16 with adapter": ("bf16", {}),
    "bf16 from fp8": ("bf16", {}),
    "fp8": ("fp8", {}),
    "int4 rtn": ("int4", {"method": "rtn"}),
    "int4 gptq": ("int4", {"method": "gptq", "calibration_rows": 4}),
    "int8": ("int8", {}),
    "nf4": ("nf4", {}),
    "bnb-int8": ("bnb-int8", {}),
    "gguf Q8_0": ("gguf", {"quantization": "Q8_0"}),
}


LARGE = {
    "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 1024, "vocab_size": 16384,
    "num_hidden_layers": 10, "n_routed_experts": 32, "num_experts_per_tok": 4, "first_k_dense_replace": 1,
    "kv_lora_rank": 512, "q_lora_rank": 768, "num_attention_heads": 16, "num_key_value_heads": 16,
    "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "n_group": 8, "topk_group": 4,
}  # fmt: skip
SMALL = {"hidden_size": 128, "moe_intermediate_size": 128}  # its export loads the libraries before the measurement


def config(sizes: dict[str, int]) -> DeepseekV3Config:
    return preset("tiny", **sizes, architectures=["DeepseekV3ForCausalLM"])


def shapes(config: DeepseekV3Config) -> dict[str, tuple[int, ...]]:
    found = tensor_shapes(config, mtp=True)
    return {**found, "lm_head.weight": found["model.embed_tokens.weight"]}


def layer_bytes() -> dict[str, int]:
    """bf16 bytes of each layer, and of embedding and head."""
    sizes: dict[str, int] = {}
    for name, shape in shapes(config(LARGE)).items():
        layer = re.match(r"model\.layers\.\d+|.*", name).group()
        sizes[layer] = sizes.get(layer, 0) + 2 * torch.Size(shape).numel()
    return sizes


def write(folder: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], copies: dict[str, str], seed: int) -> None:
    """Random tensors, name -> (dtype, shape), one in memory at a time; `copies` repeat another's numbers."""
    names = {original: [c for c, o in copies.items() if o == original] for original in tensors}

    def step(number: int, name: str) -> Step:
        dtype, shape = tensors[name]

        def run(read: Any) -> Any:
            generator = torch.Generator().manual_seed(seed + number)
            tensor = torch.randn(shape, generator=generator, dtype=torch.float32).mul_(0.02)
            tensor = tensor if dtype == "F32" else tensor.bfloat16()
            yield from (tensor for _ in range(1 + len(names[name])))

        return Step((), tuple(Output(each, dtype, shape) for each in (name, *names[name])), run)

    folder.mkdir(parents=True)
    files = plan_safetensors([step(number, name) for number, name in enumerate(tensors)], SHARD)
    for planned in files:
        with PartialFile(folder, planned, Journal(folder)) as file:
            for each in planned.steps:
                file.write_step(each.run(None), 0.0)
            file.finish()
    write_index(folder, files, 0)


def write_checkpoint(folder: Path, config: DeepseekV3Config) -> None:
    """Random weights, and a tokenizer that knows little more than bytes."""
    tensors = {name: ("F32" if name.endswith("bias") else "BF16", shape) for name, shape in shapes(config).items()}
    write(folder, tensors, mtp_copies(config), seed=0)
    config.save_pretrained(folder)
    with warnings.catch_warnings(action="ignore"):  # of the ids that are left over
        train_tokenizer(["all of its text"], config.vocab_size).save_pretrained(folder)


def write_adapter(folder: Path) -> None:
    """PEFT's layout of LoRA on the routed experts of every MoE layer."""
    c = config(LARGE)
    experts, hidden, width = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for layer in range(c.first_k_dense_replace, c.num_hidden_layers):
        prefix = f"base_model.model.model.layers.{layer}.mlp.experts"
        for module, rows, columns in ((f"{prefix}.base_layer", 2 * width, hidden), (prefix, hidden, width)):
            tensors[f"{module}.lora_A.weight"] = ("F32", (RANK * experts, columns))
            tensors[f"{module}.lora_B.weight"] = ("F32", (rows, RANK * experts))
    write(folder, tensors, {}, seed=10**6)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    content = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_parameters": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(content))


def measure(source: str, output: str, name: str, adapter: str | None) -> dict[str, Any]:
    """In a process of its own."""
    format_, options = CASES[name]
    small = Path(output).with_name("small")
    write_checkpoint(small, config(SMALL))
    export(small, f"{output}-small", format_, progress=False, **options)
    reset_peak_memory()
    before = peak_memory()
    result = export(source, output, format_, adapter=adapter, progress=False, **options)
    return {"peak": peak_memory() - before, "bytes": result["bytes"], "seconds": result["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--formats", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--folder", type=Path, help="keep the checkpoint there (default: a temporary folder)")
    args = parser.parse_args()
    largest = max(layer_bytes().values())
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        write_checkpoint(folder / "source", config(LARGE))
        write_adapter(folder / "adapter")
        size = sum(file.stat().st_size for file in (folder / "source").glob("*.safetensors"))
        print(f"checkpoint: {size / 1e9:.2f} GB, largest layer {largest / 2**20:.0f} MiB", flush=True)
        rows = []
        for name in args.formats:
            source = folder / "source"
            if name == "bf16 from fp8":
                source = folder / "fp8"
                if not source.exists():
                    export(folder / "source", source, "fp8")
            adapter = [str(folder / "adapter")] if name == "bf16 with adapter" else []
            found = in_process(__file__, "--measure", str(source), str(folder / "out" / "export"), name, *adapter)
            shutil.rmtree(folder / "out")
            peak = found["peak"] / 2**20
            rows.append(
                {
                    "format": name,
                    "checkpoint_gb": round(size / 1e9, 2),
                    "written_gb": round(found["bytes"] / 1e9, 2),
                    "largest_layer_mib": round(largest / 2**20),
                    "peak_mib": round(peak),
                    "of_layer": peak / (largest / 2**20),
                    "within": peak <= 1.5 * largest / 2**20 + CONSTANT_MIB,
                    "seconds": found["seconds"],
                }
            )
            print(rows[-1], flush=True)
        report("export_memory", rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(*sys.argv[2:5], sys.argv[5] if len(sys.argv) > 5 else None)))
    else:
        main()
