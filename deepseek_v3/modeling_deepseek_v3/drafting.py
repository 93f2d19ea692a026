"""What speculative decoding works on: a batch's text, caches whose rows advance unevenly, and the drafter (paper 2.2).

Rows of a batch accept different numbers of drafts. All rows write the same slots of a cache; slots of rejected tokens
become holes that the attention mask hides, positions are explicit, and the cache is packed when holes are many.
`columns` are places in the text with its left padding; a token's place in its document is its `position`.

Shape legend: B rows, S tokens of a forward, K drafts, D MTP modules, H hidden, V vocabulary, T slots of a cache.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import LogitsProcessorList, StoppingCriteriaList
from transformers.masking_utils import create_causal_mask

from .mtp import DeepseekV3MTPLayer

if TYPE_CHECKING:
    from .heads import DeepseekV3ForCausalLM


def left_align(keep: torch.Tensor) -> torch.Tensor:
    """`keep [B, T]` bool -> `[B, longest]`: indices that bring each row's kept columns to the left, in order.

    >>> left_align(torch.tensor([[True, False, True], [False, True, False]])).tolist()
    [[0, 2], [1, 0]]
    """
    return (~keep).long().argsort(dim=1, stable=True)[:, : int(keep.sum(1).max())]


class RaggedCache:
    """A dynamic cache whose rows advance at different speeds.

    `kept [B, T]`: slots that are no holes; `real [B, T]`: of these the ones with a token, not with left padding.
    """

    def __init__(self, cache: Cache, real: torch.Tensor) -> None:
        self.cache, self.real, self.kept = cache, real, torch.ones_like(real)

    def mask(self, new: torch.Tensor) -> torch.Tensor:
        """The 2-D attention mask `[B, T + S]` of a forward over S columns of which `new [B, S]` hold tokens."""
        return torch.cat((self.real, new), dim=1)

    def commit(self, new: torch.Tensor, counts: torch.Tensor) -> None:
        """Of the S slots just written keep the first `counts [B]` of each row; `new [B, S]` as in `mask`."""
        keep = torch.arange(new.shape[1], device=new.device) < counts[:, None]
        width = int(counts.max())
        self.kept = torch.cat((self.kept, keep[:, :width]), dim=1)
        self.real = torch.cat((self.real, (keep & new)[:, :width]), dim=1)
        for layer in self.cache.layers:
            if excess := layer.get_seq_length() - self.kept.shape[1]:
                layer.crop(-excess)
        if 4 * int(self.kept.sum(1).max()) < 3 * self.kept.shape[1]:
            self.pack()

    def pack(self) -> None:
        """Bring each row's kept slots to the left and drop the slots that no row needs."""
        if self.kept.all():
            return
        order = left_align(self.kept)
        for layer in self.cache.layers:
            index = order[:, None, :, None].to(layer.keys.device)  # keys and values are [B, 1, T, width]
            layer.keys = layer.keys.gather(2, index.expand(-1, -1, -1, layer.keys.shape[3]))
            layer.values = layer.values.gather(2, index.expand(-1, -1, -1, layer.values.shape[3]))
        self.kept, self.real = self.kept.gather(1, order), self.real.gather(1, order)


class Text:
    """`tokens [B, W]`, of which the first `lengths [B]` of a row are its text; drafts stand provisionally behind them.

    `active [B]`: the rows that are still being written.
    """

    def __init__(self, input_ids: torch.Tensor) -> None:
        batch, length = input_ids.shape
        self.tokens = input_ids.clone()
        self.lengths = input_ids.new_full((batch,), length)
        self.active = torch.ones_like(self.lengths, dtype=torch.bool)
        self.rows = torch.arange(batch, device=input_ids.device)

    def write(self, offset: int, tokens: torch.Tensor) -> None:
        """Put `tokens [B, S]` behind each row's text, `offset` columns further on."""
        columns = self.lengths[:, None] + torch.arange(offset, offset + tokens.shape[1], device=tokens.device)
        self.tokens = F.pad(self.tokens, (0, max(0, int(columns.max()) + 1 - self.tokens.shape[1])))
        self.tokens.scatter_(1, columns, tokens)

    def read(self, columns: torch.Tensor) -> torch.Tensor:
        """The tokens at `columns [B, S]`; some token where a column does not exist."""
        return self.tokens.gather(1, columns.clamp(0, self.tokens.shape[1] - 1))

    def process(self, processors: LogitsProcessorList, logits: torch.Tensor, offset: int = 0) -> torch.Tensor:
        """Apply logits processors to `logits [B, S, V]`; column j continues its first `lengths + offset + j` tokens.

        One call per text length, on all rows, because processors read the length and may hold a tensor per row.
        """
        if not processors:
            return logits
        scores, known = logits.clone(), self.lengths + offset
        for length in range(int(known.min()), int(known.max()) + logits.shape[1]):
            column = length - known
            here = self.active & (column >= 0) & (column < logits.shape[1])
            if here.any():
                column = column.clamp(0, logits.shape[1] - 1)
                processed = processors(self.tokens[:, :length], logits[self.rows, column])
                scores[here, column[here]] = processed[here]
        return scores

    def append(self, tokens: torch.Tensor, counts: torch.Tensor, criteria: StoppingCriteriaList) -> torch.Tensor:
        """Append to active rows the first `counts [B]` of `tokens [B, S]`, nothing behind a stop; returns how many."""
        self.write(0, tokens)
        counts = counts * self.active
        for length in range(int(self.lengths.min()) + 1, int((self.lengths + counts).max()) + 1):
            here = (self.lengths < length) & (length <= self.lengths + counts)
            if here.any():
                stop = here & criteria(self.tokens[:, :length], None)
                counts = torch.where(stop, length - self.lengths, counts)
                self.active = self.active & ~stop
        self.lengths = self.lengths + counts
        return counts


