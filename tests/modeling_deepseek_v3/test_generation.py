"""Text generation: every way of decoding and every cache of transformers, against stock and against plain decoding."""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, QuantizedCache, StaticCache

from deepseek_v3.modeling_deepseek_v3.attention import DeepseekV3Attention
from tests.modeling_deepseek_v3.helpers import YARN, build, stock_twin, tiny_config, tokens

GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 16}


@pytest.fixture(scope="module")
def model():
    return build(attn_implementation="sdpa")


@pytest.fixture(scope="module")
def stock(model):
    return stock_twin(model)


@pytest.fixture
def absorbed(monkeypatch) -> list[bool]:
    """The decisions of every layer in every forward, whether to attend on the latents."""
    decisions, decide = [], DeepseekV3Attention._absorbs
    monkeypatch.setattr(
        DeepseekV3Attention, "_absorbs", lambda *args: (decisions.append(decide(*args)), decisions[-1])[1]
    )
    return decisions


def padded() -> dict[str, torch.Tensor]:
    ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[0, :4], mask[2, :7] = 0, 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def expand_always(monkeypatch) -> None:
    monkeypatch.setattr(DeepseekV3Attention, "_absorbs", lambda *args: False)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.7},
        {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
        {"do_sample": True, "num_beams": 3},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 4},
    ],
    ids=lambda arguments: "-".join(arguments) or "greedy",
)
def test_text_is_that_of_stock(model, stock, absorbed, arguments, seed):
    texts = []
    for generator in (model, stock):
        torch.manual_seed(seed)
        if arguments.get("cache_implementation") == "static":
            arguments = {**arguments, "disable_compile": True}
        texts.append(generator.generate(**padded(), **{**GREEDY, **arguments}))
    assert torch.equal(*texts)
    assert True in absorbed


def test_autocast_on_fp32_weights_is_as_close_to_fp32_as_stock_is(model, stock, absorbed):
    """The norm's fp32 weight makes the latent fp32, while queries and rotary key are bf16."""
    mask = F.pad(padded()["attention_mask"], (0, 15), value=1)
    with torch.autocast("cpu", torch.bfloat16):
        text = model.generate(**padded(), **GREEDY, output_logits=True, return_dict_in_generate=True)
        assert True not in absorbed
        theirs = stock(text.sequences[:, :-1], attention_mask=mask).logits[:, -16:]
    exact = stock(text.sequences[:, :-1], attention_mask=mask).logits[:, -16:]
    # the median, because one changed expert choice moves a whole token
    error, stock_error = ((x - exact).abs().median() for x in (torch.stack(text.logits, dim=1), theirs))
    assert 0 < error < 1.3 * stock_error


def test_autocast_on_weights_of_its_own_dtype_is_absorbed(absorbed):
    model = build(attn_implementation="sdpa").bfloat16()
    expected = model.generate(**padded(), **GREEDY)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.generate(**padded(), **GREEDY), expected)
    assert True in absorbed


@pytest.mark.parametrize("assistance", ["assistant_model", "prompt_lookup_num_tokens"])
@pytest.mark.parametrize("implementation", ["sdpa", "deepseek_v3", "eager"])
def test_assisted_decoding_changes_no_text(assistance, implementation, absorbed):
    model = build(
        tiny_config(vocab_size=11), attn_implementation=implementation
    )  # so few words that guesses come true
    ids = tokens(1, 8, vocab=11)
    expected = model.generate(ids, **GREEDY)
    if assistance == "assistant_model":
        value = copy.deepcopy(model)
        with torch.no_grad():
            value.lm_head.weight.add_(0.05 * torch.randn_like(value.lm_head.weight))
    else:
        value = 3
    absorbed.clear()
    assert torch.equal(model.generate(ids, **GREEDY, **{assistance: value}), expected)
    assert (True in absorbed) == (implementation != "eager")


