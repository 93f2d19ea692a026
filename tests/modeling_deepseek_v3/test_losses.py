"""The three training losses against definitions written out token by token."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepseek_v3.kernels.linear_cross_entropy import reference as fused
from deepseek_v3.modeling_deepseek_v3.losses import linear_cross_entropy, sequence_balance_loss, shift_left
from tests.modeling_deepseek_v3.helpers import (
    assert_same_gradients,
    build,
    gradients,
    relative_error,
    tiny_config,
    tokens,
)

ROWS, HIDDEN, VOCAB = 23, 12, 41


class Head(nn.Module):
    """Something PEFT can wrap."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)


def problem(rows: int = ROWS) -> tuple[torch.Tensor, nn.Linear, torch.Tensor, torch.Tensor]:
    hidden = (2 * torch.randn(rows, HIDDEN)).requires_grad_()
    row_weights = torch.rand(rows)
    row_weights[::5] = 0
    return hidden, Head().lm_head, torch.randint(0, VOCAB, (rows,)), row_weights


def reference(hidden, weight, labels, row_weights):
    nll = F.cross_entropy(F.linear(hidden.double(), weight.double()), labels, reduction="none")
    return (nll * row_weights.double()).sum(), nll


@pytest.mark.parametrize("chunk_rows", [1, 4, 23, 100])
@pytest.mark.parametrize("frozen", ["nothing", "head", "hidden"])
def test_linear_cross_entropy_equals_torch(chunk_rows: int, frozen: str, monkeypatch) -> None:
    monkeypatch.setattr(fused, "MIN_CHUNK_ROWS", 1)
    monkeypatch.setattr(fused, "CHUNK_ELEMENTS", chunk_rows * VOCAB + VOCAB // 2)
    hidden, head, labels, row_weights = problem()
    wanted = {"nothing": (hidden, head.weight), "head": (hidden,), "hidden": (head.weight,)}[frozen]
    for tensor in {hidden, head.weight} - set(wanted):
        tensor.requires_grad_(False)
    expected, expected_nll = reference(hidden, head.weight, labels, row_weights)
    loss, nll = linear_cross_entropy(hidden, head, labels, row_weights)
    assert loss.dtype == nll.dtype == torch.float32 and not nll.requires_grad
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(nll.double(), expected_nll.detach(), rtol=1e-5, atol=1e-5)
    # an upstream gradient that is not one
    found = torch.autograd.grad(-2.5 * loss, wanted)
    for ours, theirs in zip(found, torch.autograd.grad(-2.5 * expected, wanted), strict=True):
        assert relative_error(ours, theirs) < 1e-6


def test_linear_cross_entropy_of_no_rows_is_zero() -> None:
    hidden, head, labels, row_weights = problem(rows=0)
    loss, nll = linear_cross_entropy(hidden, head, labels, row_weights)
    loss.backward()
    assert loss.item() == 0 and nll.shape == (0,)
    assert hidden.grad.shape == (0, HIDDEN) and not head.weight.grad.any()


def test_extreme_logits_stay_finite() -> None:
    hidden, head, labels, row_weights = problem()
    with torch.no_grad():
        hidden.mul_(1e4)
    expected = reference(hidden, head.weight, labels, row_weights)[0]
    loss, _ = linear_cross_entropy(hidden, head, labels, row_weights)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert hidden.grad.isfinite().all() and head.weight.grad.isfinite().all()


def lora_head(head: nn.Linear) -> nn.Module:
    peft = pytest.importorskip("peft")
    wrapped = Head()
    wrapped.lm_head = head
    wrapped = peft.get_peft_model(wrapped, peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    return wrapped.base_model.model.lm_head


def saved_head(head: nn.Linear) -> nn.Module:
    """A fully trained copy beside the frozen original (`modules_to_save`)."""
    peft = pytest.importorskip("peft")
    wrapped = Head()
    wrapped.lm_head, wrapped.other = head, nn.Linear(2, 2)
    wrapped = peft.get_peft_model(wrapped, peft.LoraConfig(target_modules=["other"], modules_to_save=["lm_head"]))
    wrapped = wrapped.base_model.model.lm_head
    with torch.no_grad():
        wrapped.modules_to_save["default"].weight.add_(1.0)
    return wrapped


def hooked_head(head: nn.Linear) -> nn.Module:
    head.register_forward_hook(lambda module, args, output: output * 1.5)
    return head


def pre_hooked_head(head: nn.Linear) -> nn.Module:
    head.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
    return head


def replaced_forward(head: nn.Linear) -> nn.Module:
    """What accelerate's hooks do: an instance attribute, on a layer that is still a plain `nn.Linear`."""
    original = head.forward
    head.forward = lambda hidden: original(hidden) * 1.5
    return head


def biased_head(head: nn.Linear) -> nn.Module:
    head.bias = nn.Parameter(torch.randn(VOCAB))
    return head


@pytest.mark.parametrize("wrap", [lora_head, saved_head, hooked_head, pre_hooked_head, replaced_forward, biased_head])
def test_a_head_that_is_more_than_a_matrix_is_called(wrap, monkeypatch) -> None:
    monkeypatch.setattr(fused, "MIN_CHUNK_ROWS", 1)
    monkeypatch.setattr(fused, "CHUNK_ELEMENTS", 4 * VOCAB)
    hidden, head, labels, row_weights = problem()
    plain = F.linear(hidden, head.weight)
    head = wrap(head)
    logits = head(hidden)
    assert relative_error(logits, plain) > 0.01, "the wrapper has to change something"
    expected = (F.cross_entropy(logits, labels, reduction="none") * row_weights).sum()
    wanted = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    expected_gradients = torch.autograd.grad(expected, wanted)
    loss, nll = linear_cross_entropy(hidden, head, labels, row_weights)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert nll.shape == (ROWS,) and not nll.requires_grad
    for ours, theirs in zip(torch.autograd.grad(loss, wanted), expected_gradients, strict=True):
        assert relative_error(ours, theirs) < 1e-5


def test_bf16_autocast_matches_a_bf16_head_and_keeps_gradients_in_fp32() -> None:
    hidden, head, labels, row_weights = problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(hidden)
        loss, _ = linear_cross_entropy(hidden, head, labels, row_weights)
    assert logits.dtype == torch.bfloat16
    expected = (F.cross_entropy(logits.float(), labels, reduction="none") * row_weights).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found = torch.autograd.grad(loss, (hidden, head.weight))
    for ours, theirs in zip(found, torch.autograd.grad(expected, (hidden, head.weight)), strict=True):
        assert ours.dtype == torch.float32
        assert relative_error(ours, theirs) < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_survive_small_row_weights(dtype: torch.dtype) -> None:
    """A row of a big batch weighs 1e-6: times a probability, that is nothing in fp16, and a loss scale comes later."""
    hidden, head, labels, _ = problem(256)
    row_weights, scale = torch.full((256,), 1e-6), 2.0**14
    expected = reference(hidden, head.weight, labels, row_weights)[0]
    expected = torch.autograd.grad(scale * expected, (hidden, head.weight))
    half, head = hidden.detach().to(dtype).requires_grad_(), head.to(dtype)
    loss, _ = linear_cross_entropy(half, head, labels, row_weights)
    found = torch.autograd.grad(scale * loss, (half, head.weight))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() < 0.02 * theirs.norm()


class LargestTensor(TorchDispatchMode):
    """Records the element count of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return output


@pytest.mark.parametrize("wrap", [lambda head: head, hooked_head])
def test_never_more_logits_than_one_chunk(wrap, monkeypatch) -> None:
    rows, hidden_size, vocab, chunk_rows = 64, 4, 500, 3
    monkeypatch.setattr(fused, "MIN_CHUNK_ROWS", 1)
    monkeypatch.setattr(fused, "CHUNK_ELEMENTS", chunk_rows * vocab)
    head = wrap(nn.Linear(hidden_size, vocab, bias=False))
    hidden = torch.randn(rows, hidden_size, requires_grad=True)
    with LargestTensor() as largest:
        loss, _ = linear_cross_entropy(hidden, head, torch.randint(0, vocab, (rows,)), torch.ones(rows))
        loss.backward()
    # a chunk of logits or the gradient of the weight, [V, H]; all logits would be 32,000 elements
    assert chunk_rows * vocab <= largest.elements <= max(chunk_rows, hidden_size) * vocab


def test_training_step_never_holds_all_logits(monkeypatch) -> None:
    """The whole model, MTP included: no tensor of tokens x vocabulary exists, in no dtype."""
    monkeypatch.setattr(fused, "MIN_CHUNK_ROWS", 1)
    monkeypatch.setattr(fused, "CHUNK_ELEMENTS", 2 * 3000)
    model = build(tiny_config(vocab_size=3000)).train()
    with LargestTensor() as largest:
        model(tokens(2, 40), labels=tokens(2, 40), use_cache=False).loss.backward()
    assert largest.elements == 3000 * 64  # the table; the logits would be 2 x 40 x 3000


def test_shift_left() -> None:
    x = torch.arange(8).view(2, 4)
    assert shift_left(x, 1, -100).tolist() == [[1, 2, 3, -100], [5, 6, 7, -100]]
    assert shift_left(x, 4, 9).tolist() == shift_left(x, 6, 9).tolist() == [[9] * 4] * 2


def naive_balance(router_logits: torch.Tensor, top_k: int, mask: torch.Tensor) -> torch.Tensor:
    """Eq. 17-20 for each sequence; sequences weigh as many as they have tokens. `[B, S, E]`, `[B, S]`."""
    batch, length, experts = router_logits.shape
    total, count = torch.zeros((), dtype=torch.float64), 0
    for b in range(batch):
        real = [t for t in range(length) if mask[b, t]]
        affinity = {t: [torch.sigmoid(router_logits[b, t, i].double()) for i in range(experts)] for t in real}
        loss = torch.zeros((), dtype=torch.float64)
        for i in range(experts):
            among_best = [sorted(range(experts), key=lambda j: -affinity[t][j].item())[:top_k] for t in real]
            frequency = experts / (top_k * len(real)) * sum(i in best for best in among_best)
            mean_share = sum(affinity[t][i] / sum(affinity[t]) for t in real) / len(real)
            loss = loss + frequency * mean_share
        total, count = total + loss * len(real), count + len(real)
    return total / count


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("top_k", [1, 3])
def test_balance_loss_equals_the_equations(top_k: int, padded: bool) -> None:
    logits = (1.5 * torch.randn(3, 7, 6)).requires_grad_()
    mask = torch.ones(3, 7, dtype=torch.bool)
    if padded:
        mask[0, 4:], mask[1, :2] = False, False
    expected = naive_balance(logits, top_k, mask)
    found = sequence_balance_loss(logits.view(-1, 6), top_k, mask if padded else None, 3)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    (ours,), (theirs,) = torch.autograd.grad(found, logits), torch.autograd.grad(expected, logits)
    assert relative_error(ours, theirs) < 1e-5
    assert padded == (ours[~mask].numel() > 0) and not ours[~mask].any()


def test_balance_loss_of_uniform_and_of_collapsed_routing() -> None:
    assert sequence_balance_loss(torch.zeros(10, 8), 2, None, 2).item() == pytest.approx(1.0)
    rotating = torch.full((8, 8), -4.0)
    for t in range(8):
        rotating[t, [t, (t + 1) % 8]] = 4.0
    assert sequence_balance_loss(rotating, 2, None, 1).item() == pytest.approx(1.0)
    collapsed = torch.full((10, 8), -30.0)
    collapsed[:, 3:5] = 30.0
    assert sequence_balance_loss(collapsed, 2, None, 2).item() == pytest.approx(8 / 2)
    # balanced over the batch, but not within a sequence: this loss is sequence-wise
    collapsed[5:] = collapsed[5:].roll(2, dims=1)
    assert sequence_balance_loss(collapsed, 2, None, 2).item() == pytest.approx(8 / 2)


def test_balance_loss_of_padding_alone_is_zero() -> None:
    assert sequence_balance_loss(torch.randn(6, 8), 2, torch.zeros(2, 3), 2).item() == 0


def naive_layer(model, layer, states: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One decoder layer on one document `[1, T, H]` with an explicit causal mask; states, router logits `[T, E]`."""
    length = states.shape[1]
    mask = torch.full((length, length), torch.finfo(states.dtype).min).triu(1)[None, None]
    rotary = model.model.rotary_emb(states, positions)
    states = states + layer.self_attn(layer.input_layernorm(states), rotary, mask)[0]
    output, logits, _ = layer.mlp(layer.post_attention_layernorm(states))
    return states + output, logits


def naive_mtp(model, document, labels) -> tuple[list[list[torch.Tensor]], list[torch.Tensor]]:
    """Per depth the losses of one document's predicted positions, and the router logits of its tokens."""
    length = document.shape[0]
    states = model.model(document[None], use_cache=False).last_hidden_state
    all_losses, all_logits = [], []
    for k, layer in enumerate(model.mtp_layers, start=1):
        joined = []
        for i in range(length - k):  # position i joins its state with the embedding of token i + k
            embedding = layer.enorm(model.model.embed_tokens(document[i + k]))
            joined.append(layer.eh_proj(torch.cat((embedding, layer.hnorm(states[0, i])))))
        if not joined:  # a document shorter than the depth
            all_losses.append([])
            all_logits.append(torch.zeros(0, model.config.n_routed_experts))
            continue
        states, logits = naive_layer(model, layer, torch.stack(joined)[None], torch.arange(length - k)[None])
        losses_k = []
        for i in range(length - k - 1):  # and predicts token i + k + 1
            if labels[i + k + 1] != -100:
                prediction = model.lm_head(layer.shared_head.norm(states[0, i]))
                losses_k.append(F.cross_entropy(prediction[None], labels[i + k + 1][None]))
        all_losses.append(losses_k)
        all_logits.append(logits)
    return all_losses, all_logits


def naive_total(model, documents: list[torch.Tensor], labels: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """`ce + lambda mtp + alpha balance` of documents that are rows of their own, from the definitions above."""
    config = model.config
    ce, mtp = [], [[] for _ in model.mtp_layers]
    routed: list[list[torch.Tensor]] = []
    for document, target in zip(documents, labels, strict=True):
        output = model.model(document[None], use_cache=False, output_router_logits=True)
        logits = model.lm_head(output.last_hidden_state[0])
        predicted = [i for i in range(len(document) - 1) if target[i + 1] != -100]
        ce += [F.cross_entropy(logits[i][None], target[i + 1][None]) for i in predicted]
        losses_of, router_of = naive_mtp(model, document, target)
        for collected, new in zip(mtp, losses_of, strict=True):
            collected += new
        routed.append([*output.router_logits, *router_of])
    balance = torch.zeros((), dtype=torch.float64)
    for layer in zip(*routed, strict=True):
        layer = [x for x in layer if len(x)]
        terms = [naive_balance(x[None], config.num_experts_per_tok, torch.ones(1, len(x))) * len(x) for x in layer]
        balance = balance + torch.stack(terms).sum() / sum(len(x) for x in layer)
    ce_loss = torch.stack(ce).mean()
    mtp_loss = torch.stack([torch.stack(part).mean() for part in mtp]).mean()
    loss = ce_loss + config.mtp_loss_coef * mtp_loss + config.seq_balance_coef * balance
    return {"loss": loss, "ce_loss": ce_loss, "mtp_loss": mtp_loss, "balance_loss": balance}


def mtp_model(depth: int, **overrides):
    config = tiny_config(
        **{
            "num_nextn_predict_layers": depth,
            "num_hidden_layers": 2,
            "seq_balance_coef": 0.3,
            "mtp_loss_coef": 0.7,
            **overrides,
        }
    )
    return build(config).train()


def compare(model, inputs: dict, documents: list[torch.Tensor], labels: list[torch.Tensor]) -> None:
    output = model(**inputs, use_cache=False)
    output.loss.backward()
    found = gradients(model)
    expected = naive_total(model, documents, labels)
    expected["loss"].backward()
    for name, value in expected.items():
        if name != "balance_loss" or model.config.seq_balance_coef:
            assert getattr(output, name).item() == pytest.approx(value.item(), rel=2e-6), name
    assert_same_gradients(found, gradients(model), 2e-5)


@pytest.mark.parametrize("depth", [1, 2])
def test_losses_and_gradients_equal_the_definition(depth: int) -> None:
    rows, labels = tokens(2, 9), tokens(2, 9)
    labels[0, 3:5] = -100
    compare(mtp_model(depth), {"input_ids": rows, "labels": labels}, list(rows), list(labels))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("depth", [1, 2])
def test_padding_does_not_count(depth: int, side: str) -> None:
    documents = [tokens(9, seed=3), tokens(5, seed=4), tokens(7, seed=5)]
    ids, mask, labels = (torch.full((3, 9), fill) for fill in (0, 0, -100))
    for row, document in enumerate(documents):
        start = 9 - len(document) if side == "left" else 0
        where = slice(start, start + len(document))
        ids[row, where], mask[row, where] = document, 1
        # as in stock, a padding token before the first one would predict it
        labels[row, start + 1 : start + len(document)] = document[1:]
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    compare(mtp_model(depth), inputs, documents, documents)


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
def test_packed_documents_equal_separate_ones(depth: int, with_mask: bool) -> None:
    """As `data.packing` makes them, and with documents too short for the deeper MTP module."""
    documents = [tokens(6, seed=3), tokens(2, seed=4), tokens(3, seed=5), tokens(8, seed=6)]
    ids = torch.cat(documents)[None]
    labels = torch.cat([torch.cat((torch.tensor([-100]), document[1:])) for document in documents])[None]
    position_ids = torch.cat([torch.arange(len(document)) for document in documents])[None]
    inputs = {"input_ids": ids, "labels": labels, "position_ids": position_ids}
    if with_mask:  # two tokens of padding, which continue the last document's positions
        inputs = {
            "input_ids": F.pad(ids, (0, 2)),
            "labels": F.pad(labels, (0, 2), value=-100),
            "position_ids": torch.cat((position_ids, torch.tensor([[8, 9]])), dim=1),
            "attention_mask": F.pad(torch.ones_like(ids), (0, 2)),
        }
    # the balance loss is per row, whatever documents the row holds
    compare(mtp_model(depth, seq_balance_coef=0.0), inputs, documents, documents)


def test_mtp_never_crosses_a_document_whatever_the_labels_say() -> None:
    """Labels that are not masked at the first token of a document: only MTP knows the boundary from the positions."""
    model = mtp_model(2)
    documents = [tokens(6, seed=3), tokens(5, seed=4)]
    ids = torch.cat(documents)[None]
    position_ids = torch.cat([torch.arange(len(document)) for document in documents])[None]
    output = model(ids, labels=ids, position_ids=position_ids, use_cache=False)
    counts = [layer.mlp.gate.load_counts.sum().item() / 3 for layer in [model.model.layers[1], *model.mtp_layers]]
    assert counts == [11, 5 + 4, 4 + 3]
    expected = naive_total(model, documents, documents)["mtp_loss"]
    assert output.mtp_loss.item() == pytest.approx(expected.item(), rel=2e-6)


def test_embedding_and_head_learn_from_mtp_alone() -> None:
    model = mtp_model(1, seq_balance_coef=0.0)
    labels = tokens(1, 8)
    labels[0, 1:7] = -100  # one prediction of the main model, one of the MTP module
    results = {}
    for coefficient in (0.0, 1.0):
        model.config.mtp_loss_coef = coefficient
        output = model(tokens(1, 8), labels=labels, use_cache=False)
        assert (output.mtp_loss is None) == (coefficient == 0)
        output.loss.backward()
        results[coefficient] = gradients(model)
    missing = results[1.0].keys() - results[0.0].keys()  # without a coefficient the module is not even run
    assert missing == {name for name, _ in model.named_parameters() if name.startswith("model.layers.2.")}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert relative_error(results[1.0][name], results[0.0][name]) > 0.01, name


def test_total_is_the_sum_of_its_parts() -> None:
    model = mtp_model(2)
    output = model(tokens(2, 9), labels=tokens(2, 9), use_cache=False)
    parts = output.ce_loss + 0.7 * output.mtp_loss + 0.3 * output.balance_loss
    assert output.loss.item() == pytest.approx(parts.item(), rel=1e-6)
    assert not any(part.requires_grad for part in (output.ce_loss, output.mtp_loss, output.balance_loss))
    assert output.loss.requires_grad


def test_accumulated_micro_batches_equal_one_batch() -> None:
    """Of different length: without `num_items_in_batch` the short one would weigh too much."""
    model = mtp_model(2, seq_balance_coef=0.0)
    short, long = tokens(1, 5, seed=3), tokens(1, 12, seed=4)
    items = torch.tensor(4 + 11)
    ids, mask = torch.zeros(2, 12, dtype=torch.long), torch.zeros(2, 12, dtype=torch.long)
    ids[0, :5], ids[1] = short, long
    mask[0, :5], mask[1] = 1, 1
    labels = ids.masked_fill(mask == 0, -100)

    for step in (short, long):
        model(step, labels=step, num_items_in_batch=items, use_cache=False).loss.backward()
    accumulated = gradients(model)
    together = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=items, use_cache=False)
    together.loss.backward()
    assert_same_gradients(accumulated, gradients(model), 1e-5)
    # and the main loss is then the plain mean
    mean = model(ids, attention_mask=mask, labels=labels, use_cache=False)
    assert together.ce_loss.item() == pytest.approx(mean.ce_loss.item(), rel=1e-6)


def test_accumulated_balance_loss_equals_one_batch() -> None:
    model = mtp_model(1)
    rows, items = tokens(4, 8), 4 * 7
    for part in rows.split(1):
        model(part, labels=part, num_items_in_batch=items, use_cache=False).loss.backward()
    accumulated = gradients(model)
    model(rows, labels=rows, num_items_in_batch=items, use_cache=False).loss.backward()
    assert_same_gradients(accumulated, gradients(model), 1e-5)


def test_evaluation_is_cross_entropy_alone() -> None:
    model = mtp_model(1).eval()
    labels = tokens(2, 9)
    labels[1, 6:] = -100
    output = model(tokens(2, 9), labels=labels)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert output.loss.item() == output.ce_loss.item()
    assert output.mtp_loss is None and output.balance_loss is None


def test_shifted_labels_and_embedded_inputs_give_the_same_losses() -> None:
    model = mtp_model(2)
    rows, labels = tokens(2, 9), tokens(2, 9, seed=7)
    expected = model(rows, labels=labels, use_cache=False)
    shifted = model(rows, shift_labels=shift_left(labels, 1, -100), use_cache=False)
    embedded = model(inputs_embeds=model.model.embed_tokens(rows), labels=labels, use_cache=False)
    for name in ("loss", "ce_loss", "mtp_loss", "balance_loss"):
        assert getattr(shifted, name).item() == getattr(expected, name).item(), name
        assert getattr(embedded, name).item() == pytest.approx(getattr(expected, name).item(), rel=1e-6), name


@pytest.mark.parametrize("length", [1, 2, 5])
def test_nothing_to_predict_gives_zero_and_no_nan(length: int) -> None:
    model = mtp_model(2, seq_balance_coef=0.0)
    output = model(tokens(2, length), labels=torch.full((2, length), -100), use_cache=False)
    output.loss.backward()
    assert output.loss.item() == output.ce_loss.item() == output.mtp_loss.item() == 0
    assert not any(gradient.any() for gradient in gradients(model).values())


@pytest.mark.parametrize("length", [2, 3])
def test_rows_shorter_than_the_mtp_depth(length: int) -> None:
    model = mtp_model(2)
    output = model(tokens(2, length), labels=tokens(2, length), use_cache=False)
    output.loss.backward()
    assert output.loss.isfinite() and output.mtp_loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_logits_are_left_out_in_training_only_unless_asked_for() -> None:
    model = mtp_model(1)
    rows = tokens(2, 6)
    assert model(rows, labels=rows).logits is None
    assert model(rows, labels=rows, skip_logits=False).logits.shape == (2, 6, 97)
    assert model(rows).logits.shape == (2, 6, 97)
    assert model.eval()(rows, labels=rows).logits.shape == (2, 6, 97)
    assert model(rows, labels=rows, skip_logits=True).logits is None


@pytest.mark.parametrize("attention", ["eager", "sdpa", "deepseek_v3"])
def test_a_prepared_mask_trains_as_the_causal_one(attention: str) -> None:
    """`[B, 1, S, S]`: it says nothing of padding, so that every token counts."""
    config = tiny_config(seq_balance_coef=0.3, mtp_loss_coef=0.7)
    model = build(config, attn_implementation=attention).train()
    rows = tokens(2, 9)
    expected = model(rows, labels=rows, use_cache=False)
    visible = torch.ones(9, 9, dtype=torch.bool).tril().expand(2, 1, 9, 9)
    mask = torch.zeros(2, 1, 9, 9).masked_fill(~visible, torch.finfo(torch.float32).min)
    found = model(rows, attention_mask=mask, labels=rows, use_cache=False)
    for name in ("loss", "ce_loss", "mtp_loss", "balance_loss"):
        assert getattr(found, name).item() == pytest.approx(getattr(expected, name).item(), rel=2e-6), name
