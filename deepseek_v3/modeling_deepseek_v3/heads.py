"""The models with a head: causal language model (with MTP), sequence and token classification."""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from ..configuration import DeepseekV3Config
from .continuous_batching import LatentBatchingMixin
from .layers import DeepseekV3Linear
from .losses import IGNORE_INDEX, linear_cross_entropy, sequence_balance_loss, shift_left
from .model import DeepseekV3Model, DeepseekV3ModelOutput, DeepseekV3PreTrainedModel, packed_causal_mask, real_tokens
from .mtp import DeepseekV3MTPLayer, same_document
from .speculative import MTPGenerationMixin


@dataclass
class DeepseekV3CausalLMOutput(MoeCausalLMOutputWithPast):
    """`MoeCausalLMOutputWithPast` plus the parts of the loss, detached fp32 scalars in nats, without coefficients.

    `loss` in training is `ce_loss + mtp_loss_coef * mtp_loss + seq_balance_coef * balance_loss`; in evaluation it is
    `ce_loss`. `mtp_loss` is the mean over the MTP depths, `balance_loss` the sum over the MoE layers.
    """

    ce_loss: torch.Tensor | None = None
    mtp_loss: torch.Tensor | None = None
    balance_loss: torch.Tensor | None = None
    router_indices: tuple[torch.Tensor, ...] | None = None


