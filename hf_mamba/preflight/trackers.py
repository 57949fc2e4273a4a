"""--report_to: whether what it names exists and is installed, said before anything is built."""

from __future__ import annotations

import difflib
import netrc
import os
from importlib.util import find_spec
from urllib.parse import urlsplit

from hf_mamba.findings import Findings
from hf_mamba.preflight.settings import Settings

# What transformers can report to (integrations/integration_utils.py), and the packages of which one must be there.
TRACKERS: dict[str, tuple[str, ...]] = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
    "azure_ml": ("azureml",),
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "comet_ml": ("comet_ml",),
    "dagshub": ("dagshub",),
    "dvclive": ("dvclive",),
    "flyte": ("flytekit",),
    "kubeflow": ("kubeflow",),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
}


def wanted_trackers(settings: Settings) -> list[str]:
    """The names in `report_to`: a list, or a text with commas or blanks; "all" means those that are installed here."""
    value = settings.get("report_to") or []
    texts = [value] if isinstance(value, str) else value
    names = [name for text in texts for name in str(text).replace(",", " ").split() if name != "none"]
    installed = [name for name, packages in TRACKERS.items() if any(map(find_spec, packages))]
    every = [known for name in names for known in (installed if name == "all" else [name])]
    return list(dict.fromkeys(every))


def check_trackers(settings: Settings, elsewhere: bool, out: Findings) -> None:
    """Unknown names and packages that are missing; where the run will be `elsewhere`, these are a note.

    `report_to` is the list of names from here on, or "none".
    """
    names = wanted_trackers(settings)
    if "all" in str(settings.get("report_to")):
        out.note(f"--report_to all, as installed here: {', '.join(names) or 'no tracker'}.")
    if names or settings.given("report_to"):
        settings.rewrite("report_to", names or "none")
    for name in names:
        found = f"{name} ({settings.source('report_to')})"
        if name not in TRACKERS:
            near = difflib.get_close_matches(name, TRACKERS, n=1) or ["tensorboard"]
            out.problem(
                "report_to", found, "There is no such tracker.", f"Write {near[0]}, or none.", id="unknown-tracker"
            )
        elif not any(map(find_spec, TRACKERS[name])):
            package = TRACKERS[name][0]
            if elsewhere:
                out.note(f"Not on this machine: {package}, to which --report_to would report.")
            else:
                out.problem(
                    "report_to",
                    found,
                    f"{package} is not installed.",
                    f"Run pip install {package}.",
                    id="tracker-not-installed",
                )
        elif name == "wandb" and not elsewhere and not _wandb_can_start():
            fix = "Run wandb login, set WANDB_API_KEY, or set WANDB_MODE=offline."
            out.problem("report_to", found, "Nobody is logged in to wandb.", fix, id="tracker-not-logged-in")


def _wandb_can_start() -> bool:
    """Whether wandb finds a key where it looks for one, or needs none (wandb/sdk/lib/wbauth)."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return True
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    for path in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            if path and netrc.netrc(os.path.expanduser(path)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
