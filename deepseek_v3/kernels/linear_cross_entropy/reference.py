"""Cross-entropy of `hidden @ weight.T` in plain torch, chunk by chunk: the logits of all rows never exist."""

import torch
import torch.nn.functional as F

from ..blocks import row_blocks

# Logits of one chunk: 8 MiB in bf16 are reused by the allocator, where 64 MiB cost 2x the time; with a large
# vocabulary at least 256 rows, so that the products with the head stay efficient.
CHUNK_ELEMENTS = 2**22
MIN_CHUNK_ROWS = 256


def rows_per_chunk(vocab_size: int) -> int:
    return max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS // vocab_size)


def largest_weight(row_weights: torch.Tensor) -> torch.Tensor:
    """The largest absolute row weight as a scalar, a tiny number where all are zero or there are none."""
    return F.pad(row_weights.abs(), (0, 1), value=torch.finfo(row_weights.dtype).tiny).amax()


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward computes the gradients of both inputs chunk by chunk, so the logits of a chunk live only once.

    The largest row weight enters in backward, together with the loss scale of fp16 training: a probability times
    1 / (number of tokens) would vanish in fp16.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, row_weights, chunk_rows):
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        wide = row_weights.dtype  # fp32; fp64 for fp64 inputs
        nll = torch.empty_like(row_weights)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        largest = largest_weight(row_weights)
        relative_weights = row_weights / largest
        per_row = labels[:, None], relative_weights[:, None], nll[:, None]
        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = F.linear(hidden[rows], weight)  # become their own gradient
            for logits_, labels_, weights_, nll_ in row_blocks(logits, *(x[rows] for x in per_row)):
                log_probs = logits_.to(wide).log_softmax(dim=-1)
                nll_.copy_(-log_probs.gather(1, labels_))
                if needs_hidden or needs_weight:
                    grad = log_probs.exp_()
                    grad.scatter_add_(1, labels_, grad.new_full((1, 1), -1.0).expand_as(labels_))
                    logits_.copy_(grad.mul_(weights_))
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                for grad_weight_, logits_t_ in row_blocks(grad_weight, logits.t()):
                    grad_weight_ += torch.mm(logits_t_, hidden[rows])
        ctx.save_for_backward(grad_hidden, grad_weight, largest)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(nll)
        return (nll * row_weights).sum(), nll

    @staticmethod
    def backward(ctx, grad_loss, _):
        grad_hidden, grad_weight, largest = ctx.saved_tensors
        factor = grad_loss * largest
        grad_hidden = None if grad_hidden is None else grad_hidden * factor
        grad_weight = None if grad_weight is None else (grad_weight * factor).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, row_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    row_weights = row_weights.to(torch.promote_types(hidden.dtype, torch.float32))
    return _LinearCrossEntropy.apply(hidden, weight, labels, row_weights, rows_per_chunk(weight.shape[0]))
