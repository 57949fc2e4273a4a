"""The suite of Mamba-2 on a CPU, at Mamba-2 130m's shapes: a block, a whole step and decoding beside transformers' own.

mambapy's Mamba-2 needs mamba-ssm's kernels, and so a GPU: there is no figure for it.
"""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn

from hf_mamba import Mamba2Config, Mamba2ForCausalLM
from hf_mamba.sizes import SSD_CHUNK

from .measure import Result, alternate, clock, peak_memory
from .peers import OurMixer, Step

HEADS, WIDTH, STATES, GROUPS = 24, 64, 128, 1
Results = list[Result]


def mamba2(options: Namespace) -> Results:
    """Mamba-2 130m: a block's forward + backward, a whole training step, and decoding, beside transformers'."""
    results: Results = []
    for length in (512, 2048, 8192, 32768) if options.long else (512, 2048):
        results += _block(length, torch.float32, options)
    results += _block(2048, torch.bfloat16, options)
    return results + _step(options) + _decode(options)


def models(layers: int, vocab: int = 50280, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Ours, and transformers' with the same weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "num_heads": HEADS, "head_dim": WIDTH, "state_size": STATES, "n_groups": GROUPS}
    own = Mamba2Config(**sizes, num_hidden_layers=layers, vocab_size=vocab, tie_word_embeddings=True)
    ours = Mamba2ForCausalLM(own)
    stock = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**own.to_dict()))
    stock.load_state_dict(ours.state_dict())
    for name, parameter in ours.to(dtype).named_parameters():
        if name.endswith(("A_log", "mixer.D", "dt_bias")):
            parameter.data = parameter.data.float()
    return ours, stock.to(dtype)


def matrix_products(mixer: Any, length: int) -> Step:
    """The floor: a block's own products, forward and backward: both projections, and those of ssd by chunk, in fp32."""
    weights = [layer.weight.detach() for layer in (mixer.in_proj, mixer.out_proj)]
    inputs = [weight.new_empty(length, weight.shape[1]).normal_() for weight in weights]
    gradients = [weight.new_empty(length, weight.shape[0]).normal_() for weight in weights]
    steps, wide = SSD_CHUNK, HEADS * WIDTH
    shared, pairs = torch.randn(steps, STATES), torch.randn(steps, steps)
    rows, state = torch.randn(steps, wide), torch.randn(wide, STATES)
    heads, masks = torch.randn(HEADS, steps, WIDTH), torch.randn(HEADS, steps, steps)

    def chunk() -> None:
        shared @ shared.t(), masks @ heads, shared @ state.t(), rows.t() @ shared  # forward
        shared @ shared.t(), masks.mT @ heads, heads @ heads.mT, shared @ state.t()
        pairs @ shared, pairs.t() @ shared, rows @ state, rows @ state, rows.t() @ shared

    def step() -> None:
        for weight, given, gradient in zip(weights, inputs, gradients, strict=True):
            F.linear(given, weight), gradient @ weight, gradient.t() @ given
        for _ in range(0, length, steps):
            chunk()

    return step


def _block(length: int, dtype: torch.dtype, options: Namespace) -> Results:
    ours, stock = models(1, 16, dtype)
    mixers: dict[str, nn.Module] = {f"hf_mamba {name}": OurMixer(ours, name) for name in ("cpu", "torch")}
    theirs = stock.backbone.layers[0].mixer
    left_out = _beyond(length, options)
    if not left_out:
        mixers["transformers"] = theirs
    if (length == 2048 and dtype == torch.float32) or (options.long and length < 8192):
        mixers["transformers compiled"] = torch.compile(theirs)
    contestants = {"matrix products": matrix_products(ours.backbone.layers[0].mixer, length)}
    contestants |= {name: _training(mixer, length, dtype) for name, mixer in mixers.items()}
    if "transformers compiled" in contestants:
        clock(contestants["transformers compiled"])  # compilation is not counted
    setting = f"block L={length} {str(dtype).removeprefix('torch.')} forward+backward"
    found = alternate("mamba2", setting, contestants, options.rounds, once_above=60)
    for name, run in contestants.items():
        found[name].peak_mb = peak_memory(run)
    if left_out:
        found["transformers"] = Result("mamba2", setting, "transformers", note=left_out)
    return list(found.values())


def _beyond(length: int, options: Namespace) -> str:
    """Why transformers is left out: it builds some ten tensors of each pair of a chunk of 256 and head in fp32."""
    needed = 10 * 4 * length * 256 * HEADS / 2**30
    return f"needs about {needed:.0f} GB, above --memory-limit" if needed > options.memory_limit else ""


def _training(module: nn.Module, length: int, dtype: torch.dtype) -> Step:
    inputs = torch.randn(1, length, 768, dtype=dtype, requires_grad=True)
    weight = torch.randn(1, length, 768, dtype=dtype)

    def step() -> None:
        inputs.grad = None
        module.zero_grad()
        module(inputs).backward(weight)

    return step


def _step(options: Namespace) -> Results:
    tokens = torch.randint(0, 50280, (1, 512))

    def of(model: Any) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)

        def step() -> None:
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    ours, stock = models(24)
    contestants = {"hf_mamba": of(ours), "transformers": of(stock)}
    found = alternate("mamba2", "step L=512 float32", contestants, options.rounds, once_above=120)
    for name, run in contestants.items():
        found[name].peak_mb = peak_memory(run)
    return list(found.values())


def _decode(options: Namespace) -> Results:
    ours, stock = (model.eval() for model in models(24))
    prompt = torch.ones(1, 1, dtype=torch.long)
    length = {"do_sample": False, "max_new_tokens": options.tokens, "min_new_tokens": options.tokens, "pad_token_id": 0}
    contestants = {
        "hf_mamba": lambda: ours.generate(prompt, **length),
        "transformers": lambda: stock.generate(prompt, **length),
    }
    found = alternate("mamba2", "decoding, a token, float32", contestants, options.rounds, once_above=60)
    for result in found.values():
        result.seconds = [seconds / options.tokens for seconds in result.seconds]
    return list(found.values())
