"""What a model is compared with: the dense twin's shape and its room in memory, and the picture of it all."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_v3.configuration import preset
from deepseek_v3.training import pretrain
from deepseek_v3.training.compare import dense_twin, training_flops
from deepseek_v3.training.monitor import plot_loss
from tests.training.helpers import fast_finish, pretrain_module, tiny_recipe


@pytest.mark.parametrize("chosen", [3, 2])
def test_only_moe_layers_change_in_the_dense_twin(chosen: int) -> None:
    """Also where a token's experts are not as wide together (3 + 1 times 32) as the dense layers, 128."""
    config = preset("tiny", num_experts_per_tok=chosen, first_k_dense_replace=1, num_nextn_predict_layers=1)
    model, twin = DeepseekV3ForCausalLM(config), dense_twin(config)
    widths = [layer.mlp.gate_proj.weight.shape[0] for layer in twin.model.layers]
    assert widths == [128] + [(chosen + 1) * 32] * 3
    dense = model.model.layers[0], twin.model.layers[0]
    for one, two in zip(*(layer.named_parameters() for layer in dense), strict=True):
        assert (one[0], one[1].shape) == (two[0], two[1].shape)
    for layer in twin.model.layers:
        for parameter in layer.mlp.parameters():
            assert float(parameter.detach().std()) == pytest.approx(config.initializer_range, rel=0.1)


def test_mtp_layers_without_a_loss_cost_nothing() -> None:
    resting, none = preset("tiny", mtp_loss_coef=0.0), preset("tiny", num_nextn_predict_layers=0)
    assert training_flops(resting, 32) == training_flops(none, 32) < training_flops(preset("tiny"), 32)


def test_the_dense_twin_has_the_device_to_itself(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first optimizer is gone, the first model is on the CPU, and the twin recomputes activations too."""
    fast_finish(monkeypatch)
    models: list[DeepseekV3ForCausalLM] = []
    optimizers: list[weakref.ref] = []
    moved: list[tuple[int, Any]] = []
    fit, to = pretrain_module.fit, DeepseekV3ForCausalLM.to

    def noted_to(self: DeepseekV3ForCausalLM, *args: Any) -> DeepseekV3ForCausalLM:
        moved.append((id(self), args[0]))
        return to(self, *args)

    def noted_fit(model: DeepseekV3ForCausalLM, optimizer: Any, *rest: Any) -> int:
        gc.collect()
        assert all(reference() is None for reference in optimizers)
        models.append(model)
        optimizers.append(weakref.ref(optimizer))
        if len(models) == 2:
            assert moved[-1] == (id(model), torch.device("cpu"))
            assert (id(models[0]), "cpu") in moved
        return fit(model, optimizer, *rest)

    monkeypatch.setattr(DeepseekV3ForCausalLM, "to", noted_to)
    monkeypatch.setattr(pretrain_module, "fit", noted_fit)
    pretrain(tiny_recipe(tmp_path, corpus, steps=1, compare=True, gradient_checkpointing=True))
    assert [model.is_gradient_checkpointing for model in models] == [True, True]


@pytest.mark.parametrize("level", [0.3, 2.0, 7.0])
def test_the_curves_are_inside_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: float) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    metrics = [
        *({"tokens": n, "ce_loss": 1.0, "bits_per_byte": level + 1 / n} for n in range(1, 5)),
        {"tokens": 4, "heldout_bits_per_byte": level + 0.1},
    ]
    plot_loss(tmp_path / "loss.png", metrics, {"gzip": level + 0.5})
    low, high = figures[0].axes[0].get_ylim()
    assert low <= level + 0.1 and level + 1 <= high <= level + 2
