"""Speculative decoding with the model's own MTP layers (paper 5.4.3): `generate(use_mtp=True, num_mtp_draft=K)`.

A round drafts K tokens with the MTP layers and checks them in one forward of the main model over K + 1 tokens: the
last token of the text and the K drafts. Accepted drafts and one token of the main model's own are appended. Drafts are
accepted by Algorithm 1 of arXiv 2211.17192, so the text follows the law of plain `generate`: the same tokens when
greedy (in exact arithmetic: in bf16 a tie may fall the other way), the same distribution when sampling.

Worked example, K = 2, one MTP module, one row with the text t0..t4. The cache holds t0..t3, the state h3 is known.

    MTP at position 3: (h3, t4) -> draft d5
    MTP at position 4: (s3, d5) -> draft d6         its own output s3 in the place of h4; later dropped from its cache
    main model on t4 d5 d6: d5 accepted, d6 not     t5 = d5, t6 from the main model; the slot of d6 is dropped
    next round, MTP at positions 4 and 5: (h4, t5), (h5, t6) -> draft d7

Shape legend: B rows, K drafts, V vocabulary.
"""

from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicLayer
from transformers.generation import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .drafting import MTPDrafter, RaggedCache, Text, left_align

if TYPE_CHECKING:
    from .heads import DeepseekV3ForCausalLM


@dataclass
class MTPStats:
    """What speculation gained in one call of `generate`. Rows that have finished are not counted.

    Attributes:
        drafted: per draft position, how many drafts were checked; drafts past a row's length limit are not counted.
        accepted: per draft position, how many of them were accepted, with all drafts before them.
        forwards: forwards of the main model after the prefill.
        row_forwards: the same, summed over the rows that were unfinished in each.
        tokens: tokens that these forwards appended, over all rows.
    """

    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    forwards: int = 0
    row_forwards: int = 0
    tokens: int = 0

    @property
    def acceptance(self) -> list[float]:
        """Accepted share per draft position, NaN where nothing was drafted."""
        pairs = zip(self.accepted, self.drafted, strict=True)
        return [accepted / drafted if drafted else float("nan") for accepted, drafted in pairs]

    @property
    def tokens_per_forward(self) -> float:
        """Tokens that a row gains per forward of the main model: 1 without speculation, at most K + 1."""
        return self.tokens / self.row_forwards if self.row_forwards else float("nan")

    def count(
        self, active: torch.Tensor, usable: torch.Tensor, accepted: torch.Tensor, appended: torch.Tensor
    ) -> None:
        """Add one forward; all `[B]`: unfinished rows, and how many drafts they could use, accepted and appended."""
        self.forwards += 1
        self.row_forwards += int(active.sum())
        self.tokens += int(appended.sum())
        for place in range(len(self.drafted)):
            checked = active & (usable > place)
            self.drafted[place] += int(checked.sum())
            self.accepted[place] += int((checked & (accepted > place)).sum())


@dataclass
class GenerateMTPOutput(GenerateDecoderOnlyOutput):
    """`GenerateDecoderOnlyOutput` plus `mtp_stats`. In `scores` and `logits` a row is zeros after its end."""

    mtp_stats: MTPStats | None = None


