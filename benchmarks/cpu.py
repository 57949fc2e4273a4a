"""The CPU suites, at Mamba-130m's shapes. Each returns results whose ratios to the first contestant are printed."""

import time
from argparse import Namespace
from collections.abc import Callable

import torch
import torch.nn.functional as F

from hf_mamba import MambaConfig, MambaForCausalLM, ops
from hf_mamba.family import get_preset
from hf_mamba.run.processes import keep_freed_memory

from . import peers
from .hybrid import hybrid
from .mamba2 import mamba2
from .measure import Result, alternate, clock, peak_memory

Results = list[Result]
LARGEST = 10  # operations that the profile lists
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
    training_step = _whole_step(options.step_length)

    def without() -> None:
        with peers.without_scan_and_convolution():
            training_step()

    contestants = {"without scan and convolution": without, "hf_mamba": training_step}
    found = alternate("step", f"L={options.step_length}", contestants, options.rounds, once_above=120)
    return list(found.values())


def profile(options: Namespace) -> Results:
    """Where the time of a mixer and of a whole 130m step goes: each operation's own, forward + backward, profiled."""
    mixer = peers.OurMixer(peers.our_model(layers=1, vocab=16), "cpu")
    results = []
    for what, run in (
        ("mixer", peers.training_step(mixer, options.step_length)),
        ("step", _whole_step(options.step_length)),
    ):
        run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            run()
        times = sorted(((e.self_cpu_time_total / 1e6, e.key) for e in found.key_averages()), reverse=True)
        rows = [(sum(seconds for seconds, _ in times), "all operations"), *times[:LARGEST]]
        rows.append((sum(seconds for seconds, _ in times[LARGEST:]), f"{len(times) - LARGEST} others"))
        setting = f"{what} L={options.step_length}"
        results += [Result("profile", setting, name, [seconds]) for seconds, name in rows]
    return results


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


def products(options: Namespace) -> Results:
    """A mixer, a head and steps beside their own matrix products in fp32 and bf16: processor time of all threads.

    Freed memory is kept, as in training. bf16 is autocast's, beside products in bf16.
    """
    keep_freed_memory()
    tiny, six = MambaForCausalLM(MambaConfig(**get_preset("tiny_mamba").config)), peers.our_model(layers=6)
    single, results = peers.our_model(layers=1, vocab=16), []
    head, hidden = torch.nn.Linear(768, 50280, bias=False), torch.randn(512, 768, requires_grad=True)
    labels = torch.randint(0, 50280, (512,))

    def loss() -> None:
        torch.autograd.grad(ops.linear_cross_entropy(hidden, head.weight, labels), (hidden, head.weight))

    mixer = peers.OurMixer(single, "cpu")
    cases = {
        "mixer L=2048": (single.backbone.layers[0], 2048, peers.training_step(mixer, 2048)),
        "head M=512 V=50280": (head, 512, loss),
        "130m step, 6 layers, L=512": (six, 512, _training_step(six, 1, 512)),
        "tiny_mamba step, 8 rows of 256": (tiny, 2048, _training_step(tiny, 8, 256)),
    }
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for setting, (model, rows, run) in cases.items():

            def ours(run=run, dtype=dtype) -> None:
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                    run()

            contestants = {"matrix products": peers.all_products(model, rows, dtype), "hf_mamba": ours}
            found = alternate("products", f"{setting} {name}", contestants, options.rounds, 120, time.process_time)
            results += found.values()
    return results


def decode(options: Namespace) -> Results:
    """Time per generated token, greedy: the weights' products with one vector a row, us, transformers' generate."""
    results = []
    model = peers.our_model().eval()
    stock = peers.stock_model(model.state_dict()).eval()
    for dtype, rows in ((d, rows) for d in (torch.float32, torch.bfloat16) for rows in (1, 4)):
        contestants = {
            "matrix-vector products": peers.matrix_vector_products(model, dtype, rows),
            "hf_mamba": _token(model.to(dtype), options.tokens, rows),
            "transformers": _token(stock.to(dtype), options.tokens, rows),
        }
        setting = str(dtype).removeprefix("torch.") + (f", {rows} padded rows" if rows > 1 else "")
        runs = alternate("decode", setting, contestants, options.rounds)
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


SUITES = {
    **{"scan": scan, "mixer": mixer, "step": step, "profile": profile, "head": head, "decode": decode},
    "products": products,
    "growth": growth,
    "mamba2": mamba2,
    "hybrid": hybrid,
}


def _whole_step(length: int) -> Callable[[], None]:
    return _training_step(peers.our_model(), 1, length, foreach=True)


def _training_step(model: torch.nn.Module, rows: int, length: int, **adamw: bool) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, **(adamw or {"fused": True}))
    tokens = torch.randint(0, model.config.vocab_size, (rows, length))

    def training_step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return training_step


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


def _token(model, tokens: int, rows: int) -> Callable[[], object]:
    """Prompts of one token, or of 1, 2, 3... padded on the left."""
    prompt = torch.ones(rows, rows, dtype=torch.long)
    mask = prompt.triu().flip(0)
    options = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}

    def run() -> None:
        model.generate(prompt, attention_mask=mask, **options)

    return run


def _beyond(last: Result, limits: tuple[float, float]) -> str:
    """Why a contestant stops here: time and memory of the next length, if they only double."""
    seconds, peak = last.median or 0.0, last.peak_mb or 0.0
    if 2 * seconds > limits[0]:
        return f"exceeds {limits[0]:.0f} s"
    return f"exceeds {limits[1] / 1024:.0f} GB" if 2 * peak > limits[1] else ""