@pytest.mark.parametrize("length", [1, 2, 5, 9])
@pytest.mark.parametrize("implementation", ["sdpa", "deepseek_v3", "eager"])
def test_static_cache_with_short_prompts(length, implementation, absorbed):
    """An empty static cache is longer than the prompt and comes without a mask: its slots are the future."""
    model = build(attn_implementation=implementation)
    ids = tokens(2, length)
    expected = model.generate(ids, **GREEDY)
    cache = StaticCache(config=model.config, max_cache_len=40)
    assert torch.equal(model.generate(ids, past_key_values=cache, disable_compile=True, **GREEDY), expected)
    assert (True in absorbed) == (implementation != "eager")
    whole = model(expected).logits[:, length - 1 :]
    cache = StaticCache(config=model.config, max_cache_len=40)
    logits = [model(ids, past_key_values=cache).logits[:, -1:]]
    logits += [model(expected[:, i : i + 1], past_key_values=cache).logits for i in range(length, expected.shape[1])]
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, atol=2e-4, rtol=1e-4)


# slow: quanto compiles a C++ extension on first use
@pytest.mark.parametrize("backend", [pytest.param("quanto", marks=pytest.mark.slow), "hqq", "fp8"])
def test_quantized_cache(model, stock, backend):
    """The latents are quantized as stock quantizes them: the same rounding, hence nearly the same logits."""
    # groups of 16 fit into the latent of 32, and of the tiny rotary key of 8 into two tokens
    options = {} if backend == "fp8" else {"nbits": 4, "q_group_size": 16, "residual_length": 4}
    if backend == "hqq":
        options |= {"axis_key": 1, "axis_value": 1}
    ids = tokens(2, 12)
    logits = []
    for generator in (model, stock):
        cache = QuantizedCache(backend, generator.config, **options)
        parts = [ids[:, :8], *ids[:, 8:].split(1, dim=1)]
        logits.append(torch.cat([generator(part, past_key_values=cache).logits for part in parts], dim=1))
    exact = model(ids).logits
    error = (logits[1] - exact).abs().max()
    assert error > 1e-3  # it does quantize
    torch.testing.assert_close(*logits, atol=2e-4, rtol=1e-3)
    settings = {"cache_implementation": "quantized", "cache_config": {"backend": backend, **options}}
    text = model.generate(ids, **GREEDY, **settings)
    assert torch.equal(text, stock.generate(ids, **GREEDY, **settings))


def test_left_padding_changes_no_text(model):
    inputs = padded()
    together = model.generate(**inputs, **GREEDY)
    for row, text in enumerate(together):
        real = inputs["attention_mask"][row].bool()
        alone = model.generate(inputs["input_ids"][row, real][None], **GREEDY)
        assert torch.equal(alone[0], text[int((~real).sum()) :])


def test_right_padding_changes_no_text_without_a_cache(model, stock):
    """The first new position is then 1: transformers counts on from the padding's 0."""
    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[0, 4:] = 0
    for generator in (model, stock):
        texts = [generator.generate(ids, attention_mask=mask, use_cache=cache, **GREEDY) for cache in (True, False)]
        assert torch.equal(*texts)
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), texts[0])


