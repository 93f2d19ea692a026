"""The routing bias: its update rule, when it fires, what it is made from, and the statistics of the load."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from deepseek_v3.configuration import preset
from deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from deepseek_v3.training import LoadStatistics, RoutingBiasHook, load_counts, update_routing_bias
from deepseek_v3.training.balance import routers
from deepseek_v3.training.loop import fit
from deepseek_v3.training.optimizer import build_optimizer
from tests.training.helpers import run_ranks, synthetic_data, tiny_model, tiny_recipe

NAMES = ["model.layers.1.mlp.gate", "model.layers.2.mlp.gate", "model.layers.3.mlp.gate"]  # the last one is MTP's


def biases(model: nn.Module) -> torch.Tensor:
    return torch.stack([router.e_score_correction_bias for router in routers(model).values()]).clone()


def batch(rows: int = 2, length: int = 16, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 64, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def test_update_rule() -> None:
    """Underloaded experts rise, overloaded ones fall, experts at the mean stay; then the layer's step is centred."""
    model = tiny_model()
    assert list(routers(model)) == NAMES
    one, two, mtp = routers(model).values()
    two.e_score_correction_bias.copy_(torch.arange(8.0))
    mtp.e_score_correction_bias.fill_(0.5)
    one.load_counts = torch.tensor([4, 0, 8, 4, 4, 4, 4, 4])
    mtp.load_counts = torch.tensor([10, 1, 1, 1, 1, 1, 1, 0])  # mean 2: signs -1 and seven +1, whose mean is 0.75
    counts = update_routing_bias(model, 0.25)
    assert counts.tolist() == [[4, 0, 8, 4, 4, 4, 4, 4], [0] * 8, [10, 1, 1, 1, 1, 1, 1, 0]]
    assert one.e_score_correction_bias.tolist() == [0, 0.25, -0.25, 0, 0, 0, 0, 0]
    assert two.e_score_correction_bias.tolist() == list(range(8))  # saw no token
    assert mtp.e_score_correction_bias.tolist() == [0.5 - 0.25 * 1.75] + [0.5 + 0.25 * 0.25] * 7
    assert load_counts(model).tolist() == [[0] * 8] * 3  # forgotten
    update_routing_bias(model, 0.25)
    assert one.e_score_correction_bias.tolist() == [0, 0.25, -0.25, 0, 0, 0, 0, 0]


@settings(max_examples=30)
@given(st.lists(st.integers(0, 50), min_size=8, max_size=8), st.floats(1e-4, 1.0))
def test_update_is_centred_and_of_the_stated_size(loads: list[int], speed: float) -> None:
    router = DeepseekV3TopkRouter(preset("tiny"))
    router.load_counts = torch.tensor(loads)
    update_routing_bias(nn.ModuleList([router]), speed)
    bias, mean = router.e_score_correction_bias, sum(loads) / 8
    assert abs(float(bias.double().mean())) <= 1e-7
    for i, j in itertools.combinations(range(8), 2):
        sign = [(load < mean) - (load > mean) for load in (loads[i], loads[j])]
        assert float(bias[i] - bias[j]) == pytest.approx(speed * (sign[0] - sign[1]), abs=1e-6)


def test_small_updates_of_a_bf16_model_are_not_lost() -> None:
    """bf16 has a spacing of 0.03 at 5, where the biases of the released model are."""
    model = tiny_model().to(torch.bfloat16)
    router = routers(model)[NAMES[0]]
    router.e_score_correction_bias.fill_(5.0)
    for _ in range(10):
        router.load_counts = torch.tensor([9, 1, 5, 5, 5, 5, 5, 5])
        update_routing_bias(model, 0.001)
    assert router.e_score_correction_bias.dtype == torch.float32
    expected = torch.tensor([4.99, 5.01, 5, 5, 5, 5, 5, 5])
    torch.testing.assert_close(router.e_score_correction_bias, expected, rtol=0, atol=1e-5)