class MTPGenerationMixin(GenerationMixin):
    """`generate` with two more arguments, which may also stand in the generation configuration.

    `use_mtp=True` decodes speculatively with the MTP layers: any batch size, left padding, greedy or sampling, and a
    `past_key_values` that covers a prefix (drafts do not see that prefix: same text, fewer of them accepted).
    `num_mtp_draft=K` is the number of drafts per round, by default the number of MTP layers; beyond that, the last
    layer goes on with its own output. With `return_dict_in_generate=True` the result is a `GenerateMTPOutput`, whose
    `mtp_stats` report the acceptance per draft position.

    Logits processors and stopping criteria have to be functions of their arguments. They are called on all rows, once
    per text length, and what they return for rows of another length is not used; criteria get `None` as scores.

    Raises:
        ValueError: the model has no MTP layers, or an argument that speculation cannot serve; names what is allowed.
    """

    def _extract_generation_mode_kwargs(self, custom_generate, kwargs, *args, **more) -> dict[str, Any]:
        number = kwargs.pop("num_mtp_draft", None)
        mode_kwargs = super()._extract_generation_mode_kwargs(custom_generate, kwargs, *args, **more)
        return mode_kwargs if number is None else {**mode_kwargs, "num_mtp_draft": number}

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs) -> None:
        if generation_config.use_mtp:
            _check_arguments(self, generation_mode, generation_config, generation_mode_kwargs)
        elif "num_mtp_draft" in generation_mode_kwargs:
            raise ValueError("num_mtp_draft: found without use_mtp, allowed with use_mtp=True")
        else:
            super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    # `use_mtp` makes `generate` choose assisted decoding, whose loop this is.
    def _assisted_decoding(self, input_ids, generation_config, inputs_tensor=None, **kwargs):
        if generation_config.use_mtp:
            return _decode(self, input_ids, generation_config, **kwargs)
        return super()._assisted_decoding(
            input_ids, generation_config=generation_config, inputs_tensor=inputs_tensor, **kwargs
        )


def _number_of_drafts(model: Any, config: GenerationConfig, argument: Any) -> Any:
    """Most drafts per round: the argument of `generate`, else the configured number, else one for each MTP layer."""
    configured = getattr(config, "num_mtp_draft", None) if argument is None else argument
    return model.config.num_nextn_predict_layers if configured is None else configured


def _check_arguments(model: Any, mode: GenerationMode, config: GenerationConfig, mode_kwargs: dict[str, Any]) -> None:
    """`ValueError` for what this loop cannot do."""

    def check(name: str, found: Any, ok: bool, allowed: str) -> None:
        if not ok:
            raise ValueError(f"{name}: found {found!r}, with use_mtp=True allowed {allowed}")

    layers = model.config.num_nextn_predict_layers
    check("num_nextn_predict_layers", layers, layers > 0, "1 or more: a model with MTP layers")
    rope_type = model.config.rope_parameters["rope_type"]
    fixed = "'default', 'linear' and 'yarn': with 'dynamic' the angles follow the highest position of a forward"
    check("rope_type", rope_type, rope_type != "dynamic", fixed)
    number = _number_of_drafts(model, config, mode_kwargs.get("num_mtp_draft"))
    integral = isinstance(number, Integral) and not isinstance(number, bool)
    check("num_mtp_draft", number, integral and number > 0, "a positive int")
    assisted = mode == GenerationMode.ASSISTED_GENERATION
    check("generation mode", mode.value, assisted, "greedy search and sampling (num_beams=1, no constraints)")
    for name in ("assistant_model", "assistant_tokenizer"):
        check(name, type(mode_kwargs.get(name)).__name__, mode_kwargs.get(name) is None, "None")
    for name in ("prompt_lookup_num_tokens", "assistant_early_exit", "watermarking_config"):
        check(name, getattr(config, name), getattr(config, name) is None, "None")
    check("guidance_scale", config.guidance_scale, config.guidance_scale in (None, 1), "None")
    cache = config.cache_implementation
    check("cache_implementation", cache, cache in (None, "dynamic"), "'dynamic'")
    check("use_cache", config.use_cache, config.use_cache is not False, "True")
    for name in ("output_attentions", "output_hidden_states"):
        check(name, getattr(config, name), not getattr(config, name), "False")
    synced = mode_kwargs.get("synced_gpus")
    check("synced_gpus", synced, not synced, "False (no ZeRO-3 or FSDP over several processes)")
    checkpointing = model.training and model.is_gradient_checkpointing
    check("gradient checkpointing in training mode", checkpointing, not checkpointing, "after model.eval()")


