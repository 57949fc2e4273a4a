"""Measures this package beside its peers, in alternation, in one process.

    python -m benchmarks.run cpu [--only mixer,decode] [--long] [--threads 2]
    python -m benchmarks.run gpu --out DIR [--only a,b-scan]    what a GPU has to settle: benchmarks.gpu_session
    python -m benchmarks.run fuzz [--cases N] [--seed S]        the pre-flight against today's stack: benchmarks.fuzz
    python -m benchmarks.run files --folder FILES               DeepSpeed files of public projects: which start here
    python -m benchmarks.run accelerate --folder FILES          accelerate's files: which keep their meaning here
    python -m benchmarks.run kills [--kills N] [--seed S]       what a killed run leaves: benchmarks.kills
    python -m benchmarks.run data [--only limits]               data and saving beside their limits, and growth
    python -m benchmarks.run starts [--ranks N]                 what many ranks ask of a shared file system
    python -m benchmarks.run learning [--small]                 how well each family learns: benchmarks.learning

Prints each contestant's median time and its ratio to the first one, with the least and greatest ratio seen; writes
benchmarks/results/cpu.csv and plots. The default CPU run takes about ten minutes on two cores; `--long` adds the
peers that take minutes for one call. Needs mambapy for that peer (`pip install mambapy`).
"""

import argparse
import csv
import importlib
import platform
import sys
import time
from pathlib import Path

import torch

from hf_mamba import ops

from .measure import Result, ratios

COLUMNS = ("suite", "setting", "contestant", "median_ms", "min_ms", "max_ms", "rounds", "peak_mb", "note", "machine")
RESULTS = Path(__file__).parent / "results"
OWN = {  # with options of their own
    **{"gpu": "gpu_session.session", "fuzz": "fuzz", "files": "real_files", "accelerate": "accelerate_files"},
    **{"kills": "kills", "data": "growth", "starts": "starts", "learning": "learning"},
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in OWN:
        return importlib.import_module(f".{OWN[argv[0]]}", __package__).main(argv[1:])
    options = arguments().parse_args(argv)
    from . import cpu

    names = list(cpu.SUITES) if options.only is None else options.only.split(",")
    if unknown := [name for name in names if name not in cpu.SUITES]:
        print(f"Unknown suite {', '.join(unknown)}: choose from {', '.join(cpu.SUITES)}.", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    print(machine(), flush=True)
    results: list[Result] = []
    for name in names:
        start = time.monotonic()
        torch.manual_seed(0)
        found = cpu.SUITES[name](options)
        report(found, cpu.SUITES[name].__doc__)
        print(f"  ({time.monotonic() - start:.0f} s)", flush=True)
        results += found
        write(results, options.out / ("cpu.csv" if options.only is None else f"cpu-{'-'.join(names)}.csv"))
    if grown := [result for result in results if result.suite == "growth"]:
        from .plots import plot_growth

        plot_growth(grown, options.out / "cpu-growth.png", "fp32, CPU")
    return 0


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("device", choices=("cpu",))
    parser.add_argument("--only", help="suites, separated by commas, of those in cpu.py")
    parser.add_argument("--long", action="store_true", help="also the peers that take minutes for one call")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant")
    parser.add_argument("--step-length", type=int, default=2048, help="tokens in the whole training step")
    parser.add_argument("--tokens", type=int, default=32, help="generated per call in the decode suite")
    parser.add_argument("--time-limit", type=float, default=20, help="seconds for one call in the growth suite")
    parser.add_argument(
        "--memory-limit", type=float, default=8, help="GB for one call in the growth, mamba2 and hybrid suites"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=12,
        help="of the mamba2 or the hybrid suite, each of which goes on at the next start",
    )
    parser.add_argument(
        "--small", action="store_true", help="rehearse the mamba2 or the hybrid suite; its figures mean nothing"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser


def machine() -> str:
    model = platform.processor() or platform.machine()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    versions = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    return f"{model}; {versions}; capability {torch.backends.cpu.get_cpu_capability()}; backend {ops.which()}"


def report(results: list[Result], title: str | None) -> None:
    print(f"\n{title}")
    for setting in dict.fromkeys(result.setting for result in results):
        own = [result for result in results if result.setting == setting]
        print(f"  {setting}")
        for result in own:
            if result.median is None:
                print(f"    {result.name:30s} {result.note}")
                continue
            ratio = "" if result is own[0] or not own[0].seconds else _ratio(result, own[0])
            memory = "" if result.peak_mb is None else f"  {result.peak_mb:8.0f} MB"
            note = f"  ({result.note})" if result.note else ""
            print(f"    {result.name:30s} {result.median * 1e3:10.1f} ms{memory}  {ratio}{note}")


def _ratio(result: Result, base: Result) -> str:
    median, least, greatest = ratios(result, base)
    return f"{median:8.2f}x  [{least:.2f} .. {greatest:.2f}]"


def write(results: list[Result], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        for r in results:
            times = [f"{f(r.seconds) * 1e3:.2f}" if r.seconds else "" for f in (lambda _, r=r: r.median, min, max)]
            peak = "" if r.peak_mb is None else f"{r.peak_mb:.0f}"
            rows.writerow([r.suite, r.setting, r.name, *times, len(r.seconds), peak, r.note, machine()])


if __name__ == "__main__":
    sys.exit(main())
