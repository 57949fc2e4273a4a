"""Compile for sm_80, sm_90 and sm_100 what the Triton backend would start on a GPU, without one; read the machine code.

    python -m benchmarks.triton_compile [--out benchmarks/results/triton_compile.csv] [--arch 90] [--kernel NAME]

`triton_launch` itself is called, with small CPU tensors, under a driver that compiles and starts nothing: types,
specialisations and options are those of a real launch. Needs torch and triton. Rows are written as they come.

Exit status 1 if a variant does not compile, needs more shared memory than a block has, or spills more than its limit.
`loop` counts the machine instructions of the largest inner loop (UNROLL or BLOCK steps), of these `barriers`,
`shuffles` and `shared_accesses`. `per_update` are a scan's instructions per state, channel and step, all of its loops
together: what bounds a kernel limited by instruction issue. These are counts out of the compiler, not times.
"""

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hf_mamba.ops.operands import Conv, ConvStep, GatedNorm, Norm, Scan, Ssd, Step

from .measure import triton_segments

HERE = Path(__file__).parent
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes a block may ask for
# Bytes of stack that a variant may need: spills of the forward from N = 64 on, of the backwards
STACK_LIMIT = {
    **{"scan_forward": {16: 64, 64: 64, 128: 512}, "scan_backward": {128: 256}},
    **{"outputs": {256: 2048}, "input_gradients": {256: 2048}, "shared_gradients": {256: 2048}},
}
COLUMNS = (
    *("variant", "kernel", "arch", "triton", "N", "block", "warps", "registers", "stack_bytes", "shared_bytes"),
    *("spill_instructions", "instructions", "loop", "barriers", "shuffles", "shared_accesses", "per_update", "seconds"),
)
OPTIONAL = ("D", "z", "dt_bias", "initial_state", "seq_idx")
Variant = tuple[str, Callable[[], object]]


class Compiler:
    """Stands where Triton's CUDA driver would: kernels are compiled for `arch`, kept, and not started."""

    def __init__(self, arch: int, device: int) -> None:
        self.arch, self.device = arch, device
        self.utils = self
        self.kept: list[tuple[Any, Any, bytes]] = []

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.device  # kernels are remembered by device: another one for every variant, so that all are compiled

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_LIMIT[self.arch]}

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        self.kept.append((source, metadata, b""))
        return lambda *arguments: None

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        self.kept[-1] = (*self.kept[-1][:2], binary)
        return 1, 1, 0, 0, 1024  # handles, registers, spills, threads


def scan(
    dtype: torch.dtype, states: int, *absent: str, width: int = 1536, length: int = 128, segments: int = 1
) -> None:
    """A forward that saves, and its backward, as training starts them."""
    from hf_mamba.ops.triton import launch as triton_launch

    batch = 2 if width > 1 else 1
    inputs = {name: torch.randn(batch, length, 2 * width).to(dtype)[..., :width] for name in ("x", "dt", "z")}
    inputs |= {name: torch.randn(batch, length, states).to(dtype) for name in ("B", "C")}
    inputs |= {"A": -torch.rand(width, states), "D": torch.ones(width), "dt_bias": torch.ones(width)}
    inputs |= {"initial_state": torch.zeros(batch, width, states)}
    inputs |= {"seq_idx": torch.zeros(batch, length, dtype=torch.int32)}
    inputs |= {"dt_softplus": "softplus" not in absent}  # type: ignore[dict-item]
    inputs |= {name: None for name in absent if name in OPTIONAL}  # type: ignore[misc]
    operands = Scan(**inputs)  # type: ignore[arg-type]
    with triton_segments(segments):
        y, last, saved = triton_launch.scan_forward(operands, "save" not in absent)
        if "save" not in absent:
            triton_launch.scan_backward(operands, saved, y, last)