class MTPDrafter:
    """The MTP layers with a cache of their own: fed with the main model's states, they draft what follows the text.

    Module d at column c reads the state of depth d - 1 there and the token of column c + d; it predicts c + d + 1.
    The last D - 1 columns of module D so rest on drafts. They are computed again in the next round, and the main
    states which that needs are kept here. There is no entry for what a prefilled cache of the main model covers.
    """

    def __init__(self, model: "DeepseekV3ForCausalLM", number: int, column: int, states: torch.Tensor) -> None:
        """`number`: most drafts per round; `column`: where the first of the main states (like `states`) belongs."""
        self.model, self.layers = model, model.mtp_layers[:number]
        batch, tail = states.shape[0], len(self.layers) - 1
        self.cache = RaggedCache(DynamicCache(), states.new_zeros(batch, 0, dtype=torch.bool))
        self.states = states.new_zeros(batch, tail, states.shape[2])
        self.valid = states.new_zeros(batch, tail, dtype=torch.bool)
        self.positions = states.new_zeros(batch, tail, dtype=torch.long)
        self.start = self.positions.new_full((batch,), column - tail)  # the column of the first kept state

    def draft(
        self,
        text: Text,
        number: int,
        states: torch.Tensor,
        positions: torch.Tensor,
        valid: torch.Tensor,
        counts: torch.Tensor,
        choose: Callable[[torch.Tensor, int], torch.Tensor],
    ) -> torch.Tensor:
        """Take in the main states of new columns and draft `number` tokens, `[B, K]`, also written behind the text.

        Args:
            states: `[B, S, H]`, after the final norm, as in training. positions, valid: `[B, S]`, of their tokens.
            counts: `[B]`; the first so many of the S belong to the text.
            choose: `(logits [B, 1, V], how many drafts there are) -> token [B, 1]`.
        """
        tail = self.states.shape[1]
        offsets = torch.arange(tail + states.shape[1], device=states.device)
        states = torch.cat((self.states, states), dim=1)
        positions = torch.cat((self.positions, positions), dim=1)
        valid = torch.cat((self.valid, valid), dim=1) & (offsets < tail + counts[:, None])
        columns = self.start[:, None] + offsets
        last = (tail + counts - 1).clamp(min=0)
        drafts: list[torch.Tensor] = []

        def add(state: torch.Tensor, layer: DeepseekV3MTPLayer) -> None:
            logits = self.model.lm_head(layer.shared_head(state)).float().to(state.device)
            drafts.append(choose(logits, len(drafts)))
            text.write(len(drafts) - 1, drafts[-1])

        output, mask = states, self.cache.mask(valid)
        for depth, layer in enumerate(self.layers, start=1):
            output = self._forward(layer, output, text.read(columns + depth), positions, mask)
            state = output[text.rows, last][:, None]
            add(state, layer)
        position = positions[text.rows, last][:, None]
        while len(drafts) < number:  # the last module goes on, its own output standing in for the unknown state
            position, mask = position + 1, F.pad(mask, (0, 1), value=True)
            state = self._forward(self.layers[-1], state, drafts[-1], position, mask)
            add(state, self.layers[-1])

        self.cache.commit(valid, counts)
        keep = counts[:, None] + offsets[:tail]
        self.states, self.positions, self.valid = (x[text.rows[:, None], keep] for x in (states, positions, valid))
        self.start = self.start + counts
        return torch.cat(drafts[:number], dim=1)

    def _forward(
        self,
        layer: DeepseekV3MTPLayer,
        states: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """One module on `states [B, S, H]` and `tokens [B, S]`: its output state, without the shared head's norm."""
        embeddings = self.model.model.embed_tokens(tokens)
        depth = layer.self_attn.layer_idx
        stored = self.cache.cache.layers[depth : depth + 1]  # while drafting, layers hold different numbers of slots
        causal_mask = create_causal_mask(
            config=self.model.config,
            inputs_embeds=embeddings,
            attention_mask=mask,
            past_key_values=Cache(layers=stored) if stored else DynamicCache(),
        )
        output, *_ = layer(
            states,
            embeddings,
            attention_mask=causal_mask,
            position_embeddings=self.model.model.rotary_emb(embeddings, positions),
            position_ids=positions,
            past_key_values=self.cache.cache,
        )
        return output.to(states.device)
