"""Speculative decoding with MTP: it must write what plain `generate` writes, whatever the drafts are worth."""

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerFast, StaticCache, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_v3.modeling_deepseek_v3 import drafting, speculative
from deepseek_v3.modeling_deepseek_v3.speculative import MTPStats
from tests.modeling_deepseek_v3.helpers import build, tiny_config, tokens

GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@torch.no_grad()
def predictable(context: float, seed: int = 0, **config) -> DeepseekV3ForCausalLM:
    """A model whose MTP modules guess well: what follows depends on the last token, and on more of the text the
    larger `context` is. With 0, main model and modules predict the same from the same token."""
    model = build(tiny_config(**config), attn_implementation="sdpa", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    width = model.config.hidden_size
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.fill_(1.0)
        elif name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
            weight.mul_(context)
        elif name.endswith("eh_proj.weight"):
            weight.copy_(torch.eye(width, 2 * width) + context * torch.randn(weight.shape, generator=generator) / 8)
    return model


@torch.no_grad()
def simulate(model, prompt: int, text: torch.Tensor, number: int) -> tuple[MTPStats, list[list[int]]]:
    """What greedy speculation on `text [1, L]` must count and draft: computed from scratch, without caches.

    Module k at position i is given the state of depth k - 1 and token i + k, as in training; where those are not
    known, drafts stand for tokens, and the module's own output one position earlier for the state."""
    stats, rounds = MTPStats([0] * number, [0] * number), []
    length, end, layers = prompt + 1, text.shape[1], model.mtp_layers[:number]
    main_states = model.model(text).last_hidden_state
    while length < end:
        drafts = text[:, :length]
        inputs = output = main_states[:, : length - 1]
        wanted = min(number, end - length - 1)
        for k in range(1, wanted + 1):
            layer = layers[min(k, len(layers)) - 1]
            inputs = torch.cat((inputs, output[:, -1:]), dim=1) if k > len(layers) else output
            depth = min(k, len(layers))
            columns = inputs.shape[1]
            output, *_ = layer(
                inputs,
                model.model.embed_tokens(drafts[:, depth : depth + columns]),
                attention_mask=torch.ones(columns, columns, dtype=torch.bool).tril()[None, None],
                position_embeddings=model.model.rotary_emb(inputs, torch.arange(columns)[None]),
            )
            draft = model.lm_head(layer.shared_head(output[:, -1:])).argmax(-1)
            drafts = torch.cat((drafts, draft), dim=1)
        rounds += [drafts[0, length:].tolist()] if wanted else []
        guesses, truth = drafts[0, length:].tolist(), text[0, length:].tolist()
        accepted = next((i for i, guess in enumerate(guesses) if guess != truth[i]), len(guesses))
        stats.forwards += 1
        stats.row_forwards += 1
        stats.tokens += accepted + 1
        for place in range(wanted):
            stats.drafted[place] += 1
            stats.accepted[place] += accepted > place
        length += accepted + 1
    return stats, rounds


def padded(batch: int, length: int = 9) -> dict[str, torch.Tensor]:
    """Prompts with left padding in every row but the second; for `batch=1` that one."""
    ids, mask = tokens(max(batch, 2), length), torch.ones(max(batch, 2), length, dtype=torch.long)
    for row in range(len(ids)):
        mask[row, : (row - 1) % 4 * 2] = 0
    ids = ids.masked_fill(mask == 0, 0)
    return {"input_ids": ids[-batch:], "attention_mask": mask[-batch:]}


def speculate(model, inputs, number, **kwargs):
    return model.generate(**inputs, use_mtp=True, num_mtp_draft=number, return_dict_in_generate=True, **kwargs)


@pytest.fixture(scope="module")
def models() -> dict[int, DeepseekV3ForCausalLM]:
    """By number of MTP modules; their guesses are right about half of the time."""
    return {1: predictable(0.2), 2: predictable(0.15, seed=3, num_nextn_predict_layers=2)}


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("modules", [1, 2])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    "processors", [{}, {"no_repeat_ngram_size": 2}, {"repetition_penalty": 1.3, "min_new_tokens": 5}]
)
def test_greedy_text_is_that_of_plain_generate(models, number, modules, batch, processors):
    model, inputs = models[modules], padded(batch)
    arguments = {**GREEDY, "max_new_tokens": 22, **processors}
    output = speculate(model, inputs, number, **arguments)
    assert torch.equal(output.sequences, model.generate(**inputs, **arguments))
    if batch > 1 and not processors:  # the text was right while some drafts were accepted and some were not
        assert 0.2 < output.mtp_stats.acceptance[0] < 0.98


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "deepseek_v3"])
@pytest.mark.parametrize("absorb", [True, False])
def test_greedy_text_with_either_attention(models, implementation, absorb, monkeypatch):
    model, inputs = models[1], padded(3)
    arguments = {**GREEDY, "max_new_tokens": 12}
    expected = model.generate(**inputs, **arguments)
    monkeypatch.setattr(model.config, "_attn_implementation", implementation)
    if not absorb:
        monkeypatch.setattr(type(model.model.layers[0].self_attn), "_absorbs", lambda *_: False)
    assert torch.equal(speculate(model, inputs, 2, **arguments).sequences, expected)