def convolution(dtype: torch.dtype, taps: int, *absent: str) -> None:
    from hf_mamba.ops.triton import launch as triton_launch

    x, weight = torch.randn(2, 20, 128).to(dtype), torch.randn(128, taps)
    bias = None if "bias" in absent else torch.randn(128).to(dtype)
    initial = None if "initial_state" in absent or taps == 1 else torch.randn(2, 128, taps - 1).to(dtype)
    seq_idx = None if "seq_idx" in absent else torch.zeros(2, 20, dtype=torch.int32)
    operands = Conv(x, weight, bias, initial, seq_idx, "silu" not in absent)
    y, saved = triton_launch.conv_forward(operands, True)
    triton_launch.conv_backward(operands, saved, y)


def norm(dtype: torch.dtype, width: int, added: bool) -> None:
    from hf_mamba.ops.triton import launch as triton_launch

    x, residual, weight = torch.randn(3, width).to(dtype), torch.randn(3, width), torch.ones(width).to(dtype)
    operands = Norm(x, residual if added else None, weight, 1e-5)
    y, total, rstd = triton_launch.norm_forward(operands, True)
    kept = operands._replace(residual=total) if added else operands
    triton_launch.norm_backward(kept, rstd, y, total if added else None)


def decode(dtype: torch.dtype, states: int, taps: int, *absent: str) -> None:
    from hf_mamba.ops.triton import launch as triton_launch

    x, dt, z = torch.randn(3, 2, 64).to(dtype)
    B, C = torch.randn(2, 2, states).to(dtype)
    D, z, bias = (None if name in absent else value for name, value in (("D", z[0].float()), ("z", z), ("bias", dt[0])))
    A, state = -torch.rand(64, states), torch.zeros(2, 64, states)
    triton_launch.scan_step(Step(state, x, dt, A, B, C, D, z, bias, "softplus" not in absent))
    window = torch.zeros(2, 64, taps, dtype=dtype)
    triton_launch.conv_step(ConvStep(window, x, torch.randn(64, taps), bias, "silu" not in absent))


def dual(dtype: torch.dtype, width: int, states: int, groups: int, *absent: str, blackwell: bool = False) -> None:
    """ssd's forward that saves, its backward and a decoding step."""
    from hf_mamba.ops.triton import ssd_launch

    if blackwell:  # the rule asks the device, and there is none
        ssd_launch._tile = lambda s: 32

    heads = 4
    x = torch.randn(1, 200, heads, width).to(dtype)
    B, C = (torch.randn(1, 200, groups, states).to(dtype) for _ in "BC")
    a, w = -torch.rand(1, 200, heads), torch.rand(1, 200, heads)
    optional = {"D": torch.ones(heads), "initial_state": torch.zeros(1, heads, width, states)}
    optional["seq_idx"] = torch.zeros(1, 200, dtype=torch.int32)
    operands = Ssd(x, a, w, B, C, *(None if name in absent else t for name, t in optional.items()))
    y, state, saved = ssd_launch.ssd_forward(operands, True)
    ssd_launch.ssd_backward(operands, saved, y, state)
    ssd_launch.ssd_update(state, *(t[:, 0] for t in (x, a, w, B, C)), operands.D)


def gated_norm(dtype: torch.dtype, width: int, groups: int) -> None:
    from hf_mamba.ops.triton import ssd_launch

    x, z = torch.randn(2, 3, width).to(dtype)
    operands = GatedNorm(x, z, torch.ones(width).to(dtype), 1e-5, groups)
    y, rstd = ssd_launch.gated_norm_forward(operands, True)
    ssd_launch.gated_norm_backward(operands, rstd, y)


