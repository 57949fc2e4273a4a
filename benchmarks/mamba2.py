"""The suite of Mamba-2 on a CPU, at Mamba-2 130m's shapes: a block, a whole step and decoding beside transformers' own.

    python -m benchmarks.run cpu --only mamba2

Each case runs in a process of its own with a limit of time, so that one that takes too long, or too much memory, costs
that case alone. What has been measured is in mamba2.partial.jsonl beside the results until all is there: a start that
was interrupted, or that ran out of its --minutes, is gone on with by the same command.

mambapy's Mamba-2 needs mamba-ssm's kernels, and so a GPU: there is no figure for it.
"""

import argparse
import json
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn

from hf_mamba import Mamba2Config, Mamba2ForCausalLM
from hf_mamba.sizes import SSD_CHUNK

from .measure import Result, clock, peak_memory
from .peers import OurMixer, Step

OURS, TORCH, STOCK, COMPILED = "hf_mamba", "hf_mamba torch", "transformers", "transformers compiled"
PRODUCTS = "matrix products"
ONCE = 10  # seconds of a first call after which there is no second


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


@dataclass(frozen=True)
class Case:
    """What one process measures.

    Attributes:
        make: (this case, sizes) -> its contestants, a function that makes each.
        limit: seconds for all of them, with what it takes to start and to compile.
    """

    setting: str
    make: Callable[["Case", Sizes], dict[str, Callable[[], Step]]]
    contestants: tuple[str, ...]
    limit: float
    length: int = 0
    dtype: torch.dtype = torch.float32
    tokens: int = 1  # that a call decodes

    def memory(self, sizes: Sizes) -> float:
        """GB that transformers needs: some ten tensors of each pair of a chunk of 256 and head in fp32."""
        return 10 * 4 * self.length * 256 * sizes.heads / 2**30


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
    tokens = torch.randint(0, sizes.vocabulary, (1, case.length // sizes.shorter))

    def of(model: Any) -> Step:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)

        def step() -> None:
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    ours, stock = models(sizes, sizes.layers)
    return {OURS: lambda: of(ours), STOCK: lambda: of(stock)}


def decoding(case: Case, sizes: Sizes) -> dict[str, Callable[[], Step]]:
    count = {"max_new_tokens": case.tokens, "min_new_tokens": case.tokens}
    prompt = torch.ones(1, 1, dtype=torch.long)

    def of(model: Any) -> Step:
        model.eval()
        return lambda: model.generate(prompt, do_sample=False, pad_token_id=0, **count)

    ours, stock = models(sizes, sizes.layers)
    return {OURS: lambda: of(ours), STOCK: lambda: of(stock)}


EAGER = (PRODUCTS, OURS, TORCH, STOCK)
CASES = (  # what says most comes first
    Case("block L=2048 float32", blocks, (*EAGER, COMPILED), 150, 2048),
    Case("step L=512 float32", whole_steps, (OURS, STOCK), 120, 512),
    Case("decoding, a token, float32", decoding, (OURS, STOCK), 60, tokens=32),
    Case("block L=512 float32", blocks, (*EAGER, COMPILED), 90, 512),
    Case("block L=8192 float32", blocks, (PRODUCTS, OURS, STOCK, COMPILED), 180, 8192),
    Case("block L=2048 bfloat16", blocks, EAGER, 90, 2048, torch.bfloat16),
    Case("block L=32768 float32", blocks, (PRODUCTS, OURS, STOCK, COMPILED), 240, 32768),
)


def mamba2(options: Namespace) -> list[Result]:
    """Mamba-2 130m: a block's forward + backward, a whole training step, and decoding, beside transformers'."""
    partial = options.out / "mamba2.partial.jsonl"
    end = time.monotonic() + 60 * options.minutes
    for number, case in enumerate(CASES):
        missing = [name for name in case.contestants if name not in measured(partial, case)]
        start = time.monotonic()
        left = end - start
        if not missing:
            continue
        if left < 30:
            print(f"  left for another start: {case.setting}", flush=True)
            continue
        command = [sys.executable, "-m", "benchmarks.mamba2", str(number), str(partial)]
        command += ["--threads", str(options.threads), "--rounds", str(options.rounds)]
        command += ["--memory-limit", str(options.memory_limit)] + ["--small"] * options.small
        limit = min(case.limit, left)
        why = run(command, limit)
        print(f"  {case.setting}: {time.monotonic() - start:.0f} s{', ' * bool(why)}{why}", flush=True)
        if why and limit == case.limit:
            for name in case.contestants:
                if name not in measured(partial, case):
                    append(partial, Result("mamba2", case.setting, name, note=why))
    found = [(case, measured(partial, case)) for case in CASES]
    if all(name in rows for case, rows in found for name in case.contestants):
        partial.unlink()
    return [rows[name] for case, rows in found for name in case.contestants if name in rows]


def run(command: list[str], limit: float) -> str:
    """Why the process did not come to its end; "" if it did."""
    try:
        code = subprocess.run(command, timeout=limit, check=False).returncode
    except subprocess.TimeoutExpired:
        return f"not within {limit:.0f} s"
    return f"ended with {code}" if code else ""


def measured(partial: Path, case: Case) -> dict[str, Result]:
    """What is known of a case; a later line of a contestant replaces an earlier one."""
    lines = partial.read_text().splitlines() if partial.exists() else []
    found = [Result(**json.loads(line)) for line in lines]
    return {result.name: result for result in found if result.setting == case.setting}


def append(partial: Path, result: Result) -> None:
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("a") as file:
        file.write(json.dumps(asdict(result)) + "\n")


def measure(case: Case, sizes: Sizes, options: Namespace) -> Iterator[Result]:
    """Each contestant's first call, with the memory that it took; then all of them in turn.

    One whose first call took long is not called again. Where compiling is part of it, that is a call before.
    """
    made: dict[str, tuple[Step, Result]] = {}
    makers = case.make(case, sizes)
    for name in case.contestants:
        result = Result("mamba2", case.setting, name)
        if name in (STOCK, COMPILED) and case.memory(sizes) > options.memory_limit:
            yield replace(result, note=f"needs about {case.memory(sizes):.0f} GB, above --memory-limit")
            continue
        step = makers[name]()
        if name == COMPILED:
            result.note = f"compiled in {clock(step):.0f} s"
        first: list[float] = []
        result.peak_mb = peak_memory(lambda step=step, first=first: first.append(clock(step)))
        if first[0] / case.tokens > ONCE:
            yield replace(result, seconds=[first[0] / case.tokens], note=result.note or "one run, first call")
        else:
            if name != COMPILED:
                result.peak_mb = peak_memory(step)  # without what a first call sets up
            yield replace(result, seconds=[first[0] / case.tokens])
            made[name] = step, result
    for _ in range(options.rounds):
        for step, result in made.values():
            result.seconds.append(clock(step) / case.tokens)
    yield from (result for _, result in made.values())


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


def main() -> None:
    """One case, in this process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case", type=int)
    parser.add_argument("partial", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--memory-limit", type=float)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for result in measure(CASES[options.case], SMALL if options.small else Sizes(), options):
        append(options.partial, result)


if __name__ == "__main__":
    main()
