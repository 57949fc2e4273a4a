"""The data of a run: what the arguments ask for, prepared."""

from collections.abc import Mapping
from typing import Any

from hf_mamba.data import PreparedData, StreamedDataset, prepare_data, stream_data
from hf_mamba.plan import Plan
from hf_mamba.preflight.data import STREAM
from hf_mamba.run import ranks
from hf_mamba.run.folder import Run


def prepare_inputs(plan: Plan, wanted: Mapping[str, Any]) -> PreparedData:
    """The data that the arguments name: tokenised and packed, or as a stream; see `data.prepare_data` for errors.

    Args:
        plan: gives the row length, the seed and the vocabulary.
        wanted: the arguments as written, of which `dataset`, `tokenizer_name`, `model_name_or_path` (whose tokenizer
            serves where none is named), `streaming`, `text_column` and `eval_fraction` are read.
    """
    tokenizer = wanted.get("tokenizer_name") or wanted.get("model_name_or_path")
    assert plan.seq_len is not None
    options = {name: wanted[name] for name in ("text_column", "eval_fraction") if name in wanted}
    options["with_source"] = len(wanted.get("dataset") or ()) > 1  # then the loss of each is logged
    options |= {"seq_len": plan.seq_len, "seed": plan.training_arguments["seed"], "tokenizer": tokenizer}
    sources = wanted.get("dataset") or ["embedded"]
    if wanted.get("streaming"):
        return stream_data(sources, **options)
    return prepare_data(sources, vocab_size=None if tokenizer else plan.model_config["vocab_size"], **options)


def open_stream(data: PreparedData, run: Run) -> None:
    """Where the data is a stream, have this process read its share from where the run's checkpoint left it.

    Every rank calls it, in the process group.

    Raises:
        ValueError: the stream does not lead to where the checkpoint was taken.
    """
    if isinstance(stream := data.train, StreamedDataset):
        rank, world = ranks.rank(), ranks.world_size()
        states = run.manifest.run.get(STREAM) if run.manifest else None
        ranks.on_all(lambda: stream.open(rank, world, states[min(rank, len(states) - 1)] if states else None))