def _accept(
    scores: torch.Tensor, drafts: torch.Tensor, laws: list[torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Algorithm 1 of arXiv 2211.17192: processed logits `scores [B, K+1, V]`, `drafts [B, K]` and the laws they were
    drawn from, K x `[B, V]` (None: greedy) -> tokens `[B, K+1]` and `accepted [B]`; the first `accepted + 1` count.
    """
    if laws is None:
        tokens = scores.argmax(dim=-1)
        return tokens, (tokens[:, :-1] == drafts).long().cumprod(dim=1).sum(dim=1)
    rows = torch.arange(len(drafts), device=drafts.device)
    target = scores.softmax(dim=-1)
    draft = torch.stack([*laws, torch.zeros_like(target[:, 0])], dim=1)  # nothing was drafted behind the last
    index = drafts[:, :, None]
    matches = torch.rand(index.shape, device=index.device) * draft[:, :-1].gather(2, index)
    matches = (matches < target[:, :-1].gather(2, index))[:, :, 0]
    accepted = matches.long().cumprod(dim=1).sum(dim=1)
    own = target[rows, accepted]
    residual = (own - draft[rows, accepted]).clamp(min=0)
    # equal laws reject only by rounding, and then leave no residual
    residual = torch.where(residual.sum(dim=1, keepdim=True) > 0, residual, own)
    tokens = F.pad(drafts, (0, 1))
    tokens[rows, accepted] = torch.multinomial(residual, 1)[:, 0]
    return tokens, accepted


def _uncached_prompt(
    input_ids: torch.Tensor, cache: Any, config: GenerationConfig, attention_mask: torch.Tensor | None
) -> tuple[int, torch.Tensor]:
    """How many tokens of the prompt to prefill, and the bool mask `[B, past + these]`. The rule is that of `generate`:
    `input_ids` are the whole text, or only its new part if the attention mask is longer."""
    layers = getattr(cache, "layers", None)
    offloading = getattr(cache, "offloading", False)
    if layers is None or offloading or any(type(layer) is not DynamicLayer for layer in layers):
        kinds = sorted({type(layer).__name__ for layer in layers or ()})
        found = f"{type(cache).__name__} of {kinds}{' with offloading' if offloading else ''}"
        raise ValueError(f"past_key_values: found {found}, with use_mtp=True allowed a plain DynamicCache")
    batch, length = input_ids.shape
    past = cache.get_seq_length()
    total = getattr(config, "_mask_length", length) if attention_mask is None else attention_mask.shape[1]
    new = length - past if total == length else length
    if new < 1:
        raise ValueError(f"input_ids: found {length} tokens with {past} in past_key_values, allowed more than those")
    if attention_mask is None:
        return new, torch.ones(batch, past + new, dtype=torch.bool, device=input_ids.device)
    if total != past + new:
        raise ValueError(f"attention_mask: found length {total}, allowed {past + new}: past_key_values and input_ids")
    return new, attention_mask.bool()


def _decode(
    model: "DeepseekV3ForCausalLM",
    input_ids: torch.Tensor,
    generation_config: GenerationConfig,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    streamer: Any = None,
    num_mtp_draft: int | None = None,
    past_key_values: Any = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    **others: Any,
) -> GenerateMTPOutput | torch.Tensor:
    """The loop behind `generate(use_mtp=True)`; `generate` has prepared all arguments."""
    batch, prompt = input_ids.shape
    if unknown := sorted(set(others) - {"synced_gpus", "tokenizer", "use_cache", "logits_to_keep"}):
        raise ValueError(f"generate: found {unknown}, with use_mtp=True allowed input_ids, masks and positions")
    if input_ids.device != model.device:
        raise ValueError(f"input_ids: found on {input_ids.device}, with use_mtp=True allowed on {model.device}")
    if streamer is not None and batch > 1:
        raise ValueError(f"streamer: found a batch of {batch} rows, with use_mtp=True allowed 1")

    new, mask = _uncached_prompt(input_ids, past_key_values, generation_config, attention_mask)
    past = mask.shape[1] - new
    if position_ids is None:
        position_ids = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    positions = position_ids[:, -new:].expand(batch, new)
    last_position = positions[:, -1:]

    most = int(_number_of_drafts(model, generation_config, num_mtp_draft))
    limit = stopping_criteria.max_length or 2**62
    stats = MTPStats([0] * most, [0] * most)
    main, text = RaggedCache(past_key_values, mask[:, :past]), Text(input_ids)
    laws: list[torch.Tensor] | None = [] if generation_config.do_sample else None
    wanted = [name for name in ("scores", "logits") if getattr(generation_config, f"output_{name}")]
    records: dict[str, list[torch.Tensor]] = {name: [] for name in ("kept", *wanted)}

    def forward(tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        outputs = model.model(tokens, mask, positions, past_key_values=past_key_values, use_cache=True)
        return outputs.last_hidden_state.to(tokens.device)

    def choose(logits: torch.Tensor, offset: int) -> torch.Tensor:
        scores = text.process(logits_processor, logits, offset)[:, 0]
        if laws is None:
            return scores.argmax(dim=-1, keepdim=True)
        laws.append(scores.softmax(dim=-1))
        return torch.multinomial(laws[-1], 1)

    # The prefill is a round without drafts.
    size = generation_config.prefill_chunk_size or new
    parts = [slice(start, min(start + size, new)) for start in range(0, new, size)]
    tokens, real, drafts = input_ids[:, -new:], mask[:, past:], input_ids.new_zeros(batch, 0)
    states = [forward(tokens[:, part], positions[:, part], mask[:, : past + part.stop]) for part in parts]
    states = torch.cat(states, dim=1)
    drafter = MTPDrafter(model, most, prompt - new, states)
    prefilled = False
    while True:
        logits = model.lm_head(states[:, -drafts.shape[1] - 1 :]).float().to(states.device)
        scores = text.process(logits_processor, logits)
        candidates, accepted = _accept(scores, drafts, laws if laws is None else laws[: drafts.shape[1]])
        before, active = text.lengths, text.active
        appended = text.append(candidates, accepted + 1, stopping_criteria)
        counts = appended if prefilled else torch.full_like(appended, new)
        main.commit(real, counts)
        if prefilled:
            stats.count(active, (limit - 1 - before).clamp(max=drafts.shape[1]), accepted, appended)
        prefilled = True

        for name, values in (("scores", scores), ("logits", logits)):
            if name in wanted:
                records[name].append(values)
        records["kept"].append(torch.arange(candidates.shape[1], device=before.device) < appended[:, None])
        if streamer is not None:
            for token in text.tokens[0, before[0] : text.lengths[0]]:
                streamer.put(token[None].cpu())
        if not text.active.any():
            break

        number = min(most, limit - 1 - int(text.lengths[text.active].min()))  # no drafts that could not be used
        if laws is not None:
            laws.clear()
        drafts = drafts[:, :0]
        if number > 0:
            drafts = drafter.draft(text, number, states, positions, real, counts, choose)
        columns = text.lengths[:, None] - 1 + torch.arange(number + 1, device=before.device)
        tokens, positions = text.read(columns), last_position + columns - (prompt - 1)
        real = torch.ones_like(tokens, dtype=torch.bool)
        states = forward(tokens, positions, main.mask(real))

    if streamer is not None:
        streamer.end()
    sequences = text.tokens[:, : int(text.lengths.max())]
    pad = generation_config._pad_token_tensor
    behind = torch.arange(sequences.shape[1], device=sequences.device) >= text.lengths[:, None]
    sequences = sequences.masked_fill(behind, 0 if pad is None else int(pad))
    main.pack()  # the cache that the caller sees is laid out like the text
    if not generation_config.return_dict_in_generate:
        return sequences
    kept = torch.cat(records["kept"], dim=1)
    index = left_align(kept)[:, :, None].expand(-1, -1, model.config.vocab_size)
    steps = {name: torch.cat(records[name], dim=1).masked_fill(~kept[:, :, None], 0) for name in wanted}
    steps = {name: values.gather(1, index).unbind(dim=1) for name, values in steps.items()}
    return GenerateMTPOutput(sequences=sequences, past_key_values=past_key_values, mtp_stats=stats, **steps)
