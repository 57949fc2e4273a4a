"""The data of a run: what the plan names, prepared."""

from hf_mamba.data import PreparedData, StreamedDataset, prepare_data, stream_data
from hf_mamba.plan import Plan
from hf_mamba.preflight.data import STREAM
from hf_mamba.run import ranks
from hf_mamba.run.folder import Run


def prepare_inputs(plan: Plan) -> PreparedData:
    """The plan's data, tokenised and packed, or as a stream; see `data.prepare_data` for errors."""
    data = plan.data
    options = {
        "seq_len": plan.seq_len,
        "seed": plan.seed,
        "tokenizer": data.tokenizer,
        "text_column": data.text_column,
        "eval_fraction": data.eval_fraction,
        "eval_sources": data.eval_sources,
        "eos_token": data.eos_token,
        "split_special_tokens": data.split_special_tokens,
        "template": data.template,
        "with_source": len(data.sources) > 1,  # then the loss of each is logged
    }
    if data.streaming:
        return stream_data(data.sources, **options)
    return prepare_data(data.sources, vocab_size=data.vocab_size, **options)


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
