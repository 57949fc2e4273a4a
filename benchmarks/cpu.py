"""The CPU suites, at Mamba-130m's shapes. Each returns results whose ratios to the first contestant are printed."""

from argparse import Namespace
from collections.abc import Callable

import torch
import torch.nn.functional as F

from hf_mamba import ops

from . import peers
from .measure import Result, alternate, clock, peak_memory

Results = list[Result]
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


def scan(options: Namespace) -> Results:
    """selective_scan alone (bias, softplus, D and gate included), forward and forward + backward."""
    from mambapy.pscan import pscan

    width, states, results = 1536, 16, []
    for length in (512, 2048):
        x, dt, z = (torch.randn(1, length, width, requires_grad=True) for _ in range(3))
        B, C = (torch.randn(1, length, states, requires_grad=True) for _ in range(2))
        A = (-torch.arange(1.0, states + 1).repeat(width, 1)).requires_grad_()
        D, bias = torch.ones(width, requires_grad=True), torch.full((width,), -4.0, requires_grad=True)
        inputs = (x, dt, A, B, C, D, z, bias)

        def mambapy(x, dt, A, B, C, D, z, bias):
            delta = F.softplus(dt + bias)
            states = pscan(torch.exp(delta[..., None] * A), (delta * x)[..., None] * B[:, :, None])
            return ((states @ C[..., None]).squeeze(3) + D * x) * F.silu(z)

        functions = {f"hf_mamba {name}": _under(name, ops.selective_scan) for name in ("cpu", "torch")}
        functions["mambapy pscan"] = mambapy
        for phase in ("forward", "forward+backward"):
            contestants = {name: _scan_step(f, inputs, phase != "forward") for name, f in functions.items()}
            found = alternate("scan", f"L={length} {phase}", contestants, options.rounds)
            for name, step in contestants.items():
                found[name].peak_mb = peak_memory(step)
            results += found.values()
    return results


def mixer(options: Namespace) -> Results:
    """One whole mixer beside its own matrix products."""
    results = []
    model = peers.our_model(layers=1, vocab=16)
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    floor = model.backbone.layers[0].mixer
    for length in (512, 2048):
        modules = peers.mixers(model, weights)
        modules["transformers compiled"] = torch.compile(peers.stock_mixer(weights, use_associative_scan=True))
        left_out = [] if options.long else ["transformers loop"] + ["transformers compiled"] * (length == 512)
        for name in left_out:
            del modules[name]
        if length > 512:
            modules.pop("transformers loop", None)  # its backward alone would take a quarter of an hour
        for phase, make in (("forward", peers.inference_step), ("forward+backward", peers.training_step)):
            contestants = {"matrix products": peers.matrix_products(floor, length, phase != "forward")}
            contestants |= {name: make(module, length) for name, module in modules.items()}
            if "transformers compiled" in contestants:
                clock(contestants["transformers compiled"])  # compilation is not counted
            results += alternate("mixer", f"L={length} {phase}", contestants, options.rounds).values()
    return results


def step(options: Namespace) -> Results:
    """A whole 130m training step (head, loss and AdamW included) beside the same one without scan and convolution."""
    model = peers.our_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
    tokens = torch.randint(0, 50280, (1, options.step_length))

    def training_step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def without() -> None:
        with peers.without_scan_and_convolution():
            training_step()

    contestants = {"without scan and convolution": without, "hf_mamba": training_step}
    found = alternate("step", f"L={options.step_length}", contestants, options.rounds, once_above=120)
    return list(found.values())


def head(options: Namespace) -> Results:
    """The language-model head with its loss: all logits at once, and in chunks of rows."""
    rows, width, vocab = 2048, 768, 50280
    hidden, weight = torch.randn(rows, width, requires_grad=True), torch.randn(vocab, width, requires_grad=True)
    labels = torch.randint(0, vocab, (rows,))

    def plain() -> None:
        torch.autograd.grad(F.cross_entropy(F.linear(hidden, weight), labels), (hidden, weight))

    def chunked() -> None:
        torch.autograd.grad(ops.linear_cross_entropy(hidden, weight, labels), (hidden, weight))

    contestants = {"all logits": plain, "hf_mamba chunked": chunked}
    results = alternate("head", f"M={rows} V={vocab}", contestants, options.rounds)
    for name, run in contestants.items():
        results[name].peak_mb = peak_memory(run)
    return list(results.values())


def decode(options: Namespace) -> Results:
    """Time per generated token, greedy, batch 1: the weights' matrix-vector products, us, transformers' generate."""
    results = []
    model = peers.our_model().eval()
    stock = peers.stock_model(model.state_dict()).eval()
    for dtype in (torch.float32, torch.bfloat16):
        contestants = {
            "matrix-vector products": peers.matrix_vector_products(model, dtype),
            "hf_mamba": _token(model.to(dtype), options.tokens),
            "transformers": _token(stock.to(dtype), options.tokens),
        }
        runs = alternate("decode", str(dtype).removeprefix("torch."), contestants, options.rounds)
        for name, result in runs.items():
            if name != "matrix-vector products":
                result.seconds = [seconds / options.tokens for seconds in result.seconds]
        results += runs.values()
    return results


def growth(options: Namespace) -> Results:
    """Time and peak memory of a mixer's forward + backward against the length."""
    model = peers.our_model(layers=1, vocab=16)
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    modules = peers.mixers(model, weights)
    limits = options.time_limit, options.memory_limit * 1024
    stopped: dict[str, str] = {}
    last: dict[str, Result] = {}
    results = []
    for length in LENGTHS:
        contestants = {}
        for name, module in modules.items():
            if name in last and name not in stopped:
                stopped[name] = _beyond(last[name], limits)
            if not stopped.get(name):
                stopped.pop(name, None)
                contestants[name] = peers.training_step(module, length)
        found = alternate("growth", f"L={length}", contestants, 1 if length > 4096 else 2, once_above=3.0)
        for name, run in contestants.items():
            if found[name].median < limits[0]:
                found[name].peak_mb = peak_memory(run)
        last |= found
        left_out = {name: Result("growth", f"L={length}", name, note=why) for name, why in stopped.items()}
        results += [(found | left_out)[name] for name in modules]
    return results


SUITES = {"scan": scan, "mixer": mixer, "step": step, "head": head, "decode": decode, "growth": growth}


def _under(backend: str, function: Callable) -> Callable:
    def run(*args):
        with ops.backend(backend):
            return function(*args)

    return run


def _scan_step(function: Callable, inputs: tuple, backward: bool) -> Callable[[], object]:
    weight = torch.randn_like(inputs[0])

    def run() -> None:
        with torch.set_grad_enabled(backward):
            y = function(*inputs)
            if backward:
                torch.autograd.grad(y, inputs, weight)

    return run


def _token(model, tokens: int) -> Callable[[], object]:
    prompt = torch.tensor([[1]])
    mask = torch.ones_like(prompt)

    def run() -> None:
        model.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens)

    return run


def _beyond(last: Result, limits: tuple[float, float]) -> str:
    """Why a contestant stops here: time and memory of the next length, if they only double."""
    seconds, peak = last.median or 0.0, last.peak_mb or 0.0
    if 2 * seconds > limits[0]:
        return f"exceeds {limits[0]:.0f} s"
    return f"exceeds {limits[1] / 1024:.0f} GB" if 2 * peak > limits[1] else ""
