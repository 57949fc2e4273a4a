"""Our kernels on one GPU: beside mamba-ssm's and causal-conv1d's where they work, in a decoding and a training model.

    python -m benchmarks.triton_gpu [--only scan,decode] [--dtype bf16] [--repeats 20] [--minutes 8] [--out FILE]

Suites: scan, convolution, decode, step, head, growth. Needs torch, triton and transformers. Every row is written as
soon as it is measured; after `--minutes` nothing new is begun, and what was left out is named.

`device_ms` is the GPU's own time, between two events in front of which the GPU was kept waiting until the host had
sent everything (longer than WAIT ms of sending would show); `host_ms` is how long the host takes to send it. A call
costs the greater of the two. Contestants take turns and get inputs in their own layout: no transposition is timed.
The scan is also timed at fixed numbers of segments, to check the rule in `triton_launch.split`, and mamba-ssm's once
more as the dispatcher would call it, from our layout. At the end `verdict` says what the times mean for these rules.
"""

import argparse
import csv
import gc
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .measure import triton_segments

# (B, L, E, N): the 2.8B model's layer at a full batch, the 130M's, long and short sequences, one document
SHAPES = (
    (8, 2048, 5120, 16),
    (8, 2048, 1536, 16),
    (1, 2048, 5120, 16),
    (1, 2048, 1536, 16),
    (1, 32768, 1536, 16),
    (64, 512, 1536, 16),
    (2, 2048, 1536, 64),
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
COLUMNS = (
    *("suite", "setting", "contestant", "phase", "dtype", "device_ms", "least_ms", "greatest_ms", "host_ms"),
    *("peak_mb", "rounds", "machine"),
)
WAIT = 3  # ms
LONGEST = 3.0  # seconds that one step of the growth suite may take
DISPATCHED = "mamba-ssm from our layout"
Step = Callable[[], object]
Contest = tuple[str, str, dict[str, Step]]  # setting, phase, contestants


def forward_and_backward(function: Callable, inputs: list[Tensor]) -> tuple[Step, Step]:
    """A forward that saves for the backward, and a backward through a graph that is kept."""
    for value in inputs:
        value.requires_grad_()
    y = function(*inputs)
    grad = torch.randn_like(y)
    return lambda: function(*inputs), lambda: torch.autograd.grad(y, inputs, grad, retain_graph=True)


def both_phases(setting: str, contestants: dict[str, tuple[Step, Step]]) -> Iterator[Contest]:
    for index, phase in enumerate(("forward", "backward")):
        yield setting, phase, {name: steps[index] for name, steps in contestants.items()}


def served(backend: str, op: str, *arguments: torch.Tensor) -> torch.Tensor:
    """One of the public operations by one of the backends."""
    from hf_mamba import ops

    with ops.backend(backend):
        return getattr(ops, op)(*arguments)


def split_into(segments: int, step: Step) -> object:
    """A step of the scan with about that many segments, whatever the rule says."""
    with triton_segments(segments):
        return step()


def scan(dtype: torch.dtype) -> Iterator[Contest]:
    from hf_mamba.ops import mamba_ssm as mamba_ssm_backend

    for batch, length, width, states in SHAPES:
        x, dt, z = (torch.randn(batch, length, width, device="cuda", dtype=dtype) for _ in range(3))
        B, C = (torch.randn(batch, length, states, device="cuda", dtype=dtype) for _ in range(2))
        A = -torch.arange(1, states + 1, device="cuda", dtype=torch.float32).repeat(width, 1)
        D, bias = torch.ones(width, device="cuda"), torch.randn(width, device="cuda") - 4
        found = {
            "triton": forward_and_backward(partial(served, "triton", "selective_scan"), [x, dt, A, B, C, D, z, bias])
        }
        for segments in (1, 2, 4, 8):
            if segments * 64 < length:
                steps = forward_and_backward(partial(served, "triton", "selective_scan"), [x, dt, A, B, C, D, z, bias])
                found[f"triton, {segments} segments"] = tuple(partial(split_into, segments, step) for step in steps)
        if mamba_ssm_backend.unavailable() is None:
            from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

            u, delta, gate, Bt, Ct = (v.detach().transpose(1, 2).contiguous() for v in (x, dt, z, B, C))
            theirs = [u, delta, A.detach().clone(), Bt, Ct, D.detach().clone(), gate, bias.detach().clone()]
            found["mamba-ssm"] = forward_and_backward(partial(selective_scan_fn, delta_softplus=True), theirs)
            found[DISPATCHED] = forward_and_backward(
                partial(served, "mamba_ssm", "selective_scan"), [x, dt, A, B, C, D, z, bias]
            )
        yield from both_phases(f"B={batch} L={length} E={width} N={states}", found)
        del found  # before the next shape's are built


def convolution(dtype: torch.dtype) -> Iterator[Contest]:
    from hf_mamba.ops import mamba_ssm as mamba_ssm_backend

    for batch, length, width, _ in SHAPES:
        x = torch.randn(batch, length, width, device="cuda", dtype=dtype)
        weight, bias = (torch.randn(*size, device="cuda", dtype=dtype) for size in ((width, 4), (width,)))
        found = {"triton": forward_and_backward(partial(served, "triton", "causal_conv1d"), [x, weight, bias])}
        if mamba_ssm_backend.unavailable() is None and mamba_ssm_backend.fault_of("causal_conv1d") is None:
            from causal_conv1d import causal_conv1d_fn

            theirs = [x.detach().transpose(1, 2).contiguous(), weight.detach().clone(), bias.detach().clone()]
            found["causal-conv1d"] = forward_and_backward(partial(causal_conv1d_fn, activation="silu"), theirs)
        yield from both_phases(f"B={batch} L={length} E={width} k=4", found)
        del found


def decode(dtype: torch.dtype) -> Iterator[Contest]:
    """One token of a 130m model: call by call, as one captured graph, and transformers' model call by call."""
    from . import peers

    model = peers.our_model().eval()
    stock = peers.stock_model(model.state_dict()).to("cuda", dtype).eval()
    model.to("cuda", dtype)
    for batch in (1, 64):
        ours = token(model, batch)
        yield (
            f"B={batch}",
            "token",
            {"CUDA graph": captured(ours), "hf_mamba": ours, "transformers": token(stock, batch)},
        )


def token(model: torch.nn.Module, batch: int) -> Step:
    """One more token for every row, through the model's own cache."""
    prompt = torch.randint(0, 50280, (batch, 8), device=next(model.parameters()).device)
    with torch.no_grad():
        cache = model(prompt, use_cache=True).cache_params

    @torch.no_grad()
    def step() -> Tensor:
        return model(prompt[:, :1], cache_params=cache, use_cache=True).logits

    return step


def captured(step: Step) -> Step:
    """The step as a CUDA graph; its first calls, outside, compile what it needs."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def step(dtype: torch.dtype) -> Iterator[Contest]:
    """A training step without the optimizer: tokens of several documents a row, autocast over fp32 weights."""
    from hf_mamba import PRESETS, MambaConfig, MambaForCausalLM

    for preset, batch in (("130m_mamba", 8), ("370m_mamba", 8), ("1.4b_mamba", 4)):
        with torch.device("cuda"):
            model = MambaForCausalLM(MambaConfig(**PRESETS[preset].config)).train()
        ids = torch.randint(0, 50280, (batch, 2048), device="cuda")
        seq_idx = (torch.arange(2048, device="cuda") // 700).int().expand(batch, -1).contiguous()

        def run(model=model, ids=ids, seq_idx=seq_idx) -> None:
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                loss = model(input_ids=ids, labels=ids, seq_idx=seq_idx).loss
            loss.backward()
            model.zero_grad()

        yield f"{preset} B={batch} L=2048", "forward and backward", {"hf_mamba": run}
        del model, run


def head(dtype: torch.dtype) -> Iterator[Contest]:
    from hf_mamba import ops

    rows, vocab = 16_384, 50_280
    for width in (768, 2560):
        hidden = torch.randn(rows, width, device="cuda", dtype=dtype, requires_grad=True)
        weight = (torch.randn(vocab, width, device="cuda", dtype=dtype) * 0.02).requires_grad_()
        labels = torch.randint(0, vocab, (rows,), device="cuda")

        def plain(hidden=hidden, weight=weight, labels=labels) -> None:
            loss = F.cross_entropy(F.linear(hidden, weight).float(), labels)
            torch.autograd.grad(loss, (hidden, weight))

        def chunked(hidden=hidden, weight=weight, labels=labels) -> None:
            torch.autograd.grad(ops.linear_cross_entropy(hidden, weight, labels), (hidden, weight))

        contestants = {"hf_mamba": chunked, "all logits": plain}
        yield f"M={rows} V={vocab} d={width}", "forward and backward", contestants


def growth(dtype: torch.dtype) -> Iterator[Contest]:
    """A whole 130m mixer against the length, one row; transformers' takes CUDA kernels where they are installed."""
    from . import peers

    model = peers.our_model(layers=1, vocab=16)
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    modules = {f"hf_mamba {name}": peers.OurMixer(model, name) for name in ("triton", "torch")}
    modules["transformers"] = peers.stock_mixer(weights)
    if importlib.util.find_spec("mambapy"):
        modules["transformers mambapy"] = peers.stock_mixer(weights, use_mambapy=True)
    for module in modules.values():
        module.to("cuda", dtype)
    for length in (2**k for k in range(8, 20)):
        x = torch.randn(1, length, 768, device="cuda", dtype=dtype, requires_grad=True)

        def run(module, x=x) -> None:
            y = module(x)
            torch.autograd.grad(y, [x, *module.parameters()], torch.ones_like(y))

        found: dict[str, Step] = {name: partial(run, module) for name, module in modules.items()}
        for name in list(modules):
            if reason := beyond(found[name]):
                print(f"growth: {name} {reason} at L={length}", file=sys.stderr, flush=True)
                del modules[name], found[name]
        if not modules:
            return
        floor = peers.matrix_products(model.backbone.layers[0].mixer, length, backward=True)
        yield f"L={length}", "forward and backward", {"matrix products": floor, **found}


def beyond(run: Step) -> str:
    """Why a step is too much for the growth suite, or nothing; its first call may compile."""
    try:
        run()
        return "takes too long" if clock(run) > LONGEST else ""
    except torch.OutOfMemoryError:
        return "does not fit"


SUITES = {"scan": scan, "convolution": convolution, "decode": decode, "step": step, "head": head, "growth": growth}


def clock(run: Step) -> float:
    """Seconds until the device is done."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def alternate(steps: dict[str, Step], repeats: int) -> dict[str, dict[str, list[float] | float]]:
    """Milliseconds of the device and of the host, one run of each in turn after warm-up; MB above what was in use."""
    found: dict[str, dict] = {name: {"device": [], "host": []} for name in steps}
    for name, run in steps.items():
        run()  # compiles
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        found[name]["peak"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    ticks = int(WAIT * 1.5e6)  # at most 2 GHz
    for _ in range(repeats):
        for name, run in steps.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(ticks)
            begin.record()
            start = time.perf_counter()
            run()
            found[name]["host"].append((time.perf_counter() - start) * 1e3)
            end.record()
            end.synchronize()
            found[name]["device"].append(begin.elapsed_time(end))
    return found


def measure(suites: list[str], dtype: str, repeats: int, deadline: float) -> Iterator[dict[str, Any]]:
    """A row for every contestant of every contest, as they are measured; what does not run is named on stderr."""
    import triton

    machine = f"{torch.cuda.get_device_name()}; torch {torch.__version__}; triton {triton.__version__}"
    for suite in suites:
        contests = SUITES[suite](DTYPES[dtype])
        while time.monotonic() < deadline:
            try:
                setting, phase, steps = next(contests)
                found = alternate(steps, repeats)
            except StopIteration:
                break
            except Exception as error:  # one suite's fault must not cost the others their time on the device
                print(f"{suite} stopped: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                break
            for name, figures in found.items():
                device = figures["device"]
                yield {
                    **{"suite": suite, "setting": setting, "contestant": name, "phase": phase, "dtype": dtype},
                    **{"device_ms": round(statistics.median(device), 4), "least_ms": round(min(device), 4)},
                    **{"greatest_ms": round(max(device), 4), "host_ms": round(statistics.median(figures["host"]), 4)},
                    **{"peak_mb": round(figures["peak"]), "rounds": repeats, "machine": machine},
                }
            del steps
        else:
            print(f"{suite}: not finished, the time is up.", file=sys.stderr, flush=True)
        del contests
        gc.collect()
        torch.cuda.empty_cache()


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """What the scan's times say: ours against the CUDA kernel, and the rules against what they did not choose."""
    contests: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if row["suite"] == "scan":
            contests.setdefault((row["setting"], row["phase"]), {})[row["contestant"]] = row["device_ms"]
    lines = []
    for (setting, phase), times in contests.items():
        ours, where = times["triton"], f"{setting} {phase}"
        if "mamba-ssm" in times:
            lines.append(f"{where}: {times['mamba-ssm'] / ours:.2f} of mamba-ssm's speed")
        if times.get(DISPATCHED, ours) < 0.95 * ours:
            lines.append(f"{where}: dispatch should choose mamba_ssm here")
        best = min((name for name in times if name.startswith("triton")), key=times.__getitem__)
        if times[best] < 0.95 * ours:
            lines.append(f"{where}: triton_launch.split should do as '{best}': {times[best] / ours:.2f} of the time")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help=f"suites, separated by commas: {', '.join(SUITES)}")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=8, help="begin nothing new after these")
    parser.add_argument("--out", type=Path, default=Path("triton_gpu.csv"))
    options = parser.parse_args(arguments)
    suites = list(SUITES) if options.only is None else options.only.split(",")
    if unknown := [name for name in suites if name not in SUITES]:
        print(f"Unknown suite {', '.join(unknown)}: choose from {', '.join(SUITES)}.", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("PyTorch sees no CUDA device: there is nothing to measure here.", file=sys.stderr)
        return 1
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in measure(suites, options.dtype, options.repeats, time.monotonic() + 60 * options.minutes):
            rows.append(row)
            writer.writerow(row)
            file.flush()
            print(*list(row.values())[:-2], sep="  ", flush=True)
    print(*verdict(rows), sep="\n")
    if grown := [row for row in rows if row["suite"] == "growth"]:
        from .measure import Result
        from .plots import plot_growth

        results = [Result("growth", r["setting"], r["contestant"], [r["device_ms"] / 1e3], r["peak_mb"]) for r in grown]
        plot_growth(results, options.out.with_suffix(".png"), f"{options.dtype}, {torch.cuda.get_device_name()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
