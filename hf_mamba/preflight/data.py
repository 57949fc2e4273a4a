"""Whether the data that the arguments name can be meant, and are there; nothing is read but the folders' entries."""

from __future__ import annotations

from pathlib import Path

from hf_mamba.data.sources import missing, parse_sources
from hf_mamba.findings import Findings
from hf_mamba.preflight.settings import Settings
from hf_mamba.run.manifest import DamagedError, read_manifest

STREAM = "stream"  # where a checkpoint's manifest has the processes' positions
GUARANTEE = (
    "Streaming: documents come in the order in which they are stored. A resume is exact with the same number of "
    "processes, and refused with another or where the data has changed."
)


def check_data(settings: Settings, elsewhere: bool, out: Findings) -> None:
    """Bad names and weights, and files that are not here; where the run will be `elsewhere`, these are a note."""
    if settings.get("streaming"):
        _check_streaming(settings, out)
    wanted = settings.get("dataset")
    if not wanted:
        return
    found = f"{' '.join(wanted)} ({settings.source('dataset')})"
    try:
        sources = parse_sources(wanted)
    except ValueError as error:
        out.problem(
            "dataset",
            found,
            _sentence(error),
            "Correct the list: NAME or NAME:WEIGHT, each.",
            id="dataset-list-unreadable",
        )
        return
    if settings.get("streaming") and len(sources) > 1 and sources[0].weight is None:
        fix = "Write NAME:WEIGHT for each, for example NAME:0.5."
        out.problem(
            "dataset",
            found,
            "Streams have no known size by which they could be mixed.",
            fix,
            id="streams-cannot-be-mixed",
        )
    absent = "; ".join(reason for source in sources if (reason := missing(source)))
    if absent and elsewhere:
        out.note(f"Not on this machine: {_sentence(absent)}")
    elif absent:
        out.problem(
            "dataset", found, _sentence(absent), "Correct the name, or mount what is missing.", id="dataset-missing"
        )


def _check_streaming(settings: Settings, out: Findings) -> None:
    """What needs the whole data beforehand, and what reads them out of order."""
    out.note(GUARANTEE)
    if not settings.get("tokenizer_name") and not settings.get("model_name_or_path"):
        out.problem(
            "streaming",
            "--streaming without a tokenizer",
            "One can be trained only on data that are read first.",
            "Write --tokenizer_name NAME or FOLDER.",
            id="streaming-needs-a-tokenizer",
        )
    if workers := settings.get("dataloader_num_workers"):
        out.problem(
            "dataloader_num_workers",
            workers,
            "A stream is read in order, by one thread of each process.",
            "Remove it, or --streaming.",
            id="streaming-takes-no-workers",
        )


def check_stream_resume(checkpoint: Path, world_size: int | None, out: Findings) -> None:
    """A stream's positions are of as many processes as read it."""
    try:
        positions = read_manifest(checkpoint).run.get(STREAM)
    except DamagedError:
        return  # named elsewhere
    if positions and world_size is not None and len(positions) != world_size:
        out.problem(
            "streaming",
            f"{len(positions)} processes wrote {checkpoint}, and the run has {world_size}",
            "Each reads its own share of a stream, so the rows would be others.",
            f"Run with {len(positions)}, or tokenise the data first: a new run without --streaming.",
            id="stream-of-another-world",
        )


def _sentence(text: object) -> str:
    return str(text) if str(text).endswith("?") else f"{text}."