def test_hook_fires_once_per_optimizer_step_of_a_plain_adamw() -> None:
    model = tiny_model(bias_update_speed=0.01).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    hook = RoutingBiasHook(model)
    fired: list[int] = []
    optimizer.register_step_pre_hook(hook)
    optimizer.register_step_pre_hook(lambda *_: fired.append(1))
    for micro in range(3):  # accumulation: nothing happens before the step
        model(**batch(seed=micro)).loss.backward()
        assert not biases(model).any()
    collected = load_counts(model)
    optimizer.step()
    assert fired == [1] and torch.equal(hook.counts, collected)
    # 3 of 8 experts per token; the MTP layer has no token to see at the last position of a row
    assert hook.counts.sum(1).tolist() == [3 * 2 * 16 * 3, 3 * 2 * 16 * 3, 3 * 2 * 15 * 3]
    step = torch.sign(collected.float().mean(1, keepdim=True) - collected)
    torch.testing.assert_close(biases(model), 0.01 * (step - step.mean(1, keepdim=True)))
    assert biases(model).any(dim=1).all()
    optimizer.zero_grad()
    model(**batch()).loss.backward()
    optimizer.step()
    assert hook.counts.sum(1).tolist() == [2 * 16 * 3, 2 * 16 * 3, 2 * 15 * 3]


