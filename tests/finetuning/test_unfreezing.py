"""Progressive unfreezing: exactly which tensors move in each stage, with which learning rate, across a resume."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM
from deepseek_v3.finetuning.lora import apply_lora
from deepseek_v3.finetuning.trainer import FinetuneTrainer, warmup_cosine
from deepseek_v3.finetuning.unfreezing import (
    ProgressiveUnfreezing,
    Unfreezing,
    layers_above,
    parameter_groups,
    stage_of,
)

STEPS = 8


def tiny_model(**changes: Any) -> DeepseekV3ForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16}
    layers = {"num_hidden_layers": 4, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1}
    attention = {"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16}
    heads = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "max_position_embeddings": 64}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**(sizes | layers | attention | heads | experts | changes)))


class Recorder(TrainerCallback):
    """Which parameters each step changed, their weights after it, and the optimizer's own count of their steps."""

    def __init__(self) -> None:
        self.moved: dict[int, set[str]] = {}
        self.before: dict[str, torch.Tensor] = {}
        self.optimizer: Any = None

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        now = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.moved[state.global_step] = {name for name in now if not torch.equal(now[name], self.before[name])}
        self.before, self.optimizer = now, optimizer


def run(
    folder: Path, model: torch.nn.Module, schedule: Unfreezing, resume: str | None = None, **changes: Any
) -> tuple[Recorder, FinetuneTrainer]:
    generator = torch.Generator().manual_seed(1)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 48, (16, 12), generator=generator)]
    defaults = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "remove_unused_columns": False}
    saving = {"save_strategy": "steps", "save_steps": 3, "restore_callback_states_from_checkpoint": True}
    arguments = TrainingArguments(output_dir=str(folder), **(defaults | quiet | saving | changes))
    recorder = Recorder()
    callbacks = [ProgressiveUnfreezing(schedule), recorder]
    evaluated = rows[:4] if "eval_strategy" in changes else None
    trainer = FinetuneTrainer(
        model, arguments, None, rows, evaluated, callbacks=callbacks, layer_decay=schedule.layer_decay
    )
    trainer.train(resume_from_checkpoint=resume)
    return recorder, trainer


def trained_layers(names: set[str]) -> set[str]:
    return {match[1] if (match := re.search(r"layers\.(\d+)\.", name)) else name.split(".")[-2] for name in names}


# Main layers 0 to 3; layer 4 is the MTP layer. Two layers and the head, one more, the last one and the embedding.
SCHEDULE = Unfreezing(first_layers=2, layers_per_stage=1, advance="steps", every=3)
IN_STAGE = [{"2", "3", "4", "norm", "lm_head"}, {"1"}, {"0", "embed_tokens"}]


def allowed(stage: int) -> set[str]:
    return set.union(*IN_STAGE[: stage + 1])