@pytest.mark.parametrize("modules, seed", [(1, 0), (2, 3), (3, 0)])
@pytest.mark.parametrize("context", [0.2, 2.0])  # some drafts are accepted; drafts depend on all of the text
@pytest.mark.parametrize("number", [1, 2, 4])
def test_drafts_are_those_of_the_modules_as_trained(modules, context, seed, number, monkeypatch):
    model = predictable(context, seed, num_nextn_predict_layers=modules)
    rounds, draft = [], drafting.MTPDrafter.draft

    def record(*args):
        rounds.append(draft(*args))
        return rounds[-1]

    monkeypatch.setattr(drafting.MTPDrafter, "draft", record)
    output = speculate(model, {"input_ids": tokens(1, 7)}, number, max_new_tokens=30, **GREEDY)
    stats, expected = simulate(model, 7, output.sequences, number)
    assert output.mtp_stats == stats and [drafts[0].tolist() for drafts in rounds] == expected
    if context < 1:
        assert 0 < sum(stats.accepted) < sum(stats.drafted)


def test_statistics_of_perfect_and_of_hopeless_modules():
    model, inputs = predictable(0.0), padded(3)
    stats = speculate(model, inputs, 3, max_new_tokens=1 + 4 * 4, **GREEDY).mtp_stats
    assert stats == MTPStats([12, 12, 12], [12, 12, 12], forwards=4, row_forwards=12, tokens=48)
    assert stats.acceptance == [1, 1, 1] and stats.tokens_per_forward == 4
    with torch.no_grad():
        model.mtp_layers[0].shared_head.norm.weight.fill_(-1.0)  # the least likely token
    stats = speculate(model, inputs, 2, max_new_tokens=6, **GREEDY).mtp_stats
    assert stats == MTPStats([12, 9], [0, 0], forwards=5, row_forwards=15, tokens=15)
    assert stats.tokens_per_forward == 1


@pytest.mark.parametrize("modules", [1, 2])
def test_statistics_count_no_finished_rows(models, modules):
    model, inputs = models[modules], padded(4)
    plain = model.generate(**inputs, max_new_tokens=20, **GREEDY)
    arguments = {**GREEDY, "eos_token_id": plain[1, 14].item(), "max_new_tokens": 20}
    together = speculate(model, inputs, 3, **arguments)
    rows = [{name: x[i : i + 1] for name, x in inputs.items()} for i in range(4)]
    alone = [speculate(model, row, 3, **arguments) for row in rows]
    assert len({output.sequences.shape for output in alone}) > 1
    for name in ("row_forwards", "tokens"):
        assert getattr(together.mtp_stats, name) == sum(getattr(output.mtp_stats, name) for output in alone)
    for name in ("drafted", "accepted"):
        counts = [getattr(output.mtp_stats, name) for output in alone]
        assert getattr(together.mtp_stats, name) == [sum(count) for count in zip(*counts, strict=True)]
    assert together.mtp_stats.forwards == max(output.mtp_stats.forwards for output in alone)


@pytest.mark.parametrize("place", range(10, 16))
def test_eos_inside_an_accepted_run(place):
    model, inputs = predictable(0.0), padded(4)
    plain = model.generate(**inputs, max_new_tokens=20, **GREEDY)
    arguments = {**GREEDY, "max_new_tokens": 20, "eos_token_id": [plain[1, place].item(), 3]}
    expected = model.generate(**inputs, **arguments)
    assert torch.equal(speculate(model, inputs, 3, **arguments).sequences, expected)
    only = {name: x[1:2] for name, x in inputs.items()}
    output = speculate(model, only, 3, **arguments)
    assert torch.equal(output.sequences, model.generate(**only, **arguments))
    assert output.past_key_values.get_seq_length() == output.sequences.shape[1] - 1


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6])
def test_length_limits(models, length):
    inputs = padded(3)
    for arguments in ({"max_new_tokens": length}, {"max_length": 9 + length}):
        expected = models[1].generate(**inputs, **GREEDY, **arguments)
        output = speculate(models[1], inputs, 3, **GREEDY, **arguments).sequences
        assert output.shape[1] == 9 + length and torch.equal(output, expected)


