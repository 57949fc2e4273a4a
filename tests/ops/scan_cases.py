"""Random arguments for the operations, and outputs with gradients as one flat list."""

import torch
from torch import Tensor

from hf_mamba import ops


class Served:
    """The public operations, each call served by one backend."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __getattr__(self, op: str):
        def call(*arguments, **options):
            with ops.backend(self.backend):
                return getattr(ops, op)(*arguments, **options)

        return call


reference = Served("reference")


def scan_arguments(batch: int, length: int, width: int, states: int, seed: int = 0) -> dict[str, Tensor]:
    """Every float argument of selective_scan, float64, with steps and decays like a trained model's."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "x": normal(batch, length, width),
        "dt": normal(batch, length, width) - 1,
        "A": -torch.rand(width, states, generator=generator, dtype=torch.float64) * 4 - 0.1,
        "B": normal(batch, length, states),
        "C": normal(batch, length, states),
        "D": normal(width),
        "z": normal(batch, length, width),
        "dt_bias": normal(width),
        "initial_state": normal(batch, width, states),
    }


def conv_arguments(batch: int, length: int, width: int, taps: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "x": normal(batch, length, width),
        "weight": normal(width, taps),
        "bias": normal(width),
        "initial_state": normal(batch, width, taps - 1),
    }


def documents(batch: int, length: int, seed: int = 0, rate: float = 0.1) -> Tensor:
    """seq_idx (B, L) with documents of random lengths, single tokens among them."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, length, generator=generator) < rate).cumsum(1).int()


def leaves(arguments: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return {name: t.detach().to(dtype or t.dtype).clone().requires_grad_() for name, t in arguments.items()}


def with_gradients(function, arguments: dict[str, Tensor], seed: int = 7, **options) -> dict[str, Tensor]:
    """The outputs of function(**arguments, **options) and the gradient of each argument under random weights."""
    outputs = function(**arguments, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum((out.double() * weights(out, seed + i)).sum() for i, out in enumerate(outputs))
    gradients = torch.autograd.grad(total, list(arguments.values()))
    result = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    return result | {f"gradient of {name}": g for name, g in zip(arguments, gradients, strict=True)}


def weights(out: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out.shape, generator=generator, dtype=torch.float64)


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor to `tolerance` of the largest value of its reference."""
    assert got.keys() == want.keys()
    for name, reference in want.items():
        assert got[name].shape == reference.shape, name
        if not reference.numel():
            continue
        scale = max(reference.abs().max().item(), 1e-3)
        error = (got[name].double() - reference.double()).abs().max().item() / scale
        assert error <= tolerance, f"{name}: relative error {error:.1e} above {tolerance:.1e}"
