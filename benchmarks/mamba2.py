"""The suite of Mamba-2 on a CPU, at Mamba-2 130m's shapes: a block, a whole step and decoding beside transformers' own.

    python -m benchmarks.run cpu --only mamba2

A step is one of training with AdamW, of the whole model or of two of its layers with a vocabulary of 8,192. mambapy's
Mamba-2 needs mamba-ssm's kernels, and so a GPU: there is no figure for it.
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn

from hf_mamba import Mamba2Config, Mamba2ForCausalLM
from hf_mamba.sizes import SSD_CHUNK

from .apart import COMPILED, OURS, STOCK, TORCH, Case, run_all, run_one
from .measure import Result
from .peers import OurMixer, Step

PRODUCTS = "matrix products"


@dataclass(frozen=True)
class Sizes:
    """Mamba-2 130m; `SMALL` is for rehearsing the suite, and its figures mean nothing."""

    width: int = 768
    heads: int = 24
    head_dim: int = 64
    states: int = 128
    layers: int = 24
    vocabulary: int = 50280
    shorter: int = 1  # by how much rows are


SMALL = Sizes(32, 4, 16, 16, 2, 512, 64)


def blocks(case: Case, sizes: Sizes) -> dict[str, Callable[[], Step]]:
    length = case.length // sizes.shorter
    ours, stock = models(sizes, 1, case.dtype)
    theirs = stock.backbone.layers[0].mixer

    def training(module: nn.Module) -> Step:
        inputs = torch.randn(1, length, sizes.width, dtype=case.dtype, requires_grad=True)
        weight = torch.randn(1, length, sizes.width, dtype=case.dtype)

        def step() -> None:
            inputs.grad = None
            module.zero_grad()
            module(inputs).backward(weight)

        return step

    return {
        PRODUCTS: lambda: matrix_products(ours.backbone.layers[0].mixer, length, sizes),
        OURS: lambda: training(OurMixer(ours, "cpu")),
        TORCH: lambda: training(OurMixer(ours, "torch")),
        STOCK: lambda: training(theirs),
        COMPILED: lambda: training(torch.compile(theirs)),
    }


def whole_steps(case: Case, sizes: Sizes) -> dict[str, Callable[[], Step]]:
    """A step of training with AdamW."""
    ours, stock = models(sizes, sizes.layers)
    tokens = torch.randint(0, ours.config.vocab_size, (1, case.length // sizes.shorter))

    def of(model: Any, call: Any) -> Step:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)

        def step() -> None:
            call(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return {
        OURS: lambda: of(ours, ours),
        STOCK: lambda: of(stock, stock),
        COMPILED: lambda: of(stock, torch.compile(stock)),
    }


def two_layers(case: Case, sizes: Sizes) -> dict[str, Callable[[], Step]]:
    return whole_steps(case, replace(sizes, layers=2, vocabulary=min(sizes.vocabulary, 8192)))


def decoding(case: Case, sizes: Sizes) -> dict[str, Callable[[], Step]]:
    count = {"max_new_tokens": case.tokens, "min_new_tokens": case.tokens}
    prompt = torch.ones(1, 1, dtype=torch.long)

    def of(model: Any) -> Step:
        model.eval()
        return lambda: model.generate(prompt, do_sample=False, pad_token_id=0, **count)

    ours, stock = models(sizes, sizes.layers)
    return {OURS: lambda: of(ours), STOCK: lambda: of(stock)}


PEERS = (OURS, STOCK, COMPILED)
EAGER = (PRODUCTS, OURS, TORCH, STOCK)
CASES = (  # what says most comes first
    Case("block L=2048 float32", blocks, (*EAGER, COMPILED), 150, 2048),
    Case("step L=512 float32", whole_steps, (OURS, STOCK), 120, 512),
    Case("decoding, a token, float32", decoding, (OURS, STOCK), 60, tokens=32),
    Case("block L=512 float32", blocks, (*EAGER, COMPILED), 90, 512),
    Case("block L=8192 float32", blocks, (PRODUCTS, OURS, STOCK, COMPILED), 180, 8192),
    Case("block L=2048 bfloat16", blocks, EAGER, 90, 2048, torch.bfloat16),
    Case("block L=32768 float32", blocks, (PRODUCTS, OURS, STOCK, COMPILED), 240, 32768),
    Case("step of two layers L=512 float32", two_layers, PEERS, 120, 512),
    Case("step of two layers L=2048 float32", two_layers, PEERS, 180, 2048),
    Case("step of two layers L=8192 float32", two_layers, PEERS, 240, 8192),
)


def mamba2(options: Namespace) -> list[Result]:
    """Mamba-2 130m: a block's forward + backward, a whole training step, and decoding, beside transformers'."""
    return run_all("mamba2", CASES, options)


def models(sizes: Sizes, layers: int, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Ours, and transformers' with the same weights; a block alone has a vocabulary of 16."""
    torch.manual_seed(0)
    vocabulary = 16 if layers == 1 else sizes.vocabulary
    own = Mamba2Config(
        hidden_size=sizes.width, num_heads=sizes.heads, head_dim=sizes.head_dim, state_size=sizes.states, n_groups=1,
        num_hidden_layers=layers, vocab_size=vocabulary, tie_word_embeddings=True,
    )  # fmt: skip
    ours = Mamba2ForCausalLM(own)
    stock = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**own.to_dict()))
    stock.load_state_dict(ours.state_dict())
    for name, parameter in ours.to(dtype).named_parameters():
        if name.endswith(("A_log", "mixer.D", "dt_bias")):
            parameter.data = parameter.data.float()
    return ours, stock.to(dtype)


def matrix_products(mixer: Any, length: int, sizes: Sizes) -> Step:
    """The floor: a block's own products, forward and backward: both projections, and those of ssd by chunk, in fp32."""
    weights = [layer.weight.detach() for layer in (mixer.in_proj, mixer.out_proj)]
    inputs = [weight.new_empty(length, weight.shape[1]).normal_() for weight in weights]
    gradients = [weight.new_empty(length, weight.shape[0]).normal_() for weight in weights]
    steps, wide, heads = SSD_CHUNK, sizes.heads * sizes.head_dim, sizes.heads
    shared, pairs = torch.randn(steps, sizes.states), torch.randn(steps, steps)
    rows, state = torch.randn(steps, wide), torch.randn(wide, sizes.states)
    by_head, masks = torch.randn(heads, steps, sizes.head_dim), torch.randn(heads, steps, steps)

    def chunk() -> None:
        shared @ shared.t(), masks @ by_head, shared @ state.t(), rows.t() @ shared  # forward
        shared @ shared.t(), masks.mT @ by_head, by_head @ by_head.mT, shared @ state.t()
        pairs @ shared, pairs.t() @ shared, rows @ state, rows @ state, rows.t() @ shared

    def step() -> None:
        for weight, given, gradient in zip(weights, inputs, gradients, strict=True):
            F.linear(given, weight), gradient @ weight, gradient.t() @ given
        for _ in range(0, length, steps):
            chunk()

    return step


if __name__ == "__main__":
    run_one("mamba2", CASES, Sizes(), SMALL)
