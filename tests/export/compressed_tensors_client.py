"""Run where compressed-tensors is installed and this package is not: `FOLDER OUTPUT`.

Writes to OUTPUT what compressed-tensors makes of every quantized module of FOLDER, by official name.
"""

import json
import sys
from pathlib import Path

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file


def main(folder: Path, output: Path) -> None:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    modules: dict[str, dict] = {}
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            module, _, part = name.rpartition(".")
            modules.setdefault(module, {})[part] = tensor
    weights = {
        f"{module}.weight": compressor.decompress(parts, scheme)["weight"].contiguous()
        for module, parts in modules.items()
        if "weight_scale" in parts
    }
    save_file(weights, output)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
