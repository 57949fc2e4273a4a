"""The contestants: one mixer or one model each, with the same weights, from stock transformers and from us."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.models.mamba import modeling_mamba as stock

import hf_mamba.models.mamba.modeling_mamba as ours
from hf_mamba import ops
from hf_mamba.models.mamba.configuration_mamba import MambaConfig

Step = Callable[[], object]


def geometry(layers: int = 24, vocab: int = 50280) -> dict:
    """Mamba-130m (state-spaces/mamba-130m-hf)."""
    return {"hidden_size": 768, "num_hidden_layers": layers, "vocab_size": vocab, "state_size": 16, "conv_kernel": 4}


def our_model(layers: int = 24, vocab: int = 50280) -> nn.Module:
    torch.manual_seed(0)
    return ours.MambaForCausalLM(MambaConfig(**geometry(layers, vocab)))


def stock_model(weights: dict[str, Tensor], layers: int = 24, vocab: int = 50280, **options: bool) -> nn.Module:
    """transformers' model with our weights. options: use_mambapy, use_associative_scan."""
    options = {"use_mambapy": False, "use_associative_scan": False} | options
    model = stock.MambaForCausalLM(transformers.MambaConfig(**geometry(layers, vocab), **options))
    model.load_state_dict(weights)
    return model


class OurMixer(nn.Module):
    """Our mixer under one backend, called like transformers' (hidden states only)."""

    def __init__(self, model: nn.Module, backend: str):
        super().__init__()
        self.mixer, self.backend, self.layout = model.backbone.layers[0].mixer, backend, ours.Layout()

    def forward(self, hidden_states: Tensor) -> Tensor:
        with ops.backend(self.backend):
            return self.mixer(hidden_states, layout=self.layout)


def mixers(
    model: nn.Module, weights: dict[str, Tensor], backends: tuple[str, ...] = ("cpu", "torch")
) -> dict[str, nn.Module]:
    """Our mixer under each backend, then transformers' eager ones."""
    found: dict[str, nn.Module] = {f"hf_mamba {name}": OurMixer(model, name) for name in backends}
    found["transformers mambapy"] = stock_mixer(weights, use_mambapy=True)
    found["transformers loop"] = stock_mixer(weights)
    return found


def stock_mixer(weights: dict[str, Tensor], **options: bool) -> nn.Module:
    return stock_model(weights, layers=1, vocab=16, **options).backbone.layers[0].mixer


def training_step(module: nn.Module, length: int, batch: int = 1, width: int = 768) -> Step:
    """Forward and backward of a mixer, gradients of input and parameters included."""
    inputs = torch.randn(batch, length, width, requires_grad=True)
    weight = torch.randn(batch, length, width)

    def step() -> None:
        inputs.grad = None
        for parameter in module.parameters():
            parameter.grad = None
        module(inputs).backward(weight)

    return step


def inference_step(module: nn.Module, length: int, batch: int = 1, width: int = 768) -> Step:
    inputs = torch.randn(batch, length, width)

    @torch.no_grad()
    def step() -> None:
        module(inputs)

    return step


def matrix_products(mixer: nn.Module, length: int, backward: bool) -> Step:
    """The floor: the mixer's own matrix products, forward and as many as its backward needs, and nothing else."""
    weights = [layer.weight.detach() for layer in (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj)]
    inputs = [weight.new_empty(length, weight.shape[1]).normal_() for weight in weights]
    gradients = [weight.new_empty(length, weight.shape[0]).normal_() for weight in weights]

    def step() -> None:
        for weight, rows in zip(weights, inputs, strict=True):
            F.linear(rows, weight)
        if backward:
            for weight, rows, gradient in zip(weights, inputs, gradients, strict=True):
                gradient @ weight
                gradient.t() @ rows

    return step


def all_products(model: nn.Module, rows: int, dtype: torch.dtype) -> Step:
    """The floor of training: the products of every weight matrix with so many rows, forward and backward."""
    weights = [m.weight.detach().to(dtype) for m in model.modules() if isinstance(m, nn.Linear)]
    inputs = [torch.randn(rows, weight.shape[1]).to(dtype) for weight in weights]
    gradients = [torch.randn(rows, weight.shape[0]).to(dtype) for weight in weights]

    def step() -> None:
        for weight, given, gradient in zip(weights, inputs, gradients, strict=True):
            F.linear(given, weight), gradient @ weight, gradient.t() @ given

    return step


def matrix_vector_products(model: nn.Module, dtype: torch.dtype, rows: int = 1) -> Step:
    """The floor of decoding: every weight matrix of the model times one vector a row."""
    weights = [m.weight.detach().to(dtype) for m in model.modules() if isinstance(m, nn.Linear)]
    inputs = [torch.randn(rows, weight.shape[1], dtype=dtype) for weight in weights]

    def step() -> None:
        for weight, vector in zip(weights, inputs, strict=True):
            F.linear(vector, weight)

    return step


class _Skip(torch.autograd.Function):
    """Stands in for scan or convolution at no cost, with a gradient for everything that feeds a matrix product."""

    @staticmethod
    def forward(ctx, x, *others):
        ctx.shapes = [None if t is None else t.shape for t in others]
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        def like(shape):
            if shape is None or shape == gradient.shape:
                return None if shape is None else gradient
            return gradient.new_zeros(1).expand(shape)

        return gradient, *map(like, ctx.shapes)


class without_scan_and_convolution:
    """Inside, our model's scan and convolution return their input."""

    def __enter__(self) -> None:
        self.kept = ops.selective_scan, ops.causal_conv1d
        ops.selective_scan = lambda x, dt, A, B, C, D=None, z=None, *a, **kw: _Skip.apply(x, dt, B, C, z)
        ops.causal_conv1d = lambda x, *a, **kw: x

    def __exit__(self, *_: object) -> None:
        ops.selective_scan, ops.causal_conv1d = self.kept