def test_each_stage_moves_exactly_its_tensors(tmp_path: Path) -> None:
    model = tiny_model()
    names = {name for name, _ in model.named_parameters()}
    recorder, _ = run(tmp_path, model, SCHEDULE)
    assert sorted(recorder.moved) == list(range(1, STEPS + 1))
    for step, moved in recorder.moved.items():
        stage = min((step - 1) // 3, 2)
        expected = {name for name in names if trained_layers({name}) <= allowed(stage)}
        assert moved == expected, (step, moved ^ expected)
    assert all(p.requires_grad for p in model.parameters())  # afterwards it is an ordinary model


def test_a_resumed_run_moves_the_same_tensors_to_the_same_values(tmp_path: Path) -> None:
    """From the middle of the run, at the border of two stages: weights bit for bit, and so the optimizer's state."""
    whole_model, part_model, resumed_model = tiny_model(), tiny_model(), tiny_model()
    whole, _ = run(tmp_path / "whole", whole_model, SCHEDULE)
    run(tmp_path / "part", part_model, SCHEDULE, max_steps=STEPS)
    resumed, trainer = run(tmp_path / "part", resumed_model, SCHEDULE, resume=str(tmp_path / "part/checkpoint-3"))
    assert {step: whole.moved[step] for step in range(4, STEPS + 1)} == resumed.moved
    for (name, one), two in zip(whole_model.named_parameters(), resumed_model.parameters(), strict=True):
        assert torch.equal(one, two), name
    assert trainer.state.global_step == STEPS


def test_what_trained_already_keeps_its_optimizer_state(tmp_path: Path) -> None:
    model = tiny_model()
    recorder, _ = run(tmp_path, model, SCHEDULE)
    optimizer = recorder.optimizer.optimizer  # inside accelerate's
    for name, parameter in model.named_parameters():
        since = min(stage for stage in range(3) if trained_layers({name}) <= allowed(stage)) * 3
        assert int(optimizer.state[parameter]["step"]) == STEPS - since, name


def test_stages_by_epochs_and_a_last_stage(tmp_path: Path) -> None:
    """16 rows in batches of 4 are four steps an epoch."""
    schedule = Unfreezing(first_layers=1, layers_per_stage=1, advance="epochs", stages=2)
    recorder, _ = run(tmp_path, tiny_model(), schedule, max_steps=-1, num_train_epochs=3)
    seen = [trained_layers(recorder.moved[step]) for step in (1, 4, 5, 12)]
    first, second = {"3", "4", "norm", "lm_head"}, {"2", "3", "4", "norm", "lm_head"}
    assert seen == [first, first, second, second]


def test_stages_by_plateau(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses by evaluation: two without progress end a stage, and what is remembered survives a resume."""
    losses = iter([3.0, 2.0, 2.5, 2.0, 1.9, 1.8, 1.7, 1.6])

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = {"eval_loss": next(losses)}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    monkeypatch.setattr(FinetuneTrainer, "evaluate", evaluate)
    schedule = Unfreezing(first_layers=2, layers_per_stage=1, advance="plateau", every=2)
    options = {"eval_strategy": "steps", "eval_steps": 1}
    recorder, _ = run(tmp_path, tiny_model(), schedule, **options)
    stages = [0 if "1" not in trained_layers(recorder.moved[step]) else 1 for step in range(1, STEPS + 1)]
    assert stages == [0, 0, 0, 0, 1, 1, 1, 1]
    losses = iter([2.0, 1.9, 1.8, 1.7, 1.6])  # from step 3 on: one evaluation without progress lies behind
    resumed, _ = run(tmp_path, tiny_model(), schedule, resume=str(tmp_path / "checkpoint-3"), **options)
    assert resumed.moved == {step: recorder.moved[step] for step in range(4, STEPS + 1)}


REACHED = [
    (Unfreezing(2, 1, "steps", 3), {}, ""),  # steps 1-3, 4-6, 7-8 of three stages
    (Unfreezing(2, 1, "steps", 4), {}, "unfreezing: 2 of 3 stages are reached in 8 steps"),
    (Unfreezing(2, 1, "steps", 4, stages=2), {}, ""),
    (Unfreezing(2, 1, "steps", 3, stages=9), {}, ""),
    (Unfreezing(1, 1, "epochs", stages=3), {}, "unfreezing: 2 of 3 stages are reached in 8 steps"),
    (Unfreezing(2, 1, "epochs"), {"max_steps": 9}, ""),
    (Unfreezing(1, 1, "epochs"), {"gradient_accumulation_steps": 3}, ""),  # two steps an epoch
    (Unfreezing(1, 1, "plateau"), {}, ""),  # nobody knows
]


@pytest.mark.parametrize("schedule, changes, line", REACHED)
def test_stages_that_the_run_is_too_short_for_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture, schedule: Unfreezing, changes: dict[str, Any], line: str
) -> None:
    recorder, trainer = run(tmp_path, tiny_model(), schedule, **{"save_strategy": "no", **changes})
    assert [found for found in capsys.readouterr().out.splitlines() if "stages" in found] == [line][: bool(line)]
    if schedule.advance != "plateau":
        last = trained_layers(recorder.moved[trainer.state.global_step])
        assert (schedule.stages != 2 and not line) == ("embed_tokens" in last)


def test_with_lora_the_stages_are_those_of_the_adapters(tmp_path: Path) -> None:
    model = apply_lora(tiny_model(), targets=("attention", "experts"), rank=4)
    recorder, _ = run(tmp_path, model, SCHEDULE)
    for step, moved in recorder.moved.items():
        stage = min((step - 1) // 3, 2)
        assert all("lora_" in name for name in moved)
        assert trained_layers(moved) == {"2", "3", "1", "0"} & allowed(stage)


@pytest.mark.parametrize("layers, least", [([0], 4), ([0, 1], 3), ([2], 2)])
def test_a_first_stage_that_trains_nothing_is_refused(tmp_path: Path, layers: list[int], least: int) -> None:
    """With the smallest number that is not."""
    message = f"unfreezing.first_layers is 1, .* allowed are whole numbers from {least}"
    callback = ProgressiveUnfreezing(Unfreezing(first_layers=1, layers_per_stage=1, advance="plateau"))
    with pytest.raises(ValueError, match=message):
        callback.on_init_end(None, None, None, model=apply_lora(tiny_model(), layers=layers))
    with pytest.raises(ValueError, match=message):  # a callback that the trainer was given later
        callback.on_train_begin(None, None, None, model=apply_lora(tiny_model(), layers=layers), train_dataloader=None)
    recorder, _ = run(tmp_path, apply_lora(tiny_model(), layers=layers), Unfreezing(least, 1, "steps"), max_steps=1)
    assert trained_layers(recorder.moved[1]) == {str(max(layers))}


def test_learning_rates_fall_with_depth() -> None:
    model = tiny_model()
    groups = parameter_groups(model, 0.1, 0.01, layer_decay=0.5)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    expected = {"3": 0.1, "4": 0.1, "norm": 0.1, "lm_head": 0.1, "2": 0.05, "1": 0.025, "0": 0.0125}
    expected["embed_tokens"] = 0.00625
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == pytest.approx(expected[trained_layers({name}).pop()]), name
    decays = {group["weight_decay"] for group in groups for p in group["params"] if p.dim() > 1}
    assert decays == {0.01}
    assert all(group["weight_decay"] == 0 for group in groups if group["params"][0].dim() == 1)


def test_the_learning_rate_in_the_history_is_that_of_the_last_layers(tmp_path: Path) -> None:
    _, trainer = run(tmp_path, tiny_model(), Unfreezing(4, layer_decay=0.5), max_steps=3)
    assert len({group["lr"] for group in trainer.optimizer.param_groups}) == 5
    logged = [row["learning_rate"] for row in trainer.state.log_history if "loss" in row]
    assert logged == pytest.approx([0.01 * warmup_cosine(0, 3, 0.1)(step) for step in range(3)])


def test_names() -> None:
    assert layers_above("base_model.model.model.layers.27.self_attn.q_proj.lora_A.default.weight", 30) == 2
    assert layers_above("model.layers.61.eh_proj.weight", 61) == 0
    assert layers_above("model.embed_tokens.weight", 61) == 61 and layers_above("score.weight", 61) == 0
    default = Unfreezing()
    assert [stage_of(f"model.layers.{i}.x", 8, default) for i in range(8)] == [2, 2, 1, 1, 1, 0, 0, 0]
    assert stage_of("model.embed_tokens.weight", 8, default) == 2


@pytest.mark.parametrize(
    "field",
    [{"first_layers": 0}, {"every": 1.5}, {"advance": "days"}, {"layer_decay": 0}, {"layer_decay": 2}, {"stages": 0}],
)
def test_bad_schedules_are_refused(field: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        Unfreezing(**field)


def test_a_plateau_needs_a_loss(tmp_path: Path) -> None:
    """Several evaluation sets have losses of other names: without an error the first stage would last for ever."""
    callback = ProgressiveUnfreezing(Unfreezing(advance="plateau"))
    with pytest.raises(ValueError, match="needs eval_loss; found eval_credit_loss"):
        callback.on_evaluate(None, None, None, metrics={"eval_credit_loss": 1.0})