def variants(arch: int) -> Iterator[Variant]:
    """Every shape, dtype and feature that leads to other code; for sm_90, the others' most usual ones only."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    plain = ("initial_state", "seq_idx")
    yield "training", partial(scan, bf16, 16, *plain)
    yield "training, packed", partial(scan, bf16, 16, "initial_state")
    yield "split sequence, packed", partial(scan, bf16, 16, segments=2)
    for states in (64, 128):
        yield "training", partial(scan, bf16, states, *plain)
    yield "bf16", partial(convolution, bf16, 4, *plain)
    yield "bf16, packed", partial(convolution, bf16, 4, "initial_state")
    yield "bf16, residual, d=2560", partial(norm, bf16, 2560, True)
    yield "bf16", partial(decode, bf16, 16, 4)
    yield "dual, bf16", partial(dual, bf16, 64, 128, 1, "initial_state", "seq_idx", blackwell=arch == 100)
    yield "dual, bf16, d=5120", partial(gated_norm, bf16, 5120, 1)
    if arch != 90:
        return
    for dtype, name in ((fp16, "fp16"), (fp32, "fp32")):
        yield f"everything, {name}", partial(scan, dtype, 16)
        yield f"nothing, {name}", partial(scan, dtype, 16, *OPTIONAL, "softplus")
        yield f"{name}, packed, carried", partial(convolution, dtype, 4)
        yield name, partial(decode, dtype, 16, 4)
        for added in (False, True):
            yield f"{name}{', residual' * added}, d=768", partial(norm, dtype, 768, added)
        yield f"dual, {name}, packed, carried", partial(dual, dtype, 64, 128, 1)
    for width, states, groups in ((80, 128, 2), (64, 256, 1), (128, 128, 1), (16, 16, 4)):
        yield f"dual, P={width}, G={groups}", partial(dual, bf16, width, states, groups, "D")
    yield "dual, 8 parts", partial(gated_norm, bf16, 5120, 8)
    for name in ("z", "softplus", "save"):
        yield f"everything but {name}", partial(scan, bf16, 16, name)
    yield "nothing", partial(scan, bf16, 16, *OPTIONAL, "softplus")
    yield "split sequence", partial(scan, bf16, 16, *OPTIONAL, segments=2)
    for states in (5, 32):
        yield "everything", partial(scan, bf16, states)
    yield "odd width and length", partial(scan, bf16, 16, width=35, length=127)
    for taps in (1, 2, 3):
        yield f"{taps} taps", partial(convolution, bf16, taps, *plain)
        yield f"{taps} taps, packed, carried", partial(convolution, bf16, taps)
    yield "no bias, no SiLU", partial(convolution, bf16, 4, *plain, "bias", "silu")
    yield "one column", partial(norm, bf16, 1, True)
    for states, taps in ((1, 1), (5, 2), (64, 3), (128, 4)):
        yield f"{taps} taps", partial(decode, bf16, states, taps)
    yield "nothing", partial(decode, bf16, 16, 4, "D", "z", "bias", "softplus", "silu")


def build(arch: int, index: int, wanted: str) -> list[dict[str, object]]:
    """The kernels of one variant as rows; one that is refused has the reason in `registers`' place."""
    os.environ.pop("TRITON_INTERPRET", None)  # read when the kernels are imported
    import triton
    from triton.runtime import driver

    compiler = Compiler(arch, 1000 * arch + index)
    driver.set_active(compiler)
    name, step = list(variants(arch))[index]
    common = {"variant": name, "arch": f"sm_{arch}", "triton": triton.__version__}
    start = time.monotonic()
    try:
        step()
    except Exception as error:  # whatever the compiler raises
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return [{**common, "kernel": "refused", "registers": reason}]
    seconds = round((time.monotonic() - start) / max(len(compiler.kept), 1), 1)
    rows = [row_of(*kept) for kept in compiler.kept if wanted in kept[0].fn.__name__]
    return [{**common, "seconds": seconds, **row} for row in rows]


def row_of(source: Any, metadata: Any, binary: bytes) -> dict[str, object]:
    import triton

    listing, usage = disassemble(binary, Path(triton.__file__).parent / "backends/nvidia/bin")
    names = source.fn.arg_names
    constants = {names[place[0]]: value for place, value in source.constants.items()}
    loops = loops_of(listing)
    inner = max(
        (loop for loop in loops if loop.innermost), key=lambda loop: len(loop.ops), default=Loop(0, 0, [], True)
    )
    states, block = constants.get("N", 0), constants.get("BE", constants.get("BLOCK"))

    def count(*names: str) -> int:
        return sum(op.startswith(names) for op in inner.ops)

    return {
        "kernel": source.fn.__name__,
        "N": states or "",
        "block": block,
        "warps": metadata.num_warps,
        "registers": usage["REG"],
        "stack_bytes": usage["STACK"],
        "shared_bytes": metadata.shared,
        "spill_instructions": sum(op.startswith(("LDL", "STL")) for op in listing_ops(listing)),
        "instructions": len(listing_ops(listing)),
        "loop": len(inner.ops),
        "barriers": count("BAR", "WARPSYNC"),
        "shuffles": count("SHFL"),
        "shared_accesses": count("LDS", "STS"),
        "per_update": per_update(source.fn.__name__, loops, constants),
    }


