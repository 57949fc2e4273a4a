"""RMSNorm with statistics in fp32 that keeps only its input and one number per row for the backward."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_mamba.ops import reference
from hf_mamba.ops.reference import compute_dtype, gradients


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        dtype = compute_dtype(x.dtype)
        exact = x.to(dtype)
        rstd = torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)  # (..., 1)
        ctx.save_for_backward(x, weight, rstd)
        ctx.eps = eps
        # neither in place nor a `.to` that does nothing: torch 2.11's dynamo then loses the gradient (pytorch#180642)
        y = exact * rstd * weight.to(dtype)
        return y if y.dtype == weight.dtype else y.to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True, for which rstd must not be a constant
            return tuple(gradients(reference.rms_norm, (x, weight, ctx.eps), (grad,)))
        dtype = compute_dtype(x.dtype)
        grad, normed = grad.to(dtype), x.to(dtype) * rstd
        grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        grad_normed = grad * weight.to(dtype)
        along = (grad_normed * normed).mean(-1, keepdim=True)
        grad_x = (grad_normed - normed * along).mul_(rstd).to(x.dtype)
        return grad_x, grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight · x / sqrt(mean(x²) + eps) over the last axis; returns weight's dtype."""
    return _RMSNorm.apply(x, weight, eps)


def add_rms_norm(hidden: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(s), s) with s = residual + hidden in the wider of their dtypes."""
    total = residual + hidden
    return rms_norm(total, weight, eps), total


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
        dtype = compute_dtype(x.dtype)
        gated = (x.to(dtype) * F.silu(z.to(dtype))).unflatten(-1, (groups, -1))
        rstd = torch.rsqrt(gated.square().mean(-1, keepdim=True) + eps)  # (..., groups, 1)
        ctx.save_for_backward(x, z, weight, rstd)
        ctx.options = (eps, groups)
        y = (gated * rstd).flatten(-2) * weight.to(dtype)
        return y if y.dtype == x.dtype else y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, z, weight, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():
            return tuple(gradients(reference.gated_rms_norm, (x, z, weight, *ctx.options), (grad,)))
        dtype = compute_dtype(x.dtype)
        grad, exact, gate = grad.to(dtype), x.to(dtype), z.to(dtype)
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        groups = (rstd.shape[-2], -1)
        normed = (exact * silu).unflatten(-1, groups) * rstd
        grad_weight = (grad * normed.flatten(-2)).flatten(0, -2).sum(0).to(weight.dtype)
        grad_normed = (grad * weight.to(dtype)).unflatten(-1, groups)
        along = (grad_normed * normed).mean(-1, keepdim=True)
        grad_gated = (grad_normed - normed * along).mul_(rstd).flatten(-2)
        grad_z = grad_gated * exact * sigmoid.add(silu).sub_(silu * sigmoid)  # silu' = σ + z σ (1 - σ)
        return grad_gated.mul_(silu).to(x.dtype), grad_z.to(z.dtype), grad_weight, None, None


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int = 1) -> Tensor:
    """RMSNorm of x silu(z) over each of `groups` equal parts of the last axis, times weight; returns x's dtype."""
    return _GatedRMSNorm.apply(x, z, weight, eps, groups)