@pytest.mark.parametrize("implementation, absorb", [("sdpa", True), ("deepseek_v3", False)])
def test_compiled_decoding_step_on_a_static_cache(implementation, absorb, monkeypatch):
    model = build(attn_implementation=implementation)
    if not absorb:
        expand_always(monkeypatch)
    torch._dynamo.reset()
    ids = tokens(2, 6)
    expected = model.generate(ids, **GREEDY)
    cache = StaticCache(config=model.config, max_cache_len=24)
    step = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        text = [ids, model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)]
        for place in range(6, 21):
            position = torch.full((2, 1), place)
            logits = step(input_ids=text[-1], position_ids=position, past_key_values=cache).logits
            text.append(logits.argmax(-1))
    assert torch.equal(torch.cat(text, dim=1), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("rope", [{}, {"rope_parameters": YARN}], ids=["plain", "yarn"])
@pytest.mark.parametrize("implementation", ["sdpa", "deepseek_v3"])
@pytest.mark.parametrize("sizes", [{}, {"q_lora_rank": None, "v_head_dim": 24, "rope_interleave": False}])
def test_absorbed_equals_expanded(rope, implementation, sizes, absorbed, monkeypatch):
    model = build(tiny_config(**rope, **sizes), attn_implementation=implementation)
    ids, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, :11] = 0

    def logits(chunks: list[int]) -> torch.Tensor:
        cache, done, parts = DynamicCache(config=model.config), 0, []
        for size in chunks:
            place = slice(done, done + size)
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, place]
            done += size
            part = model(ids[:, place], attention_mask=mask[:, :done], position_ids=positions, past_key_values=cache)
            parts.append(part.logits)
        return torch.cat(parts, dim=1)[mask.bool()]

    whole = logits([40])
    assert True not in absorbed
    several = logits([20, 1, 3, 2, 5, 1, 8])
    assert True in absorbed
    expand_always(monkeypatch)
    torch.testing.assert_close(several, whole, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(logits([20, 1, 3, 2, 5, 1, 8]), several, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_chunked_prefill_equals_whole_prefill(model, chunk):
    whole = model.generate(**padded(), **GREEDY, return_dict_in_generate=True, output_logits=True)
    parts = model.generate(
        **padded(), **GREEDY, return_dict_in_generate=True, output_logits=True, prefill_chunk_size=chunk
    )
    assert torch.equal(parts.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(parts.logits), torch.stack(whole.logits), atol=2e-4, rtol=1e-4)


def test_the_cache_holds_latents_and_can_be_cropped_and_handed_over(model):
    ids = tokens(2, 12)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    shapes = [(tuple(layer.keys.shape), tuple(layer.values.shape)) for layer in cache.layers]
    assert shapes == [((2, 1, 12, model.config.kv_lora_rank), (2, 1, 12, model.config.qk_rope_head_dim))] * 3
    cache.crop(-5)
    expected = model(ids).logits[:, 7:]
    handed = DynamicCache(config=model.config)
    for place, layer in enumerate(cache.layers):
        handed.update(layer.keys.clone(), layer.values.clone(), place)
    for each in (cache, handed):
        torch.testing.assert_close(model(ids[:, 7:], past_key_values=each).logits, expected, atol=2e-4, rtol=1e-4)


class DoubledLinear(nn.Linear):
    """Stands for a quantized layer: the numbers it stores are not those it multiplies with."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def double_by_class(layer: nn.Linear) -> None:
    layer.__class__ = DoubledLinear


def double_by_hook(layer: nn.Linear) -> None:
    layer.register_forward_hook(lambda module, args, output: 2 * output)


def double_by_pre_hook(layer: nn.Linear) -> None:
    layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))


@pytest.mark.parametrize("change", [double_by_class, double_by_hook, double_by_pre_hook])
def test_a_changed_kv_b_proj_is_called_instead_of_read(change, absorbed):
    model, expected = build(attn_implementation="sdpa"), build(attn_implementation="sdpa")
    with torch.no_grad():
        for layer in range(3):
            expected.model.layers[layer].self_attn.kv_b_proj.weight.mul_(2)
            change(model.model.layers[layer].self_attn.kv_b_proj)
    assert torch.equal(model.generate(**padded(), **GREEDY), expected.generate(**padded(), **GREEDY))
    assert True in absorbed


@pytest.mark.parametrize("implementation", ["sdpa", "deepseek_v3"])
def test_lora_on_kv_b_proj(implementation, absorbed):
    model = build(attn_implementation=implementation)
    lora = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["kv_b_proj"], init_lora_weights=False)
    ).eval()
    changed = lora.generate(**padded(), **GREEDY)
    assert True not in absorbed
    with lora.disable_adapter():
        assert not torch.equal(lora.generate(**padded(), **GREEDY), changed)
    speculated = lora.generate(**padded(), **GREEDY, use_mtp=True, num_mtp_draft=2)
    assert torch.equal(speculated, changed)
    merged = lora.merge_and_unload()
    absorbed.clear()
    assert torch.equal(merged.generate(**padded(), **GREEDY), changed)
    assert True in absorbed


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes_kv_b_proj(bits, absorbed):
    bnb = pytest.importorskip("bitsandbytes")
    model = build(attn_implementation="sdpa")
    for layer in model.model.layers:
        weight = layer.self_attn.kv_b_proj.weight.data
        if bits == 8:
            quantized = bnb.nn.Linear8bitLt(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False)
            quantized.load_state_dict({"weight": weight}, strict=False)
        else:
            quantized = bnb.nn.Linear4bit(weight.shape[1], weight.shape[0], bias=False, quant_type="nf4")
            quantized.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        layer.self_attn.kv_b_proj = quantized.to("cpu")
    ids = tokens(2, 12)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        parts = [model(part, past_key_values=cache).logits for part in (ids[:, :7], *ids[:, 7:].split(1, dim=1))]
        whole = model(ids).logits
    # the rows of a batch are quantized together in 8 bits, so that how it is cut changes the rounding
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=0.2 if bits == 8 else 1e-2, rtol=0.05)
    assert True not in absorbed


def test_offloaded_cache(model):
    if not torch.cuda.is_available():
        pytest.skip("transformers' cache offloading needs CUDA streams")
    model = copy.deepcopy(model).cuda()
    ids = tokens(2, 9).cuda()
    offloaded = model.generate(ids, **GREEDY, cache_implementation="offloaded")
    assert torch.equal(offloaded, model.generate(ids, **GREEDY))


def test_the_kernel_attention_refuses_what_it_cannot_say():
    """Its masks are runs of keys: an unmasked hole in the middle of a prompt has to be an error, not a wrong text."""
    model = build(attn_implementation="deepseek_v3")
    mask = torch.ones(1, 9, dtype=torch.long)
    mask[0, 4] = 0
    with pytest.raises(ValueError, match="attention_mask: found one with holes"):
        model(tokens(1, 9), attention_mask=mask)
    model = build(tiny_config(attention_dropout=0.1), attn_implementation="deepseek_v3").train()
    with pytest.raises(ValueError, match="attention_dropout: found 0.1"):
        model(tokens(1, 9))
    model = build(attn_implementation="deepseek_v3")
    with pytest.raises(ValueError, match=r"attention_mask: found one of shape \[1, 4, 9, 9\]"):
        model(tokens(1, 9), attention_mask=torch.ones(1, 4, 9, 9, dtype=torch.bool).tril())


def test_one_mask_for_a_batch_is_that_of_every_row():
    mask = torch.ones(9, 9, dtype=torch.bool).tril_()
    mask[5:, :3] = False  # two documents
    logits = [
        build(attn_implementation=attention)(tokens(3, 9), attention_mask=mask[None, None], use_cache=False).logits
        for attention in ("deepseek_v3", "sdpa")
    ]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


def test_a_mask_for_each_head_while_decoding(model):
    """The absorbed form takes one mask for all heads; those of the heads here differ in what they forget."""
    ids, heads = tokens(2, 12), model.config.num_attention_heads
    mask = torch.ones(2, heads, 12, 12, dtype=torch.bool).tril_()
    for head in range(heads):
        mask[:, head, 8:, :head] = False
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        found = [model(ids[:, :8], attention_mask=mask[:, :, :8, :8], past_key_values=cache).logits]
        for i in range(8, 12):
            step = mask[:, :, i : i + 1, : i + 1]
            found.append(model(ids[:, i : i + 1], attention_mask=step, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=1e-4, rtol=1e-4)