def disassemble(cubin: bytes, tools: Path) -> tuple[str, dict[str, int]]:
    """The machine code as text, and cuobjdump's resource usage."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)

        def tool(option: str) -> str:
            command = [str(tools / "cuobjdump"), option, str(file)]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = dict(re.findall(r"(REG|STACK|SHARED):(\d+)", tool("-res-usage")))
        return tool("-sass"), {key: int(value) for key, value in usage.items()}


INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")


def listing_ops(listing: str) -> list[str]:
    return [match[2] for match in INSTRUCTION.finditer(listing)]


class Loop(NamedTuple):
    start: int
    end: int
    ops: list[str]
    innermost: bool


def loops_of(listing: str) -> list[Loop]:
    found = [(int(match[1], 16), match[2], match[3]) for match in INSTRUCTION.finditer(listing)]
    spans = set()
    for address, op, rest in found:
        target = re.search(r"0x([0-9a-f]+)", rest) if op.startswith("BRA") else None
        if target and int(target[1], 16) < address:
            spans.add((int(target[1], 16), address))
    return [
        Loop(
            a,
            b,
            [op for at, op, _ in found if a <= at <= b],
            not any((c, d) != (a, b) and a <= c and d <= b for c, d in spans),
        )
        for a, b in spans
    ]


def per_update(kernel: str, loops: list[Loop], constants: dict[str, Any]) -> float | str:
    """A scan's instructions for a state, channel and step.

    The backward has two loops over blocks of steps, the replay and the walk, and the code around them once a chunk.
    """
    inner = sorted((loop for loop in loops if loop.innermost), key=lambda loop: len(loop.ops))
    if kernel in ("scan_forward", "adjoint_summary") and inner:
        return round(len(inner[-1].ops) / (constants["N"] * constants["UNROLL"]), 1)
    if kernel != "scan_backward" or len(inner) < 2:
        return ""
    both = inner[-2:]
    around = [loop for loop in loops if all(loop.start <= one.start and one.end <= loop.end for one in both)]
    blocks = sum(len(loop.ops) for loop in both)
    chunk = min(len(loop.ops) for loop in around) - blocks
    return round(blocks / (16 * constants["BLOCK"]) + chunk / (16 * constants["CHUNK"]), 1)


def fault(row: dict[str, object]) -> str | None:
    """What is wrong with a row, or None."""
    where = f"{row['kernel']} ({row['variant']}, N={row.get('N', '')}, {row['arch']})"
    if row["kernel"] == "refused":
        return f"{where}: {row['registers']}"
    limits = STACK_LIMIT.get(str(row["kernel"]), {})
    allowed = next((limit for states, limit in limits.items() if int(str(row["N"])) <= states), 0)
    if int(str(row["stack_bytes"])) > allowed:
        return f"{where}: {row['stack_bytes']} bytes of stack, {allowed} are allowed"
    return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "triton_compile.csv")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], choices=SHARED_LIMIT)
    parser.add_argument("--only", default="", help="only variants of the step that is named so: scan, decode, ...")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    options = parser.parse_args(arguments)
    work = [
        (arch, index, options.kernel)
        for arch in options.arch
        for index, (_, step) in enumerate(variants(arch))
        if options.only in str(step)
    ]
    faults = []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file, ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for rows in pool.map(build, *zip(*work, strict=True)):
            for row in rows:
                writer.writerow(row)
                print(*(f"{key}={value}" for key, value in row.items() if value != ""), flush=True)
            file.flush()
            faults += [found for row in rows if (found := fault(row))]
    if faults:
        print("Not as it should be:", *faults, sep="\n", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
