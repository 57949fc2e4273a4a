"""Compile the Triton kernels for sm_80 and sm_90 without a GPU, and read registers, spills and instructions.

    python -m benchmarks.triton_compile [--out benchmarks/results/triton_compile.csv] [--arch 90]

Exit status 1 if a kernel spills more than its limit. `loop` counts the machine instructions of the largest inner loop,
and `per_update` the same per state, channel and step: what bounds a kernel limited by instruction issue. The backward
has two more loops, a replay and the per-channel work. These are counts out of the compiler, not times.
"""

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
INNER_SCAN = {"SOFTPLUS": True, "HAS_Z": True, "HAS_BIAS": True}
FORWARD = {"HAS_D": True, "HAS_START": False, "SAVE": True, "SUMMARY": False, "CHUNK": 64, **INNER_SCAN}
BACKWARD = {"HAS_D": True, "BLOCK": 4, "SUB": 16, "CHUNK": 64, "BE": 32, **INNER_SCAN}
CONV = {"TAPS": 4, "BE": 128, "SILU": True, "HAS_BIAS": True}
HALF = {"x_ptr", "dt_ptr", "z_ptr", "y_ptr", "dy_ptr", "dx_ptr", "ddt_ptr", "dz_ptr"}  # bf16 here; the rest is fp32


@dataclass(frozen=True)
class Case:
    """A kernel as `triton_launch` would start it."""

    module: str
    kernel: str
    constants: dict
    warps: int = 1
    stack_limit: int = 0  # bytes
    updates: int = 0  # states that a thread updates in one turn of its inner loop


def cases() -> list[Case]:
    found = []
    for states, block, unroll, packed, limit in (
        (16, 32, 4, False, 0),
        (16, 32, 4, True, 64),
        (16, 64, 4, False, 0),
        (64, 32, 1, False, 64),
        (128, 32, 1, False, 512),
    ):
        constants = FORWARD | {"N": states, "BE": block, "UNROLL": unroll, "HAS_SEQ": packed}
        found.append(Case("triton_scan", "scan_forward", constants, 1, limit, states * unroll * block // 32))
    constants = {"N": 16, "BE": 32, "UNROLL": 4, "HAS_SEQ": False, **INNER_SCAN}
    found.append(Case("triton_scan", "adjoint_summary", constants, 1, 0, 64))
    for states, packed, atomic in (
        (16, False, True),
        (16, True, True),
        (16, False, False),
        (64, False, True),
        (128, False, True),
    ):
        constants = BACKWARD | {"N": states, "NP": states, "HAS_SEQ": packed, "ATOMIC": atomic}
        found.append(Case("triton_scan_backward", "scan_backward", constants, max(1, 32 * states // 512), 512, 64))
    flags = {"HAS_INIT": False, "HAS_SEQ": False}
    found.append(Case("triton_conv", "conv_forward", CONV | flags | {"BT": 16}, 4))
    found.append(Case("triton_conv", "conv_backward", CONV | flags | {"BT": 4}, 4))
    found.append(Case("triton_conv", "conv_backward", CONV | flags | {"BT": 4, "HAS_SEQ": True}, 4))
    norm = {"BLOCK": 4096, "HAS_RESIDUAL": True}
    found.append(Case("triton_norm", "norm_forward", norm, 8))
    found.append(Case("triton_norm", "norm_backward", norm, 8))
    step = {"N": 16, "NP": 16, "BE": 32, "HAS_D": True, **INNER_SCAN}
    found.append(Case("triton_decode", "state_update", step))
    found.append(Case("triton_decode", "conv_update", CONV, 4))
    return found


def build(case: Case, arch: int) -> dict[str, object]:
    """Compile one case and return a row of the table."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(f"hf_mamba.ops.{case.module}"), case.kernel)
    signature, attributes = {}, {}
    for i, name in enumerate(function.arg_names):
        if name in case.constants:
            signature[name] = "constexpr"
            continue
        if name == "seq_ptr":
            signature[name] = "*i32"
        elif name.endswith("_ptr"):
            signature[name] = "*bf16" if name in HALF else "*fp32"
        else:
            signature[name] = "fp32" if name in ("eps", "one") else "i32"
        # widths and strides of real models are multiples of 16; lengths and batches need not be
        if name.endswith(("_ptr", "_row", "_step")) or name in ("E", "d"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, case.constants, attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": case.warps})
    listing, usage = disassemble(kernel.asm["cubin"], Path(triton.__file__).parent / "backends/nvidia/bin")
    loop = inner_loop(listing)
    constants = case.constants
    return {
        "kernel": case.kernel,
        "arch": f"sm_{arch}",
        "N": constants.get("N", ""),
        "packed": constants.get("HAS_SEQ", ""),
        "atomic": constants.get("ATOMIC", ""),
        "block": constants.get("BE", constants.get("BLOCK")),
        "warps": case.warps,
        "registers": usage["REG"],
        "stack_bytes": usage["STACK"],
        "shared_bytes": usage["SHARED"],
        "spill_instructions": sum(op.startswith(("LDL", "STL")) for op in listing_ops(listing)),
        "instructions": len(listing_ops(listing)),
        "loop": loop,
        "per_update": round(loop / case.updates, 1) if case.updates else "",
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


def inner_loop(listing: str) -> int:
    """Instructions of the largest loop that contains no other loop."""
    found = [(int(match[1], 16), match[2], match[3]) for match in INSTRUCTION.finditer(listing)]
    spans = []
    for address, op, rest in found:
        target = re.search(r"0x([0-9a-f]+)", rest) if op.startswith("BRA") else None
        if target and int(target[1], 16) < address:
            spans.append((int(target[1], 16), address))
    innermost = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return max((sum(start <= a <= end for a, _, _ in found) for start, end in innermost), default=0)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "triton_compile.csv")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--kernel", help="only kernels whose name contains this")
    options = parser.parse_args(arguments)
    os.environ.pop("TRITON_INTERPRET", None)  # read when the kernels are imported
    table, failed = [], []
    for arch in options.arch:
        for case in cases():
            if options.kernel and options.kernel not in case.kernel:
                continue
            row = build(case, arch)
            table.append(row)
            print(*(f"{key}={value}" for key, value in row.items() if value != ""))
            if int(str(row["stack_bytes"])) > case.stack_limit:
                failed.append(f"{case.kernel} N={row['N']} sm_{arch}: {row['stack_bytes']} bytes of stack")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0].keys())
        writer.writeheader()
        writer.writerows(table)
    if failed:
        print("More spills than allowed:", *failed, sep="\n", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
