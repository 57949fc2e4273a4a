"""Builds mamba-ssm's and causal-conv1d's CUDA extensions for one architecture, from unpacked sources.

    python -m benchmarks.gpu_extensions SOURCES INTO [--arch 9.0] [--jobs 14] &

Needs nvcc and ninja; benchmarks.gpu_wheels gathers SOURCES. Put INTO on the PYTHONPATH before a session begins: each
package appears in it once it is whole, and steps that begin later find it. The packages' own builds are for eight
architectures. mamba_ssm's __init__, which imports all its models and what they need, is left out.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks.processes import Job, run_together

PACKAGES = {  # the name of the extension, and where its sources are
    "causal_conv1d": ("causal_conv1d_cuda", "csrc"),
    "mamba_ssm": ("selective_scan_cuda", "csrc/selective_scan"),
}
FLAGS = [  # as in both packages' setup.py
    *("-O3", "-std=c++17", "--expt-relaxed-constexpr", "--expt-extended-lambda", "--use_fast_math"),
    *(f"-U__CUDA_NO_{name}__" for name in ("HALF_OPERATORS", "HALF_CONVERSIONS")),
    *(f"-U__CUDA_NO_BFLOAT16{name}__" for name in ("_OPERATORS", "_CONVERSIONS", "2_OPERATORS", "2_CONVERSIONS")),
]
LIMIT = 600  # seconds


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_extensions", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("sources", type=Path)
    parser.add_argument("into", type=Path)
    parser.add_argument("--arch", default="9.0", help="compute capability")
    parser.add_argument("--jobs", default="14", help="files compiled at once")
    parser.add_argument("--package", choices=PACKAGES, help="this one alone, in this process")
    options = parser.parse_args(arguments)
    if options.package:
        build(options.sources, options.into, options.package)
        return 0
    environment = os.environ | {"TORCH_CUDA_ARCH_LIST": options.arch, "MAX_JOBS": options.jobs}
    command = [sys.executable, "-m", "benchmarks.gpu_extensions", str(options.sources), str(options.into), "--package"]
    failed = 0
    for job, why, seconds in run_together(
        [Job(name, [*command, name], LIMIT, environment=environment) for name in PACKAGES]
    ):
        print(f"{job.name}: {seconds:.0f} s {why}", flush=True)
        failed += bool(why)
    return int(failed > 0)


def build(sources: Path, into: Path, package: str) -> None:
    """Compiles a package's extension, and puts it and the package's Python files where they are found."""
    from torch.utils import cpp_extension

    (folder,) = (path for path in sources.iterdir() if path.name.startswith(package))
    name, csrc = PACKAGES[package]
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into, prefix=".") as place:
        files = sorted(str(path.resolve()) for path in (folder / csrc).glob("*.c*") if path.suffix in (".cpp", ".cu"))
        cpp_extension.load(
            name, files, extra_cflags=["-O3", "-std=c++17"], extra_cuda_cflags=FLAGS, build_directory=place
        )
        for library in Path(place).glob("*.so"):
            library.replace(into / library.name)
        python = shutil.copytree(folder / package, Path(place) / package)
        if package == "mamba_ssm":
            (python / "__init__.py").write_text("")
        shutil.copytree(folder / f"{package}.egg-info", into / f"{package}.egg-info", dirs_exist_ok=True)
        shutil.rmtree(into / package, ignore_errors=True)
        python.replace(into / package)  # last: it is what is looked for


if __name__ == "__main__":
    sys.exit(main())
