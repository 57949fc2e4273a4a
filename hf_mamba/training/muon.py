"""Muon for the matrices of a model, AdamW for everything else, in one optimizer (Jordan et al. 2024).

The momentum of a matrix is orthogonalised: all its singular values become about one, by five Newton-Schulz steps. A
tensor that stacks several matrices is cut into them first, as the family's table says: the singular values of the
stack are not theirs. torch.optim.Muon knows no parts, and always iterates in bf16.

The update is scaled to the root mean square of AdamW's, 0.2 (Liu et al. 2025, section 2.2: `match_rms_adamw` in torch),
so that a rate and a weight decay found for AdamW hold. State: one momentum, where AdamW keeps two.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from hf_mamba.family import family_of
from hf_mamba.private.torch import plain_name
from hf_mamba.sizes import muon_batch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's, and torch's
STEPS = 5
RMS = 0.2  # of AdamW's updates
MOMENTUM = 0.95


def orthogonalise(matrices: Tensor) -> Tensor:
    """Move the singular values of each matrix, (..., rows, columns), to between 0.7 and 1.2; in bf16 on a GPU."""
    a, b, c = COEFFICIENTS
    wide = matrices.to(torch.bfloat16) if matrices.is_cuda else matrices
    wide = wide.mT if wide.shape[-2] > wide.shape[-1] else wide
    wide = wide / torch.linalg.matrix_norm(wide, keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.mT if matrices.shape[-2] > matrices.shape[-1] else wide


def muon_groups(model: nn.Module, config: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Make the optimizer's groups: matrices by the rows of their parts, then what decays of the rest, then all others.

    Raises:
        ValueError: for a parameter that the family's table lacks.
    """
    rows = {row.name: row for row in family_of(config).parameters(config)}
    groups: dict[tuple[tuple[int, ...], bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if (row := rows.get(plain_name(name))) is None:
            raise ValueError(f"--optim muon has no place for the parameter {name!r}: the model's table lacks it.")
        if parameter.requires_grad:
            groups[row.matrices, row.decays].append(parameter)
    return [
        {"params": parameters, "matrices": matrices, "weight_decay": weight_decay if decays else 0.0}
        for (matrices, decays), parameters in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]


def make_muon(model: nn.Module, config: Any, args: TrainingArguments) -> "Muon":
    """Build the optimizer of a run from its arguments."""
    betas = (args.adam_beta1, args.adam_beta2)
    groups = muon_groups(model, config, args.weight_decay)
    return Muon(groups, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon, fused=True)


class Muon(torch.optim.Optimizer):
    """Muon where a group has `matrices`, the rows of its tensors' parts; AdamW where that is ().

    Args:
        params: groups, as of `muon_groups`.
        momentum: of the matrices' gradients (Nesterov's).
        adamw: AdamW's arguments; `lr` and `weight_decay` are Muon's, too.
    """

    def __init__(self, params: Iterable[dict[str, Any]], momentum: float = MOMENTUM, **adamw: Any) -> None:
        self._adamw = torch.optim.AdamW([torch.zeros(1)], **adamw)
        super().__init__(params, {**self._adamw.defaults, "matrices": (), "momentum": momentum})

    def load_state_dict(self, state_dict: Any) -> None:
        """As torch's, but for `matrices`, which are the model's own: FSDP2's loading loses them."""
        own = [group["matrices"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, matrices in zip(self.param_groups, own, strict=True):
            group["matrices"] = matrices

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        self._adamw.state = self.state
        self._adamw.param_groups = [group for group in self.param_groups if not group["matrices"]]
        self._adamw.step()
        for group in self.param_groups:
            if group["matrices"]:
                self._step(group)
        return loss

    def _step(self, group: dict[str, Any]) -> None:
        lr, momentum = float(group["lr"]), group["momentum"]
        parts = defaultdict(list)
        for p in group["params"]:
            if p.grad is None:
                continue
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
            gradient, mean = p.grad, self.state[p]["momentum_buffer"]
            mean.lerp_(gradient, 1 - momentum)
            p.mul_(1 - lr * group["weight_decay"])
            if hasattr(p, "full_tensor"):
                _add_sharded(p, gradient.lerp(mean, momentum), group["matrices"], lr)
                continue
            for part in zip(*(t.split(group["matrices"]) for t in (p, gradient, mean)), strict=True):
                parts[part[0].shape].append(part)
        for shape, alike in parts.items():
            together = muon_batch(shape.numel())
            for some in (alike[i : i + together] for i in range(0, len(alike), together)):
                stacked = torch.empty(len(some), *shape, device=some[0][0].device)
                for (_, gradient, mean), update in zip(some, stacked, strict=True):
                    torch.lerp(gradient, mean, momentum, out=update)
                for (part, _, _), direction in zip(some, orthogonalise(stacked), strict=True):
                    part.add_(direction, alpha=-lr * _scale(shape))


def _scale(shape: torch.Size) -> float:
    """What gives an orthogonal matrix of this shape AdamW's root mean square."""
    return RMS * math.sqrt(max(shape))


def _add_sharded(p: Any, update: Any, matrices: tuple[int, ...], lr: float) -> None:
    """Move FSDP2's part of a tensor: the whole update is gathered, since a shard has singular values of its own."""
    from torch.distributed.tensor import distribute_tensor

    parts = update.full_tensor().split(matrices)
    whole = torch.cat([orthogonalise(part[None])[0].to(part.dtype) * _scale(part.shape) for part in parts])
    p.add_(distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None), alpha=-lr)
