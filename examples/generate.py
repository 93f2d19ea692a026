"""Continue prompts with a checkpoint, one batch for all of them, with the model's own MTP layers as drafters.

python examples/generate.py outputs/quickstart/model "def main(" "class Node:"
python examples/generate.py outputs/quickstart/model "def main(" --drafts 2 --temperature 0.8
python examples/generate.py path/to/a/chat/model --chat "What is a latent?"
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import deepseek_v3  # noqa: F401  makes the Auto classes use this package for model_type "deepseek_v3"


def main() -> None:
    parser = argparse.ArgumentParser(description="Continue prompts with a checkpoint.")
    parser.add_argument("checkpoint", help="a folder or a Hub repository")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--drafts", type=int, default=1, help="MTP drafts per step; 0 decodes without them")
    parser.add_argument("--chat", action="store_true", help="each prompt is a user turn of the chat template")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint).to(device)
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)  # pads on the left: new tokens must follow text
    if args.chat:
        turns = [[{"role": "user", "content": prompt}] for prompt in args.prompts]
        inputs = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )
    else:
        inputs = tokenizer(args.prompts, padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)

    options = {"max_new_tokens": args.max_new_tokens, "do_sample": args.temperature > 0}
    if args.temperature > 0:
        options["temperature"] = args.temperature
    if args.drafts and model.config.num_nextn_predict_layers:
        options |= {"use_mtp": True, "num_mtp_draft": args.drafts}
    output = model.generate(**inputs.to(device), **options, return_dict_in_generate=True)

    for text in tokenizer.batch_decode(output.sequences, skip_special_tokens=True):
        print(text, end="\n---\n")
    if "use_mtp" in options:
        stats = output.mtp_stats
        shares = ", ".join(f"{share:.0%}" for share in stats.acceptance)
        print(f"drafts accepted, by position: {shares}; tokens per forward pass: {stats.tokens_per_forward:.2f}")


if __name__ == "__main__":
    main()
