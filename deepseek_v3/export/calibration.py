"""Calibration text sent through the model layer by layer, each layer quantized on what the ones before it, quantized,
make of the text.

In memory are the activations and, at a time, the attention of one layer or one of its experts. Every expert is shown
all tokens, so that rare experts are calibrated as well as busy ones; what a layer hands on is gated as in the model.
The inputs of a weight enter by their second moment. That of gate_proj and up_proj is one for all experts of a layer,
down_proj's is each expert's own.
"""

import copy
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from ..data import batch_indices, load_corpus, pack_documents, sample_order, tokenize_documents
from ..modeling_deepseek_v3.attention import DeepseekV3Attention
from ..modeling_deepseek_v3.layers import DeepseekV3RMSNorm
from ..modeling_deepseek_v3.model import packed_causal_mask
from ..modeling_deepseek_v3.moe import DeepseekV3TopkRouter
from ..modeling_deepseek_v3.rope import DeepseekV3RotaryEmbedding
from ..tokenization import DeepseekV3Tokenizer
from .gptq import spread
from .source import EMBEDDING, Source

Codes = tuple[torch.Tensor, torch.Tensor]  # codes [N, K], whole numbers, and scale [N, G]
Quantize = Callable[[torch.Tensor], Codes]
Fit = Callable[[torch.Tensor], Quantize]  # from the second moment [K, K] of a weight's inputs
Mlp = Callable[[torch.Tensor], torch.Tensor]  # [n, H] -> [n, H]

CHUNK = 8192  # tokens that are computed at once
OVERSAMPLING = 8  # rows to choose from, for each that is chosen
# Linear layers of the attention that have one input, in the order of computation.
ATTENTION_STAGES = (("q_proj", "q_a_proj", "kv_a_proj_with_mqa"), ("q_b_proj",), ("o_proj",))


