"""Where the recipes and DeepSpeed templates are, in a checkout or from a wheel, and how to copy them."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path

import hf_mamba

FOLDERS = ("recipes", "ds_configs")
INSTALLED = "share/hf_mamba"  # below the environment: data_files of setup.cfg


def home() -> Path:
    """The folder that holds FOLDERS.

    Raises:
        ValueError: the package was taken without them.
    """
    checkout = Path(hf_mamba.__file__).resolve().parents[1]
    if all((checkout / name).is_dir() for name in FOLDERS):
        return checkout
    try:
        listed = importlib.metadata.files("hf_mamba") or ()
    except importlib.metadata.PackageNotFoundError:
        listed = ()
    for file in listed:
        place = Path(str(file.locate()))
        if file.match(f"{INSTALLED}/recipes/pretrain.py") and place.is_file():
            return place.resolve().parents[1]
    raise ValueError(
        f"{checkout} holds no recipes, and the installed package lists none: install hf_mamba by pip, or give --script."
    )


def copy(target: Path) -> list[Path]:
    """Copy FOLDERS into `target`, which must not hold them yet.

    Returns:
        The new folders.

    Raises:
        ValueError: one of them is there.
    """
    for name in FOLDERS:
        if (target / name).exists():
            raise ValueError(f"{target / name} exists, and nothing is written over: name another folder.")
    whole = shutil.ignore_patterns("__pycache__")
    return [Path(shutil.copytree(home() / name, target / name, ignore=whole)) for name in FOLDERS]
