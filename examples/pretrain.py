"""Pretrain from a recipe. The same call goes on with an interrupted run.

python examples/pretrain.py examples/recipes/small.yaml
python examples/pretrain.py examples/recipes/small.yaml data=my_texts/ steps=2000 output_dir=outputs/mine
accelerate launch --num_processes 2 examples/pretrain.py examples/recipes/small.yaml
torchrun --nproc_per_node 2 examples/pretrain.py examples/recipes/small.yaml
"""

import argparse
import sys
from pathlib import Path

from deepseek_v3.hub import write_pretraining_card
from deepseek_v3.recipe import parse_fields
from deepseek_v3.training import Recipe, pretrain


def main() -> int:
    parser = argparse.ArgumentParser(description="Pretrain from a recipe.")
    parser.add_argument("recipe", help="a YAML file with fields of deepseek_v3.training.Recipe")
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help="fields that win over the file, as YAML")
    parser.add_argument("--restart", action="store_true", help="forget what output_dir holds of this run")
    args = parser.parse_args()
    recipe = Recipe.load(args.recipe, **parse_fields(args.overrides))
    try:
        record = pretrain(recipe, restart=args.restart)
    except InterruptedError as stopped:  # Ctrl-C or SIGTERM; the state is saved
        print(stopped, file=sys.stderr)
        return 75
    if record:  # the main process has it, the others get an empty one
        write_pretraining_card(Path(recipe.output_dir) / "model", record)
        print(f"held-out bits per byte: {record['heldout_bits_per_byte']:.3f}")
        print(f"python examples/generate.py {recipe.output_dir}/model 'def main('")
    return 0


if __name__ == "__main__":
    sys.exit(main())