@lru_cache(maxsize=1)
def calibration_rows(
    folder: Path | None, text: str, rows: int, length: int, seed: int
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Rows of training text, chosen at random, and their record for the report.

    Args:
        folder: where the tokenizer is.
        text: a corpus, see `load_corpus`.
        rows, length: how many, and tokens of each.

    Returns:
        `input_ids` and `position_ids` `[rows, length]` int64, positions restarting with each document; and
        `{text, sha256, licence, rows, length, seed}`.

    Raises:
        ValueError: no tokenizer, a corpus that cannot be read, or too little text for that many rows.
    """
    if folder is None:
        raise ValueError("source: no tokenizer.json, which a method with calibration needs; others are rtn and mse")
    tokenizer = DeepseekV3Tokenizer.from_pretrained(folder)
    corpus = load_corpus(text)
    order = sample_order(len(corpus.train), seed, 0)
    documents, tokens = [], 0
    for ids in _tokenized((corpus.train[i].text for i in order), tokenizer):
        documents.append(ids)
        tokens += len(ids)
        if tokens >= OVERSAMPLING * rows * length:
            break
    if tokens < rows * length:
        raise ValueError(
            f"calibration: {text!r} has {tokens} tokens, allowed are at least {rows * length} "
            f"(calibration_rows x calibration_length)"
        )
    packed = pack_documents(documents, length, bos_id=tokenizer.bos_token_id, eos_id=tokenizer.eos_token_id)
    chosen = packed.rows(batch_indices(len(packed), 0, rows, seed))
    record = {"text": corpus.name, "sha256": corpus.sha256, "licence": corpus.licence}
    return chosen, {**record, "rows": rows, "length": length, "seed": seed}


def _tokenized(texts: Iterable[str], tokenizer: DeepseekV3Tokenizer) -> Iterator[Any]:
    for text in texts:
        yield from tokenize_documents([text], tokenizer)


class Calibration:
    """Quantizes the chosen weights of one decoder layer after the other.

    Args:
        source: the checkpoint.
        rows: `input_ids` and `position_ids`, `[R, S]` int64.
        names: official names of the weights to quantize.
        fit: makes the function that quantizes a weight from the second moment of its inputs.

    Raises:
        ValueError: rows with a token that the model does not have.
    """

    def __init__(self, source: Source, rows: dict[str, torch.Tensor], names: Collection[str], fit: Fit) -> None:
        largest, allowed = int(rows["input_ids"].max()), source.config.vocab_size
        if largest >= allowed:
            raise ValueError(f"{source.folder}: its tokenizer gives id {largest}, allowed are ids below {allowed}")
        self._source, self._rows, self._names, self._fit = source, rows, frozenset(names), fit
        self._config = copy.deepcopy(source.config)
        self._config._attn_implementation = "sdpa"
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._layer = 0  # the next one
        self._hidden: torch.Tensor  # its input [R, S, H] fp32
        self._found: dict[str, Codes] = {}

    def take(self, name: str) -> Codes:
        """Codes `[N, K]` int8 and scale `[N, G]` bf16 of the weight `name`; each once, layers in ascending order.

        The layer is computed when its first weight is asked for, after those before it: an export that was
        interrupted computes them again when it goes on.
        """
        while name not in self._found:
            self._found = {}
            self.advance()
        return self._found.pop(name)

    @torch.no_grad()
    def advance(self) -> torch.Tensor:
        """Quantize the next layer. Returns its output `[R, S, H]` fp32, which the layer after it overwrites."""
        if self._layer == 0:
            hidden = F.embedding(self._rows["input_ids"], self._source.read(EMBEDDING))
            self._hidden = hidden.to(self._device, torch.float32)
        self._attention(self._hidden)
        self._mlp(self._hidden.view(-1, self._hidden.shape[-1]))
        if not self._hidden.isfinite().all():
            raise ValueError(f"model.layers.{self._layer}: its output on the calibration text is not finite")
        self._layer += 1
        return self._hidden

    def _attention(self, hidden: torch.Tensor) -> None:
        """Quantize the attention for its input `hidden [R, S, H]`, and add its output to that."""
        prefix = f"model.layers.{self._layer}.self_attn."
        norm, attention = self._norm("input_layernorm"), self._module(DeepseekV3Attention, prefix, self._layer)
        rotary = DeepseekV3RotaryEmbedding(self._config).to(self._device)
        rows = range(0, len(hidden), max(1, CHUNK // hidden.shape[1]))

        def outputs() -> Iterator[tuple[slice, torch.Tensor]]:
            for start in rows:
                part = slice(start, start + rows.step)
                positions = self._rows["position_ids"][part].to(self._device)
                mask = packed_causal_mask(self._config, hidden[part], None, None, positions)
                yield part, attention(norm(hidden[part]), rotary(hidden, positions), mask)[0]

        for stage in ATTENTION_STAGES:
            chosen = [name for name in stage if f"{prefix}{name}.weight" in self._names]
            if chosen:
                quantize = self._fit(_input_moment(getattr(attention, chosen[0]), outputs()))
            for name in chosen:
                weight = self._weight(f"{prefix}{name}.weight", quantize)
                getattr(attention, name).weight = nn.Parameter(weight, requires_grad=False)
        for part, output in outputs():
            hidden[part] += output

    def _mlp(self, tokens: torch.Tensor) -> None:
        """Quantize the MLP or the experts for their input `tokens [N, H]`, and add their output to that."""
        prefix = f"model.layers.{self._layer}.mlp."
        norm = self._norm("post_attention_layernorm")
        x = torch.cat([norm(part) for part in tokens.split(CHUNK)])
        wanted = any(name.startswith(prefix) for name in self._names)
        quantize = self._fit(second_moment(x.split(CHUNK))) if wanted else None
        everywhere = torch.arange(len(x), device=x.device)
        if self._layer < self._config.first_k_dense_replace:
            _add(tokens, self._swiglu(prefix, x, quantize), x, everywhere)
            return
        _, weights, indices = self._module(DeepseekV3TopkRouter, f"{prefix}gate.")(x)
        _add(tokens, self._swiglu(f"{prefix}shared_experts.", x, quantize), x, everywhere)
        for expert in range(self._config.n_routed_experts):
            mlp = self._swiglu(f"{prefix}experts.{expert}.", x, quantize)
            chosen, position = torch.where(indices == expert)
            _add(tokens, mlp, x, chosen, weights[chosen, position])

    def _swiglu(self, prefix: str, x: torch.Tensor, quantize: Quantize | None) -> Mlp:
        """The MLP at `prefix`, quantized for its input `x [N, H]`: gate_proj and up_proj by `quantize`."""
        gate, up = (self._weight(f"{prefix}{name}.weight", quantize) for name in ("gate_proj", "up_proj"))
        activation = ACT2FN[self._config.hidden_act]

        def inner(part: torch.Tensor) -> torch.Tensor:
            return activation(part @ gate.t()).mul_(part @ up.t())

        name = f"{prefix}down_proj.weight"
        wanted = name in self._names
        down = self._weight(name, self._fit(second_moment(map(inner, x.split(CHUNK)))) if wanted else None)
        return lambda part: inner(part) @ down.t()

    def _weight(self, name: str, quantize: Quantize | None) -> torch.Tensor:
        """The weight as the quantized model has it `[N, K]` fp32; what is to be quantized needs `quantize`."""
        if name not in self._names:
            return self._source.read(name).to(self._device, torch.float32)
        assert quantize is not None
        weight = self._source.read_finite(name).to(self._device)
        codes, scale = quantize(weight.to(torch.bfloat16))
        self._found[name] = codes.to("cpu", torch.int8), scale.cpu()
        return codes * spread(scale, codes.shape[1])

    def _norm(self, name: str) -> nn.Module:
        eps = self._config.rms_norm_eps
        return self._module(
            lambda config: DeepseekV3RMSNorm(config.hidden_size, eps), f"model.layers.{self._layer}.{name}."
        )

    def _module(self, make: Callable[..., nn.Module], prefix: str, *arguments: Any) -> nn.Module:
        """A module of the model in fp32, with the source's weights."""
        with torch.device("meta"):
            module = make(self._config, *arguments)
        read = {name: self._source.read(prefix + name).to(self._device, torch.float32) for name in module.state_dict()}
        module.load_state_dict(read, assign=True)
        return module.eval()


def _add(
    total: torch.Tensor, mlp: Mlp, x: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor | None = None
) -> None:
    """Add to the `rows [n]` of `total [N, H]` what `mlp` makes of those rows of `x [N, H]`, times `weights [n]`."""
    for i in range(0, len(rows), CHUNK):
        part = rows[i : i + CHUNK]
        output = mlp(x[part])
        total.index_add_(0, part, output if weights is None else output * weights[i : i + CHUNK, None])


def _input_moment(linear: nn.Linear, passes: Iterable[Any]) -> torch.Tensor:
    """The second moment of what `linear` is given in `passes` through the module that holds it."""
    total = linear.weight.new_zeros(linear.in_features, linear.in_features)
    hook = linear.register_forward_pre_hook(lambda _, inputs: _add_moment(total, inputs[0].flatten(0, -2)))
    for _ in passes:
        pass
    hook.remove()
    return total


def second_moment(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """`X^T X` `[K, K]` of rows `[n, K]` that come in parts, at least one."""
    total: torch.Tensor | None = None
    for part in parts:
        total = part.new_zeros(part.shape[1], part.shape[1]) if total is None else total
        _add_moment(total, part)
    assert total is not None
    return total


def _add_moment(total: torch.Tensor, x: torch.Tensor) -> None:
    total.addmm_(x.t(), x)