def test_a_step_that_a_gradient_scaler_skips_moves_no_bias() -> None:
    """A fused optimizer is called all the same, with `found_inf`."""
    model = tiny_model(bias_update_speed=0.01).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    optimizer.register_step_pre_hook(RoutingBiasHook(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(model(**batch()).loss * float("inf")).backward()
    scaler.step(optimizer)
    assert not biases(model).any()
    optimizer.zero_grad()
    scaler.update()
    scaler.scale(model(**batch()).loss).backward()
    scaler.step(optimizer)
    assert biases(model).any(dim=1).all()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_counts_once(reentrant: bool) -> None:
    counts = []
    for checkpointed in (False, True):
        model = tiny_model().train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            assert model.model.layers[1].gradient_checkpointing
        calls = []
        handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model(**batch()).loss.backward()
        handle.remove()
        assert len(calls) == 1 + checkpointed  # it was recomputed
        counts.append(load_counts(model))
    assert counts[0].any() and torch.equal(*counts)


def test_only_real_tokens_of_training_are_counted() -> None:
    model = tiny_model()
    model.eval()(**batch())
    with torch.no_grad():
        model.train()(**batch())
    assert not load_counts(model).any()
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, 10:] = 0
    model(**batch(), attention_mask=mask)
    assert load_counts(model).sum(1).tolist() == [26 * 3, 26 * 3, 24 * 3]


def test_speed_zero_freezes_and_still_forgets(tmp_path) -> None:
    model = tiny_model()
    routers(model)[NAMES[1]].e_score_correction_bias.copy_(torch.arange(8.0))
    before = biases(model)
    model.train()(**batch()).loss.backward()
    assert update_routing_bias(model, 0.0).any()
    assert torch.equal(biases(model), before) and not load_counts(model).any()

    # the recipe lets the bias rest after a share of the steps
    recipe = tiny_recipe(tmp_path, tmp_path, steps=6, bias_update_until=0.5)
    seen: list[torch.Tensor] = []

    def on_step(_: object) -> bool:
        seen.append(biases(model))
        return False

    fit(model, build_optimizer(model.parameters(), recipe), synthetic_data(30), recipe, Accelerator(), on_step)
    moved = [not torch.equal(a, b) for a, b in zip([before, *seen[:-1]], seen, strict=True)]
    assert moved == [True, True, True, False, False, False]


def test_fit_takes_the_hook_away_again(tmp_path) -> None:
    model, recipe = tiny_model(), tiny_recipe(tmp_path, tmp_path, steps=1)
    optimizer = build_optimizer(model.parameters(), recipe)
    for _ in range(2):
        fit(model, optimizer, synthetic_data(30), recipe, Accelerator(), lambda _: False)
        assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize(("speed", "low", "high"), [(0.01, 0.0, 0.35), (0.0, 1.5, 9.0)])
def test_a_skewed_router_is_balanced(speed: float, low: float, high: float) -> None:
    router = DeepseekV3TopkRouter(preset("tiny", n_group=1, topk_group=1, num_experts_per_tok=2))
    with torch.no_grad():
        router.weight.normal_(std=0.1)
    model = nn.ModuleList([router])
    skew = 2 * router.weight[:2].detach().sum(0) / router.weight[:2].norm()  # two experts like every token
    first, last = [], []
    for step in range(250):
        _, _, chosen = router(torch.randn(512, 64) + 2 * skew)
        router.count_load(chosen, None)
        violation = LoadStatistics.of(update_routing_bias(model, speed)).max_violation
        (first if step < 20 else last if step >= 230 else []).append(violation)
    assert first[0] > 1.5
    assert low <= sum(last) / len(last) <= high


def test_load_statistics() -> None:
    """By hand: shares 1/2, 0, 1/4, 1/4 have 1.5 of 2 bits; deviations 2, -2, 0, 0 of a mean of 2."""
    found = LoadStatistics.of(torch.tensor([[4, 0, 2, 2], [2, 2, 2, 2]]))
    assert found.max_violation == pytest.approx((1 + 0) / 2)
    assert found.cv == pytest.approx((math.sqrt(2) / 2 + 0) / 2)
    assert found.dead == pytest.approx(1 / 8)
    assert found.entropy == pytest.approx((0.75 + 1) / 2)
    assert LoadStatistics.of(torch.tensor([[0, 0, 0, 6]])) == LoadStatistics(
        3.0, pytest.approx(math.sqrt(3)), 0.75, 0.0
    )


def test_load_statistics_where_nothing_was_counted() -> None:
    nothing = LoadStatistics(0.0, 0.0, 0.0, 0.0)
    assert LoadStatistics.of(torch.zeros(0, 0, dtype=torch.int64)) == nothing
    assert LoadStatistics.of(torch.zeros(2, 4, dtype=torch.int64)) == nothing
    # a layer without tokens does not enter the averages, least of all with a violation of -1
    both = LoadStatistics.of(torch.tensor([[3, 1, 2, 2], [0, 0, 0, 0]]))
    alone = LoadStatistics.of(torch.tensor([[3, 1, 2, 2]]))
    assert both == alone and alone.dead == 0


def test_model_without_moe_layers(tmp_path) -> None:
    model = tiny_model(first_k_dense_replace=4)
    assert not routers(model) and load_counts(model).shape == (0, 0)
    assert update_routing_bias(model, 0.1).shape == (0, 0)
    recipe = tiny_recipe(tmp_path, tmp_path, steps=2)
    losses = []
    optimizer = build_optimizer(model.parameters(), recipe)
    fit(model, optimizer, synthetic_data(30), recipe, Accelerator(), lambda r: losses.append(r.loss))
    assert len(losses) == 2
    RoutingBiasHook(SimpleNamespace(config=SimpleNamespace(bias_update_speed=0.1), named_modules=lambda: []))()


def test_two_ranks_end_with_the_biases_of_one_process(tmp_path) -> None:
    """Ranks see different rows, so only summed counts give the bias of the global batch, on both of them."""
    model = tiny_model(bias_update_speed=0.01)
    recipe = tiny_recipe(tmp_path, tmp_path, steps=3, batch_size=4)
    data = synthetic_data(40)
    results: list = []

    def train() -> None:
        torch.manual_seed(0)
        optimizer = build_optimizer(model.parameters(), recipe)
        accelerator = Accelerator(cpu=True)
        assert accelerator.num_processes == (dist.get_world_size() if dist.is_initialized() else 1)
        fit(model, optimizer, data, recipe, accelerator, lambda r: results.append(r.counts))

    def rank() -> None:
        train()
        torch.save(
            {"counts": results, "bias": biases(model), "world": dist.get_world_size()},
            tmp_path / f"{dist.get_rank()}.pt",
        )

    assert run_ranks(tmp_path / "ranks", rank) == ["done", "done"]  # forked: the model here is still untrained
    train()
    for number in range(2):
        found = torch.load(tmp_path / f"{number}.pt")
        assert found["world"] == 2
        assert torch.equal(torch.stack(found["counts"]), torch.stack(results))
        assert torch.equal(found["bias"], biases(model))
    assert biases(model).any()


def test_counts_of_layers_on_several_devices() -> None:
    with FakeTensorMode():
        model = tiny_model()
        for i, router in enumerate(routers(model).values()):
            router.load_counts = torch.ones(8, dtype=torch.int64, device=f"cuda:{i % 2}")
        assert load_counts(model).shape == (3, 8)
