"""Linear cross-entropy: the language-model head and its loss, without the full logits ever existing.

A chunk of rows is projected, its loss and its gradients are computed, and its logits are forgotten. What the backward
needs is then already there: one (M, d) and one (V, d) tensor. Nothing here waits for the device.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_mamba.ops.reference import compute_dtype
from hf_mamba.sizes import LOSS_VOCABULARY_ROWS, loss_rows

Optional = Tensor | None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Optional = None,
    ignore_index: int = -100,
    num_items: Tensor | int | None = None,
    z_loss: float = 0.0,
    chunk: int | None = None,
    row_losses: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of `hidden @ weight.T + bias` against labels.

    Args:
        hidden: (M, d). weight: (V, d). bias: (V,). labels: (M,) int64; `ignore_index` rows do not count.
        num_items: divide the sum by this instead of by the number of rows that count (gradient accumulation);
            an int or a 0-d tensor.
        z_loss: weight of logsumexp², which keeps the logits from drifting (PaLM, section 5).
        chunk: rows at a time; `sizes.loss_rows` by default.
        row_losses: return the cross-entropy of each row, too, (M,), 0 where it does not count and without a gradient.

    Returns:
        A scalar in fp32 (fp64 for fp64 input). Matrix products run in autocast's dtype where it is enabled, else in the
        weight's; softmax, loss and the accumulated weight gradient are fp32.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    if hidden.dtype == torch.float64:
        dtype = hidden.dtype
    grad = torch.is_grad_enabled()
    wanted = [grad and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    rows = chunk or loss_rows(device)
    total, *_, by_row = _sum(hidden, weight, labels, bias, ignore_index, z_loss, rows, dtype, row_losses, *wanted)
    if num_items is None:
        num_items = (labels != ignore_index).sum()
    loss = total / num_items
    return (loss, by_row.detach()) if row_losses else loss


@torch.library.custom_op("hf_mamba::linear_cross_entropy_sum", mutates_args=())
def _sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Optional,
    ignore_index: int,
    z_loss: float,
    chunk: int,
    dtype: torch.dtype,
    want_rows: bool,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The summed loss; the gradients of hidden, weight and bias, and the rows' losses (empty where not wanted)."""
    with torch.autocast(hidden.device.type, enabled=False):
        exact = compute_dtype(dtype)
        w = weight.to(dtype)
        b = None if bias is None else bias.to(dtype)
        total = hidden.new_zeros((), dtype=exact)
        grad_hidden = torch.empty_like(hidden) if want_hidden else hidden.new_empty(0)
        grad_weight = weight.new_empty(weight.shape if want_weight else 0, dtype=exact)
        grad_bias = weight.new_zeros(weight.shape[0] if want_bias else 0, dtype=exact)
        by_row = hidden.new_empty(len(labels) if want_rows else 0, dtype=exact)
        if want_weight and not len(labels):
            grad_weight.zero_()
        for start in range(0, len(labels), chunk):
            cut = slice(start, start + chunk)
            rows = hidden[cut].to(dtype)
            logits = F.linear(rows, w, b).to(exact)
            entropies, loss, grad_logits = _chunk_loss(logits, labels[cut], ignore_index, z_loss)
            total += loss
            if want_rows:
                by_row[cut] = entropies
            if want_bias:
                grad_bias += grad_logits.sum(0)
            grad_logits = grad_logits.to(dtype)
            if want_hidden:
                grad_hidden[cut] = grad_logits @ w
            if want_weight:
                _accumulate(grad_weight, grad_logits, rows, first=start == 0)
    return total, grad_hidden, grad_weight, grad_bias, by_row


def _chunk_loss(logits: Tensor, labels: Tensor, ignore_index: int, z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
    """The cross-entropies of some rows (M,), their summed loss, and the gradient of their logits (M, V)."""
    counted = (labels != ignore_index).to(logits.dtype)
    target = labels.where(labels != ignore_index, 0)[:, None]
    probabilities = torch.softmax(logits, -1)
    # log Σ exp from the largest probability, which is at least 1/V: exact without a pass over exp(logits)
    log_z = logits.amax(-1) - probabilities.amax(-1).log()
    entropies = (log_z - logits.gather(1, target)[:, 0]) * counted
    loss, scale = entropies.sum(), counted
    if z_loss:
        loss = loss + z_loss * (log_z.square() * counted).sum()
        scale = counted * (1 + 2 * z_loss * log_z)
    grad = probabilities.mul_(scale[:, None]).scatter_add_(1, target, -counted[:, None])
    return entropies, loss, grad


def _accumulate(total: Tensor, grad_logits: Tensor, rows: Tensor, first: bool) -> None:
    if grad_logits.dtype == total.dtype:
        total.addmm_(grad_logits.t(), rows, beta=0 if first else 1)
        return
    # by parts: the whole product would be half as large as `total`, and a CPU widens it before it adds
    parts = zip(total.split(LOSS_VOCABULARY_ROWS), grad_logits.split(LOSS_VOCABULARY_ROWS, 1), strict=True)
    for part, gradient in parts:
        take = part.copy_ if first else part.add_
        take(gradient.t() @ rows)


@_sum.register_fake
def _(
    hidden, weight, labels, bias, ignore_index, z_loss, chunk, dtype, want_rows, want_hidden, want_weight, want_bias
):  # fmt: skip
    exact = compute_dtype(dtype)
    return (
        hidden.new_empty((), dtype=exact),
        torch.empty_like(hidden) if want_hidden else hidden.new_empty(0),
        weight.new_empty(weight.shape if want_weight else 0, dtype=exact),
        weight.new_empty(weight.shape[0] if want_bias else 0, dtype=exact),
        hidden.new_empty(len(labels) if want_rows else 0, dtype=exact),
    )


def _context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*output[1:4])
    ctx.dtypes = [None if t is None else t.dtype for t in (inputs[0], inputs[1], inputs[3])]
    ctx.wanted = inputs[-3:]
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad_total: Optional, *_: Optional) -> tuple:
    if grad_total is None:
        return (None,) * 12
    if torch.is_grad_enabled():  # create_graph=True: the gradients that were kept would count as constants
        raise RuntimeError(
            "the chunked loss has no second derivatives, because they would keep its (tokens, d) input until the "
            "backward. Call the model with skip_logits=False: the loss of whole logits has them."
        )
    # out of place: a retained graph may ask again
    hidden, weight, bias = (
        (grad * grad_total).to(dtype) if wanted else None
        for grad, dtype, wanted in zip(ctx.saved_tensors, ctx.dtypes, ctx.wanted, strict=True)
    )
    return hidden, weight, None, bias, *(None,) * 8


_sum.register_autograd(_gradient, setup_context=_context)
