"""Run where this package is not installed: `FOLDER OUTPUT`. Writes to OUTPUT the logits fp32 of stock transformers'
model in FOLDER for the tokens `(7 i + 3 j) mod 90 + 2`, i < 2, j < 24."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def main(folder: Path, output: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for parameter in model.parameters():  # the experts come in bf16 all the same
        parameter.data = parameter.data.float()
    assert type(model).__module__.startswith("transformers.")
    tokens = (7 * torch.arange(2)[:, None] + 3 * torch.arange(24)) % 90 + 2
    with torch.no_grad():
        save_file({"logits": model(tokens).logits.float()}, output)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
