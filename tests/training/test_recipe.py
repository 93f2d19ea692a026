"""Recipes: what loads, and that every error names the file and the field."""

from pathlib import Path

import pytest

from deepseek_v3.configuration import preset
from deepseek_v3.training import QUICKSTART, Recipe

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "recipes"
EXAMPLES = [path for path in sorted(FOLDER.glob("*.yaml")) if "\nbase:" not in path.read_text()]  # not fine-tuning


def load(tmp_path: Path, text: str | bytes, **overrides) -> Recipe:
    path = tmp_path / "my.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return Recipe.load(path, **overrides)


def refuse(tmp_path: Path, text: str | bytes, *parts: str, **overrides) -> str:
    with pytest.raises(ValueError) as caught:
        load(tmp_path, text, **overrides)
    message = str(caught.value)
    for part in ("my.yaml", *parts):
        assert part in message
    return message


def test_quickstart_loads() -> None:
    recipe = Recipe.load()
    assert recipe == Recipe.load(QUICKSTART) == Recipe.load(str(QUICKSTART))
    assert (recipe.data, recipe.preset) == ("stdlib", "small") and 100 <= recipe.steps <= 5000
    assert recipe.config().hidden_size == preset("small").hidden_size


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_recipes_load(path: Path) -> None:
    recipe = Recipe.load(path)
    assert recipe.config().vocab_size > 0 and Path(recipe.output_dir) != Path(Recipe.load().output_dir)


def test_fields_come_from_file_then_overrides(tmp_path: Path) -> None:
    text = (
        "steps: 7\nlearning_rate: 1\nheldout: null\nmodel: {vocab_size: 600, n_group: 1, topk_group: 1}\npreset: tiny"
    )
    recipe = load(tmp_path, text, steps=9, output_dir="x")
    assert (recipe.steps, recipe.learning_rate, recipe.heldout, recipe.output_dir) == (9, 1, None, "x")
    assert recipe.batch_size == Recipe().batch_size
    config = recipe.config(bos_token_id=5)
    assert (config.vocab_size, config.n_group, config.bos_token_id) == (600, 1, 5)
    assert config.hidden_size == preset("tiny").hidden_size


def test_overrides_of_a_mapping_are_merged_into_it(tmp_path: Path) -> None:
    config = Recipe.load(QUICKSTART, model={"mtp_loss_coef": 0.1}).config()
    assert (config.bias_update_speed, config.mtp_loss_coef) == (0.005, 0.1)
    text = "preset: tiny\nmodel: {vocab_size: 600, mtp_loss_coef: 0.2}"
    assert load(tmp_path, text, model={"vocab_size": 700}).model == {"vocab_size": 700, "mtp_loss_coef": 0.2}
    assert load(tmp_path, text, model={}).model == {}  # the preset's own
    assert load(tmp_path, "preset: tiny", model={"vocab_size": 700}).model == {"vocab_size": 700}
    refuse(tmp_path, text, "model is None", model=None)
    refuse(tmp_path, "model: 3", "unknown fields ['hiden_size']", model={"hiden_size": 32})


def test_context_grows_with_the_sequences() -> None:
    assert Recipe(preset="tiny", sequence_length=2048).config().max_position_embeddings == 2048
    assert Recipe(preset="tiny", sequence_length=16).config().max_position_embeddings == 512


@pytest.mark.parametrize("text", ["1e-3", "3E-4", "1e-03", "0.001", ".5"])
def test_numbers_without_a_point_are_numbers(tmp_path: Path, text: str) -> None:
    """YAML 1.1 reads 1e-3 as a string; nobody means that."""
    recipe = load(tmp_path, f"learning_rate: {text}")
    assert recipe.learning_rate == float(text) and isinstance(recipe.learning_rate, float)
    assert load(tmp_path, "steps: 3", min_lr_ratio=text).min_lr_ratio == float(text)
    fields = ("mtp_loss_coef", "bias_update_speed", "attention_dropout")
    model = load(tmp_path, f"model: {{{', '.join(f'{name}: {text}' for name in fields)}}}").model
    assert model == dict.fromkeys(fields, float(text)) and all(type(value) is float for value in model.values())