class StopAt(StoppingCriteria):
    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


def test_stopping_criteria_and_stop_strings():
    model, inputs = predictable(0.0), padded(1)
    plain = model.generate(**inputs, max_new_tokens=20, **GREEDY)
    for place in (10, 12, 13, 14):
        criteria = [StopAt(plain[0, place].item())]
        output = speculate(model, inputs, 4, max_new_tokens=20, stopping_criteria=criteria, **GREEDY).sequences
        assert torch.equal(output, model.generate(**inputs, max_new_tokens=20, stopping_criteria=criteria, **GREEDY))
        assert output.shape[1] <= place + 1
    letters = [chr(33 + i) for i in range(94)] + ["À", "Á", "Â"]
    backend = Tokenizer(BPE({letter: i for i, letter in enumerate(letters)}, merges=[]))
    backend.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    string = letters[plain[0, 12]] + letters[plain[0, 13]]
    stop = {"stop_strings": string, "tokenizer": tokenizer, "max_new_tokens": 20}
    output = speculate(model, inputs, 4, **stop, **GREEDY).sequences
    assert torch.equal(output, plain[:, :14]) and torch.equal(output, model.generate(**inputs, **stop, **GREEDY))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("modules", [1, 2])
def test_a_second_turn_on_a_prefilled_cache(models, batch, modules):
    model, inputs = models[modules], padded(batch)
    eos = {**GREEDY, "eos_token_id": 40, "max_new_tokens": 12}
    plain = model.generate(**inputs, **eos, return_dict_in_generate=True)
    ours = speculate(model, inputs, 3, **eos)
    assert torch.equal(ours.sequences, plain.sequences)
    more = tokens(batch, 5, seed=7)
    text = torch.cat((plain.sequences, more), dim=1)
    mask = torch.cat((inputs["attention_mask"], (plain.sequences != 0).long()[:, 9:], torch.ones_like(more)), dim=1)
    arguments = {"attention_mask": mask, "max_new_tokens": 12, **GREEDY}
    scratch = model.generate(text, **arguments)

    # the cache of the first turn: our own, and one that plain generation filled
    for first in (ours, plain):
        output = speculate(model, {"input_ids": text}, 2, past_key_values=first.past_key_values, **arguments)
        assert output.past_key_values is first.past_key_values
        assert output.past_key_values.get_seq_length() == output.sequences.shape[1] - 1
        assert torch.equal(output.sequences, scratch)

    # only the new tokens, with the mask of the whole text
    cache = DynamicCache(config=model.config)
    known = plain.sequences.shape[1]
    model(
        text[:, :known],
        attention_mask=mask[:, :known],
        position_ids=(mask.cumsum(1) - 1)[:, :known].clamp(min=0),
        past_key_values=cache,
    )
    output = speculate(model, {"input_ids": more}, 2, past_key_values=cache, **arguments)
    assert torch.equal(output.sequences, scratch[:, known:])