class DeepseekV3ForCausalLM(DeepseekV3PreTrainedModel, MTPGenerationMixin, LatentBatchingMixin):
    """The language model. Its `num_nextn_predict_layers` MTP layers follow the main layers in `model.layers`."""

    _has_lm_head = True
    _keys_to_ignore_on_load_unexpected = [r"layers\.\d+\.(embed_tokens|shared_head\.head)\.weight", r"^score\."]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__(config)
        config = self.config
        self.model = DeepseekV3Model(config)
        self.model.layers.extend(DeepseekV3MTPLayer(config, k) for k in range(config.num_nextn_predict_layers))
        self.vocab_size = config.vocab_size
        self.lm_head = DeepseekV3Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def mtp_layers(self) -> list[DeepseekV3MTPLayer]:
        """The MTP modules, depth 1 first; empty if the configuration has none."""
        return list(self.model.layers[self.config.num_hidden_layers :])

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        output_router_logits: bool | None = None,
        **kwargs,
    ) -> DeepseekV3CausalLMOutput:
        """`input_ids [B, S]` -> logits `[B, S, V]`, and with `labels` the loss.

        Args:
            labels: `[B, S]`, aligned with `input_ids` (the model shifts); -100 is ignored.
            num_items_in_batch: number of predicted tokens over all micro-batches of a step; the losses are then sums
                divided by it, so that accumulated gradients weigh every token the same.
            skip_logits: do not compute logits. Default: True in training with labels, else False.
            output_router_logits: return `router_logits` and `router_indices` of the main layers.
            shift_labels: (keyword only) labels that are shifted already, in place of `labels`.
        """
        shift_labels = kwargs.pop("shift_labels", None)  # no parameter: `Trainer` wants all with "label" in their name
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        has_labels = labels is not None or shift_labels is not None
        training = self.training and has_labels
        needs_balance = training and self.config.seq_balance_coef > 0
        outputs: DeepseekV3ModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits or needs_balance,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state

        losses: dict[str, torch.Tensor] = {}
        if has_labels:
            targets = shift_labels if shift_labels is not None else shift_left(labels, 1, IGNORE_INDEX)
            token_mask = real_tokens(attention_mask, targets.shape[1])
            router_logits = [(logits, token_mask) for logits in outputs.router_logits or ()] if needs_balance else []
            mtp: list[tuple[torch.Tensor, torch.Tensor]] = []
            if training and self.mtp_layers and self.config.mtp_loss_coef and past_key_values is None:
                embeddings = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
                mtp, mtp_router = self._mtp_states(
                    hidden_states, embeddings, targets, attention_mask, position_ids, **kwargs
                )
                router_logits += mtp_router if needs_balance else []
            losses = self._losses(hidden_states, targets, mtp, router_logits, num_items_in_batch)

        logits = None
        if not (training if skip_logits is None else skip_logits):
            logits = self.lm_head(_positions_to_keep(hidden_states, logits_to_keep))
        return DeepseekV3CausalLMOutput(
            **losses,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
            router_indices=outputs.router_indices if output_router_logits else None,
        )

    def _mtp_states(
        self,
        hidden_states: torch.Tensor,
        embeddings: torch.Tensor,
        targets: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        **kwargs,
    ) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[tuple[torch.Tensor, torch.Tensor]]]:
        """Teacher-forced MTP, per depth: `(head input [B, S, H], targets [B, S])` and `(router logits, token mask)`.

        Rows keep their length: position i of depth k sees token i+k and predicts token i+k+1; where those do not exist
        or lie in another packed document the target is -100 and the position is not counted as a token.
        """
        batch, length, _ = embeddings.shape
        causal_mask = packed_causal_mask(self.config, embeddings, attention_mask, None, position_ids)
        if position_ids is None:
            position_ids = torch.arange(length, device=embeddings.device).unsqueeze(0)
        position_embeddings = self.model.rotary_emb(embeddings, position_ids)
        valid = real_tokens(attention_mask, length)
        valid = embeddings.new_ones(batch, length, dtype=torch.bool) if valid is None else valid

        states, router = [], []
        for depth, layer in enumerate(self.mtp_layers, start=1):
            token_mask = valid & same_document(position_ids, depth) & shift_left(valid, depth, False)
            hidden_states, logits, indices = layer(
                hidden_states,
                shift_left(embeddings, depth, 0.0),
                attention_mask=causal_mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                **kwargs,
            )
            depth_targets = shift_left(targets, depth, IGNORE_INDEX)
            depth_targets = depth_targets.masked_fill(
                ~(token_mask & same_document(position_ids, depth + 1)), IGNORE_INDEX
            )
            states.append((layer.shared_head(hidden_states), depth_targets))
            if indices is not None:
                if torch.is_grad_enabled():
                    layer.mlp.gate.count_load(indices, token_mask.flatten())
                router.append((logits, token_mask))
        return states, router

    def _losses(
        self,
        hidden_states: torch.Tensor,
        targets: torch.Tensor,
        mtp: list[tuple[torch.Tensor, torch.Tensor]],
        router_logits: list[tuple[torch.Tensor, torch.Tensor | None]],
        num_items_in_batch: int | torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """All terms; main and MTP heads share one chunked cross-entropy."""
        terms = [(hidden_states, targets, 1.0)]
        terms += [(states, labels, self.config.mtp_loss_coef / len(mtp)) for states, labels in mtp]
        rows, labels_, counts, weights = [], [], [], []
        for states, labels, coefficient in terms:
            chosen = labels != IGNORE_INDEX
            rows.append(states[chosen])
            labels_.append(labels[chosen])
            counts.append(chosen.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
            weights.append((coefficient / torch.as_tensor(counts[-1], dtype=torch.float32)).to(states.device))
        sizes = [len(part) for part in labels_]
        row_weights = torch.cat([weight.expand(size) for weight, size in zip(weights, sizes, strict=True)])
        loss, nll = linear_cross_entropy(torch.cat(rows), self.lm_head, torch.cat(labels_), row_weights)

        # report the terms without their coefficients
        means = [part.sum() / count for part, count in zip(nll.split(sizes), counts, strict=True)]
        losses = {"ce_loss": means[0]}
        if mtp:
            losses["mtp_loss"] = torch.stack(means[1:]).mean()
        if router_logits:
            batch, top_k = targets.shape[0], self.config.num_experts_per_tok
            balance = sum(sequence_balance_loss(logits, top_k, mask, batch) for logits, mask in router_logits)
            if num_items_in_batch is not None:  # this micro-batch's share of the step
                balance = balance * (sizes[0] / num_items_in_batch)
            loss = loss + self.config.seq_balance_coef * balance
            losses["balance_loss"] = balance.detach()
        return {"loss": loss, **losses}


def _positions_to_keep(hidden_states: torch.Tensor, keep: int | torch.Tensor) -> torch.Tensor:
    """The last `keep` positions (0: all), or those a tensor names: `[P]` for all rows, `[B, P]` per row, or a mask
    `[B, S]`, whose result is flat."""
    if isinstance(keep, int):
        return hidden_states[:, -keep:]
    if keep.dim() == 1:
        return hidden_states[:, keep]
    if keep.dtype == torch.bool:
        return hidden_states[keep]
    return hidden_states.gather(1, keep.unsqueeze(-1).expand(-1, -1, hidden_states.shape[-1]))


class DeepseekV3ForSequenceClassification(GenericForSequenceClassification, DeepseekV3PreTrainedModel):
    """Classifies a sequence from its last token's state (`score [num_labels, H]`); no MTP layers."""


class DeepseekV3ForTokenClassification(GenericForTokenClassification, DeepseekV3PreTrainedModel):
    """Classifies every token from its state (`score [num_labels, H]`); no MTP layers."""