@pytest.mark.parametrize(
    "text",
    [
        "steps: [1, 2",
        "steps: 3\n\tbatch_size: 2",
        "a: &x b\nc: *y",
        "[1, 2]: 3",
        "!!python/object/apply:os.system ['true']",
        b"\xff\xfe\x00",
        b"steps: \x00",
        "[" * 20_000,
        "seed: " + "9" * 5000,
        "",
        "- steps: 3",
        "steps",
        "3",
    ],
    ids=lambda text: repr(text[:20]),
)
def test_what_is_no_recipe(tmp_path: Path, text: str | bytes) -> None:
    refuse(tmp_path, text)


def test_missing_files(tmp_path: Path) -> None:
    for path in (tmp_path / "my.yaml", tmp_path):
        with pytest.raises(ValueError, match=str(path)):
            Recipe.load(path)


@pytest.mark.parametrize("text", ["stepz: 3", "lr: 0.1\nsteps: 3", "1: 2", "null: 2"])
def test_unknown_fields(tmp_path: Path, text: str) -> None:
    message = refuse(tmp_path, text, "unknown field")
    assert "learning_rate" in message  # what is allowed


def test_unknown_override(tmp_path: Path) -> None:
    refuse(tmp_path, "steps: 3", "unknown field stepz", stepz=4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", "many"),
        ("steps", "2.5"),
        ("steps", "true"),
        ("steps", "null"),
        ("learning_rate", "fast"),
        ("learning_rate", "true"),
        ("learning_rate", "[0.1]"),
        ("learning_rate", ".nan"),
        ("learning_rate", "nan"),
        ("learning_rate", "inf"),
        ("learning_rate", "-0.1"),
        ("learning_rate", "11"),
        ("gradient_checkpointing", "1"),
        ("gradient_checkpointing", "maybe"),
        ("data", "3"),
        ("data", "null"),
        ("data", "2020-01-01"),
        ("data", "[a, b]"),
        ("heldout", "3"),
        ("heldout", "false"),
        ("output_dir", "null"),
        ("tokenizer", "{}"),
        ("model", "null"),
        ("model", "[1]"),
        ("model", "tiny"),
        ("dtype", "fp16"),
        ("dtype", "null"),
        ("dtype", "[bf16]"),
        ("dtype", "{a: b}"),
        ("steps", "0"),
        ("batch_size", "0"),
        ("sequence_length", "1"),
        ("log_every", "0"),
        ("eval_every", "-1"),
        ("save_every", "0"),
        ("keep_checkpoints", "0"),
        ("warmup_steps", "-1"),
        ("seed", "-1"),
        ("seed", str(2**63)),
        ("min_lr_ratio", "1.5"),
        ("beta1", "-0.1"),
        ("beta1", "1.0"),
        ("beta2", "1.0"),
        ("beta2", "2"),
        ("bias_update_until", "1.01"),
        ("weight_decay", "-1"),
        ("grad_clip", "0"),
        ("heldout_fraction", "0"),
        ("heldout_fraction", "0.9"),
        ("micro_batch_size", "0"),
        ("micro_batch_size", "9"),
        ("micro_batch_size", "1.5"),
        ("preset", "huge"),
    ],
)
def test_types_and_ranges(tmp_path: Path, field: str, value: str) -> None:
    message = refuse(tmp_path, f"{field}: {value}", field)
    assert "allowed" in message
    with pytest.raises(ValueError, match=field):  # an override is checked as the file is
        load(tmp_path, f"{field}: {value}", text_field="x")


@pytest.mark.parametrize(
    ("model", "field"),
    [
        ("{hiden_size: 32}", "hiden_size"),
        ("{hidden_size: -1}", "hidden_size"),
        ("{num_experts_per_tok: 99}", "num_experts_per_tok"),
        ("{n_group: 3}", "n_group"),
        ("{vocab_size: many}", "vocab_size"),
        ("{max_position_embeddings: 16}", "max_position_embeddings is 16, allowed are 256"),
        ("{vocab_size: 1e3}", "vocab_size"),
        ("{hidden_act: 1e3}", "hidden_act"),
        ("{mtp_loss_coef: much}", "mtp_loss_coef"),
        ("{1: 2}", "1"),
    ],
)
def test_model_fields_are_checked_when_the_recipe_is_read(tmp_path: Path, model: str, field: str) -> None:
    """Not after minutes of reading a corpus and training a tokenizer."""
    refuse(tmp_path, f"preset: tiny\nmodel: {model}", "model", field)