def test_the_returned_cache_is_that_of_plain_generate(models, monkeypatch):
    model, inputs = models[1], padded(4)
    packed = []
    pack = drafting.RaggedCache.pack
    monkeypatch.setattr(drafting.RaggedCache, "pack", lambda self: (packed.append(self.kept.shape[1]), pack(self)))
    plain = model.generate(**inputs, max_new_tokens=40, **GREEDY, return_dict_in_generate=True)
    ours = speculate(model, inputs, 4, max_new_tokens=40, **GREEDY)
    assert len(packed) > 2 and torch.equal(ours.sequences, plain.sequences)  # in between, not only at the end
    for layer, expected in zip(ours.past_key_values.layers, plain.past_key_values.layers, strict=True):
        torch.testing.assert_close(layer.keys, expected.keys, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(layer.values, expected.values, atol=1e-5, rtol=1e-4)


def test_after_saving_and_loading(models, tmp_path):
    model, inputs = models[2], padded(2)
    expected = speculate(model, inputs, 3, max_new_tokens=15, **GREEDY)
    model.save_pretrained(tmp_path)
    loaded = DeepseekV3ForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    output = speculate(loaded, inputs, 3, max_new_tokens=15, **GREEDY)
    assert torch.equal(output.sequences, expected.sequences) and output.mtp_stats == expected.mtp_stats


def test_the_number_of_drafts_is_saved(tmp_path):
    model = build(attn_implementation="sdpa")
    model.generation_config.use_mtp, model.generation_config.num_mtp_draft = True, 3
    model.save_pretrained(tmp_path)
    loaded = DeepseekV3ForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    for each in (model, loaded):
        output = each.generate(**padded(1), max_new_tokens=5, return_dict_in_generate=True, **GREEDY)
        assert len(output.mtp_stats.drafted) == 3


def test_scores_and_logits_are_those_of_plain_generate(models):
    model, inputs = models[1], padded(3)
    arguments = {
        **GREEDY,
        "max_new_tokens": 10,
        "repetition_penalty": 1.2,
        "output_scores": True,
        "output_logits": True,
    }
    plain = model.generate(**inputs, **arguments, return_dict_in_generate=True)
    ours = speculate(model, inputs, 2, **arguments)
    for name in ("scores", "logits"):
        found, expected = (torch.stack(getattr(output, name)) for output in (ours, plain))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


class Collect(BaseStreamer):
    def __init__(self) -> None:
        self.parts, self.ended = [], False

    def put(self, value):
        self.parts.append(value.flatten())

    def end(self):
        self.ended = True


def test_streamer(models):
    streamer = Collect()
    output = speculate(models[1], padded(1), 3, max_new_tokens=15, streamer=streamer, **GREEDY)
    assert streamer.ended and torch.equal(torch.cat(streamer.parts), output.sequences[0])
    assert [len(part) for part in streamer.parts] == [9] + [1] * 15
    with pytest.raises(ValueError, match="streamer: found a batch of 2"):
        speculate(models[1], padded(2), 3, max_new_tokens=15, streamer=Collect(), **GREEDY)


def test_other_ways_to_ask(models):
    model, inputs = models[1], padded(2)
    expected = model.generate(**inputs, max_new_tokens=9, **GREEDY)
    config = GenerationConfig(max_new_tokens=9, use_mtp=True, num_mtp_draft=2, **GREEDY)
    assert torch.equal(model.generate(**inputs, generation_config=config), expected)
    output = model.generate(**inputs, generation_config=config, return_dict_in_generate=True)
    assert len(output.mtp_stats.drafted) == 2
    for number, drafts in ((None, 1), (np.int64(2), 2)):  # None: as many as the model has modules
        config = GenerationConfig(max_new_tokens=9, use_mtp=True, num_mtp_draft=number, **GREEDY)
        output = model.generate(**inputs, generation_config=config, return_dict_in_generate=True)
        assert len(output.mtp_stats.drafted) == drafts
        assert len(speculate(model, inputs, number, max_new_tokens=9, **GREEDY).mtp_stats.drafted) == drafts
    assert torch.equal(
        speculate(model, inputs, 2, max_new_tokens=9, prefill_chunk_size=4, **GREEDY).sequences, expected
    )
    assert torch.equal(model.generate(**inputs, max_new_tokens=9, use_mtp=True, **GREEDY), expected)
    several = model.generate(**inputs, max_new_tokens=4, use_mtp=True, do_sample=True, num_return_sequences=3)
    assert several.shape == (6, 13)
    ids = inputs["input_ids"].clone()
    speculate(model, inputs, 2, max_new_tokens=9, **GREEDY)
    assert torch.equal(inputs["input_ids"], ids)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_beams": 4}, "generation mode: found 'beam_search'"),
        ({"cache_implementation": "static"}, "cache_implementation: found 'static'"),
        ({"cache_implementation": "quantized"}, "cache_implementation: found 'quantized'"),
        ({"use_cache": False}, "use_cache: found False"),
        ({"num_mtp_draft": 0}, "num_mtp_draft: found 0"),
        ({"num_mtp_draft": 1.5}, "num_mtp_draft: found 1.5"),
        ({"num_mtp_draft": True}, "num_mtp_draft: found True"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens: found 3"),
        ({"guidance_scale": 2.0}, "guidance_scale: found 2.0"),
        ({"output_attentions": True}, "output_attentions: found True"),
        ({"synced_gpus": True}, "synced_gpus: found True"),
        ({"use_mtp": False, "num_mtp_draft": 2}, "num_mtp_draft: found without use_mtp"),
    ],
)
def test_what_it_cannot_do_is_an_error(models, arguments, message):
    with pytest.raises(ValueError, match=message):
        models[1].generate(**padded(1), **{"use_mtp": True, "max_new_tokens": 4, **arguments})


