"""Whether the data that the arguments name can be meant, and are there; nothing is read but the folders' entries."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_mamba.data.sources import Source, left_out, missing, parse_sources
from hf_mamba.data.tokenizer_files import END_OF_TEXT, end_of_documents
from hf_mamba.files import read_small
from hf_mamba.findings import Findings
from hf_mamba.names import RUN_FILE
from hf_mamba.preflight.settings import Settings, resume_of
from hf_mamba.run.manifest import DamagedError, read_manifest

STREAM = "stream"  # where a checkpoint's manifest has the processes' positions
GUARANTEE = (
    "Streaming: documents come in the order in which they are stored. A resume is exact with the same number of "
    "processes, and refused with another or where the data has changed."
)


def check_tokenizer(settings: Settings, out: Findings) -> None:
    """A named tokenizer is there and has a token that ends documents; a note says which."""
    key = "tokenizer_name" if settings.get("tokenizer_name") else "model_name_or_path"
    name, chosen = settings.get(key), settings.get("eos_token")
    if not name:
        if chosen is not None:
            out.problem(
                "eos_token",
                chosen,
                f"The tokenizer that is trained on the data has one special token, {END_OF_TEXT}.",
                "Remove it, or give --tokenizer_name.",
                id="end-token-of-a-trained-tokenizer",
            )
        return
    found = f"{name} ({settings.source(key)})"
    try:
        end = end_of_documents(name, chosen)
    except ValueError as error:
        if key == "tokenizer_name" or chosen is not None:  # a model's folder is looked at elsewhere
            fix = "Give a folder with a tokenizer.json, such a file, or a Hub name."
            fix = "Give one of its tokens." if "no token" in str(error) else fix
            key = "eos_token" if "no token" in str(error) else key
            out.problem(key, found, f"As a tokenizer: {error}.", fix, id="tokenizer-unusable")
        return
    if end is not None and end.token is None:
        out.problem(
            key,
            found,
            "It does not say which token ends a document.",
            "Write --eos_token with one of its tokens, for example '</s>'.",
            id="no-end-token",
        )
    elif end is not None:
        out.note(f"Documents end with {end.token} ({end.source}).")


def recorded_data(settings: Settings, folder: str) -> Mapping[str, Any]:
    """The fingerprint of the data of the run that is gone on with; empty where it is not known or there is none."""
    resume = resume_of(settings)
    try:
        if resume not in ("auto", "never"):
            return dict(read_manifest(Path(resume)).run.get("fingerprint") or {})
        return dict(json.loads(read_small(Path(folder) / RUN_FILE)).get("data") or {}) if resume != "never" else {}
    except (DamagedError, ValueError, OSError, AttributeError, TypeError, RecursionError):
        return {}  # named elsewhere


def _check_evaluation(settings: Settings, elsewhere: bool, out: Findings) -> None:
    """What is named for evaluation can be meant and is there, and nothing is held out beside it."""
    wanted = settings.get("eval_dataset")
    if wanted and settings.given("eval_fraction") and settings.get("eval_fraction"):
        out.problem(
            "eval_dataset",
            f"{' '.join(wanted)} and eval_fraction {settings.get('eval_fraction')}",
            "One of the two is what is evaluated on.",
            "Remove one of them.",
            id="two-evaluation-sets",
        )
    if wanted:
        _check_sources("eval_dataset", settings, elsewhere, out)


def check_data(settings: Settings, elsewhere: bool, out: Findings) -> None:
    """Bad names and weights, and files that are not here; where the run will be `elsewhere`, these are a note."""
    if settings.get("streaming"):
        _check_streaming(settings, out)
    check_tokenizer(settings, out)
    _check_evaluation(settings, elsewhere, out)
    sources = _check_sources("dataset", settings, elsewhere, out)
    if settings.get("streaming") and len(sources) > 1 and sources[0].weight is None:
        out.problem(
            "dataset",
            f"{' '.join(settings.get('dataset'))} ({settings.source('dataset')})",
            "Streams have no known size by which they could be mixed.",
            "Write NAME:WEIGHT for each, for example NAME:0.5.",
            id="streams-cannot-be-mixed",
        )


def _check_sources(key: str, settings: Settings, elsewhere: bool, out: Findings) -> list[Source]:
    """The sources of a list, where they can be meant; what is not there, and what is left out, is said."""
    wanted = settings.get(key)
    if not wanted:
        return []
    found = f"{' '.join(wanted)} ({settings.source(key)})"
    try:
        sources = parse_sources(wanted)
    except ValueError as error:
        out.problem(
            key,
            found,
            _sentence(error),
            "Correct the list: NAME or NAME:WEIGHT, each.",
            id="dataset-list-unreadable",
        )
        return []
    for source in sources:
        if names := left_out(source):
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            out.note(f"{source.spec}: {len(names)} files are left out as evaluation data, by their names: {shown}.")
    absent = "; ".join(reason for source in sources if (reason := missing(source)))
    if absent and elsewhere:
        out.note(f"Not on this machine: {_sentence(absent)}")
    elif absent:
        out.problem(key, found, _sentence(absent), "Correct the name, or mount what is missing.", id="dataset-missing")
    return sources


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
