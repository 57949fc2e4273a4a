"""What a run reads, looked at before it starts: the tokenizer is loaded, weights' headers and first records are read.

Where the run will be on another machine, nothing is looked at. Imports torch and transformers, as the run will.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_mamba.data.records import IDS_NEED_A_TOKENIZER, LOOKED_AT, are_packed, check_columns, first_values
from hf_mamba.data.segments import are_ids
from hf_mamba.data.sources import Source, column_in, hub_dataset, missing_column, parse_sources
from hf_mamba.data.tokenizer_files import end_of_documents, padded_vocabulary
from hf_mamba.family import family_of
from hf_mamba.findings import Findings, first_line
from hf_mamba.plan import Plan
from hf_mamba.preflight.world import runs_elsewhere

if TYPE_CHECKING:
    from hf_mamba.data.encoding import Encoding

_ON_THE_HUB = tuple(
    f"{name}{index}" for name in ("model.safetensors", "pytorch_model.bin") for index in ("", ".index.json")
)


def check_contents(plan: Plan, out: Findings) -> None:
    """A problem for each thing named that would end the run once it is read."""
    if runs_elsewhere(plan):
        return
    if plan.start_from is not None:
        _check_weights(plan, plan.start_from, out)
    encoding = _load_tokenizer(plan, out)
    if encoding is not None or plan.data.tokenizer is None:
        for key, specs in (("dataset", plan.data.sources), ("eval_dataset", plan.data.eval_sources)):
            for source in parse_sources(specs, text_column=plan.data.text_column) if specs else ():
                _check_source(key, source, plan, encoding, out)


def _check_weights(plan: Plan, name: str, out: Findings) -> None:
    """The files of the weights are there, and have the shapes that the configuration says."""
    from hf_mamba.formats.folder import open_checkpoint, weight_files

    folder = Path(os.path.expanduser(name))
    try:
        if folder.is_dir():
            if weight_files(folder):  # a DeepSpeed folder is put together when it is loaded
                open_checkpoint(folder)
            return
        missing = _no_weights_on_the_hub(name)
    except (ValueError, OSError) as error:
        missing = _sentence(error)
    if missing:
        fix = "Give a model whose config.json and weights belong together."
        out.problem("model_name_or_path", name, missing, fix, id="weights-unusable")


def _no_weights_on_the_hub(name: str) -> str:
    """Why a Hub model's weights cannot be loaded; "" where they can be, or nobody can tell."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    if any(isinstance(try_to_load_from_cache(name, file), str) for file in _ON_THE_HUB):
        return ""
    if constants.is_offline_mode():
        return "Its weights are not in the local cache of the Hub, and the Hub is offline."
    try:
        files = HfApi().list_repo_files(name)
    except (ValueError, OSError):
        raise
    except Exception:  # of the HTTP client, which has classes of its own: the network is down
        return ""
    return "" if any(file.endswith((".safetensors", ".bin")) for file in files) else "It holds no weights."


def _load_tokenizer(plan: Plan, out: Findings) -> Encoding | None:
    """How the named tokenizer makes ids; None with a problem, or where it is trained first."""
    from hf_mamba.data.encoding import Encoding
    from hf_mamba.data.tokenizer import load_tokenizer

    data = plan.data
    if data.tokenizer is None:
        return None
    key = "tokenizer_name" if data.tokenizer != plan.start_from else "model_name_or_path"
    try:
        tokenizer = load_tokenizer(data.tokenizer, data.eos_token)
    except (ValueError, OSError) as error:
        fix = "Correct the name, or give a folder with a tokenizer.json."
        out.problem(key, data.tokenizer, _sentence(error), fix, id="tokenizer-unloadable")
        return None
    if end_of_documents(data.tokenizer, data.eos_token) is None:  # else said already
        out.note(f"Documents end with {tokenizer.eos_token} (the tokenizer of {data.tokenizer}).")
    rows = family_of(plan.model_config).geometry(plan.model_config).vocab_size
    if len(tokenizer) > rows:
        out.problem(
            "vocab_size",
            f"{rows:,} rows of the embedding and {len(tokenizer):,} tokens of {data.tokenizer}",
            "Some tokens would have no row.",
            f"Write --vocab_size {padded_vocabulary(len(tokenizer))}, or use a smaller tokenizer.",
            id="vocabulary-smaller-than-tokenizer",
        )
    return Encoding.of(tokenizer, template=data.template, split_special_tokens=data.split_special_tokens)


def _check_source(key: str, source: Source, plan: Plan, encoding: Encoding | None, out: Findings) -> None:
    """The first records can be read, have the column, and hold text or ids of the tokenizer."""
    try:
        values = _first_of_hub(source, plan) if source.kind == "hub" else _first_of_files(source)
        ids = [(where, value) for where, value in values if are_ids(value) and len(value)]
        if ids and encoding is None:
            raise ValueError(f"{ids[0][0]}: {IDS_NEED_A_TOKENIZER}")
        for where, value in ids:
            assert encoding is not None
            encoding.check_ids(value, where)
    except (ValueError, OSError) as error:
        fix = "Correct the data or their name; a column is named as NAME@COLUMN."
        out.problem(key, source.spec, _sentence(error), fix, id="dataset-unreadable")
        return
    if ids and are_packed(values):
        out.note(
            f"{source.spec} holds rows of {len(ids[0][1]):,} ids: they are taken as they are, without further ends."
        )
    elif ids:
        out.note(f"{source.spec} holds ids: each record is a document, and gets an end where it has none.")


def _first_of_files(source: Source) -> list[tuple[str, Any]]:
    files = source.files()
    check_columns(files, source.text_column)
    return first_values(files, source.text_column)


def _first_of_hub(source: Source, plan: Plan) -> list[tuple[str, Any]]:
    """The first records; of a data set that is not streamed and is in the cache of the datasets library, from there."""
    from huggingface_hub import constants

    streaming = plan.data.streaming or not constants.is_offline_mode()
    records = hub_dataset(source.spec, streaming=streaming)
    out = []
    try:
        first = list(_first(records, streaming))
    except Exception as error:  # of the HTTP client, of a script's reader: whatever it is, the data cannot be read
        raise ValueError(f"{source.spec} cannot be read: {error}") from error
    for number, record in enumerate(first):
        column = column_in(record, source.text_column)
        if column not in record:
            raise ValueError(missing_column(source.spec, column, list(record)))
        out.append((f"{source.spec} record {number}", record[column]))
    return out


def _first(records: Any, streaming: bool) -> Any:
    return records.take(LOOKED_AT) if streaming else records.select(range(min(LOOKED_AT, len(records))))


def _sentence(error: Exception) -> str:
    text = first_line(error)[:400]
    return text if text[-1] in "?." else f"{text}."