def test_models_and_caches_it_cannot_use(models):
    model, inputs = models[1], padded(1)
    arguments = {**inputs, "use_mtp": True, "max_new_tokens": 4}
    with pytest.raises(ValueError, match="assistant_model: found 'DeepseekV3ForCausalLM'"):
        model.generate(**arguments, assistant_model=model)
    with pytest.raises(ValueError, match="past_key_values: found StaticCache of"):
        model.generate(**arguments, past_key_values=StaticCache(config=model.config, max_cache_len=20))
    with pytest.raises(ValueError, match="num_nextn_predict_layers: found 0"):
        build(tiny_config(num_nextn_predict_layers=0)).generate(**arguments)
    dynamic = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
    with pytest.raises(ValueError, match="rope_type: found 'dynamic', with use_mtp=True allowed 'default'"):
        build(tiny_config(rope_parameters=dynamic)).generate(**arguments)
    full = model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True, **GREEDY).past_key_values
    with pytest.raises(ValueError, match="input_ids: found 9 tokens with 9 in past_key_values"):
        model.generate(**arguments, past_key_values=full)
    with pytest.raises(ValueError, match=r"generate: found \['inputs_embeds'\]"):
        model.generate(inputs_embeds=torch.zeros(1, 3, 64), use_mtp=True, max_new_tokens=4)


def law_p_value(model: DeepseekV3ForCausalLM, number: int, length: int, rows: int, **warpers) -> float:
    """Chi-square test of `rows` sampled continuations of one prompt against the model's exact law of them."""
    vocab, prompt = model.config.vocab_size, torch.tensor([[2, 1]])
    texts, law = prompt, torch.ones(1, dtype=torch.double)
    for _ in range(length):
        logits = model(texts, logits_to_keep=1).logits[:, -1] / warpers.get("temperature", 1.0)
        if top_k := warpers.get("top_k"):
            logits = logits.masked_fill(logits < logits.topk(top_k)[0][:, -1:], float("-inf"))
        law = (law[:, None] * logits.double().softmax(-1)).flatten()
        texts = torch.cat((texts.repeat_interleave(vocab, 0), torch.arange(vocab).repeat(len(texts))[:, None]), dim=1)
    arguments = {"do_sample": True, "max_new_tokens": length, "eos_token_id": None, "pad_token_id": 0, "top_k": 0}
    output = speculate(model, {"input_ids": prompt.expand(rows, -1)}, number, **{**arguments, **warpers})
    assert 0.1 < output.mtp_stats.acceptance[0] < 0.9
    place = (output.sequences[:, 2:] * vocab ** torch.arange(length - 1, -1, -1)).sum(1)
    counts = torch.bincount(place, minlength=len(law)).double()
    assert counts[law == 0].sum() == 0
    common = law * rows >= 5  # the rare ones count as one
    observed = torch.cat((counts[common], counts[~common].sum()[None]))
    expected = torch.cat((law[common], law[~common].sum()[None])) * rows
    kept = expected > 0
    statistic = ((observed - expected)[kept] ** 2 / expected[kept]).sum().item()
    return float(chi2.sf(statistic, int(kept.sum()) - 1))


SAMPLED = {"vocab_size": 6, "bos_token_id": None, "eos_token_id": None}


@pytest.mark.parametrize("modules, number", [(1, 1), (1, 2), (2, 2)])
def test_sampling_follows_the_law_of_the_model(modules, number):
    model = predictable(0.5, seed=1, num_nextn_predict_layers=modules, **SAMPLED)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.7)
    assert law_p_value(model, number, 4, 8_000) > 1e-3
    if number == 2:
        assert law_p_value(model, number, 4, 8_000, temperature=0.8, top_k=4) > 1e-3


def test_a_wrong_rule_of_acceptance_is_noticed(monkeypatch):
    model = predictable(0.5, seed=1, **SAMPLED)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.7)
    right = speculative._accept

    def sample_again(scores, drafts, laws):  # from the model's law, not from what the draft's law left of it
        chosen, accepted = right(scores, drafts, laws)
        rows = torch.arange(len(drafts))
        chosen[rows, accepted] = scores.softmax(-1)[rows, accepted].multinomial(1)[:, 0]
        return chosen, accepted

    monkeypatch.setattr(speculative, "_accept", sample_again)
    assert law_p_value(model, 2, 4, 8_000) < 1e-6
