"""Gathers what a machine with a GPU and without a network lacks, into a folder that is carried there.

    python -m benchmarks.gpu_wheels FOLDER

There, with Python 3.12, torch 2.11, triton and what they need (numpy, tokenizers, safetensors, pyarrow, ...) at hand:

    python -m pip install --no-index --no-deps --no-compile --target SITE FOLDER/*.whl && export PYTHONPATH=SITE

FOLDER/sources has mamba-ssm and causal-conv1d, unpacked, for benchmarks.gpu_extensions; FOLDER/versions.txt names all.
DeepSpeed's wheel is built here, without its extensions; it needs torch in this environment, as do the two others.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
WHEELS = (
    *("transformers==5.17.0", "accelerate==1.15.0", "datasets==5.2.0", "dill==0.4.1", "multiprocess==0.70.19"),
    *("rich==15.0.0", "pydantic==2.14.3", "pydantic_core==2.50.4", "annotated-types==0.8.0"),
    *("typing-inspection==0.4.5", "hjson==3.1.0", "mambapy==1.2.0", "einops==0.8.2", "tzdata==2026.6"),
)
BUILT = ("deepspeed==0.19.8",)
SOURCES = ("mamba-ssm==2.3.2.post1", "causal-conv1d==1.6.1")
LIMIT = 64 * 2**20  # bytes that may be carried to such a machine


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_wheels", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(arguments).folder
    folder.mkdir(parents=True, exist_ok=True)
    platforms = [argument for name in PLATFORMS for argument in ("--platform", name)]
    pip("download", "--only-binary=:all:", "--python-version", PYTHON, *platforms, "--dest", folder, *WHEELS)
    pip("wheel", "--no-build-isolation", "--wheel-dir", folder, *BUILT, DS_BUILD_OPS="0")
    with tempfile.TemporaryDirectory() as archives:
        skip = {"MAMBA_SKIP_CUDA_BUILD": "TRUE", "CAUSAL_CONV1D_SKIP_CUDA_BUILD": "TRUE"}
        pip("download", "--no-build-isolation", "--no-binary=:all:", "--dest", archives, *SOURCES, **skip)
        for archive in Path(archives).iterdir():
            with tarfile.open(archive) as packed:
                packed.extractall(folder / "sources", filter="data")
    found = sorted(path.relative_to(folder) for pattern in ("*.whl", "sources/*") for path in folder.glob(pattern))
    (folder / "versions.txt").write_text("".join(f"{path}\n" for path in found))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(*found, f"{size / 2**20:.1f} MiB", sep="\n")
    if size > LIMIT:
        print(f"More than {LIMIT >> 20} MiB: too much to be carried.", file=sys.stderr)
        return 1
    return 0


def pip(command: str, *arguments: str | Path, **environment: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", command, "-q", "--no-deps", *map(str, arguments)],
        env=os.environ | environment,
        check=True,
    )


if __name__ == "__main__":
    sys.exit(main())
