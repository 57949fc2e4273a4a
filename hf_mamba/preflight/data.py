"""Whether the data that the arguments name can be meant, and are there; nothing is read but the folders' entries."""

from __future__ import annotations

from hf_mamba.data.sources import missing, parse_sources
from hf_mamba.preflight.plan import Findings
from hf_mamba.preflight.settings import Settings


def check_data(settings: Settings, elsewhere: bool, out: Findings) -> None:
    """Bad names and weights, and files that are not here; where the run will be `elsewhere`, these are a note."""
    wanted = settings.get("dataset")
    if not wanted:
        return
    found = f"{' '.join(wanted)} ({settings.source('dataset')})"
    try:
        sources = parse_sources(wanted)
    except ValueError as error:
        out.problem("dataset", found, _sentence(error), "Correct the list: NAME or NAME:WEIGHT, each.")
        return
    absent = "; ".join(reason for source in sources if (reason := missing(source)))
    if absent and elsewhere:
        out.note(f"Not on this machine: {_sentence(absent)}")
    elif absent:
        out.problem("dataset", found, _sentence(absent), "Correct the name, or mount what is missing.")


def _sentence(text: object) -> str:
    return str(text) if str(text).endswith("?") else f"{text}."
