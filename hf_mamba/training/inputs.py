"""The data of a run: what the plan names, prepared."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hf_mamba.data import PackedDataset, PreparedData, StreamedDataset, parse_sources, prepare_data, stream_data
from hf_mamba.data.cache import NotPrepared, cache_root
from hf_mamba.data.tokenizer import contents_of
from hf_mamba.plan import DataPlan, Plan, Refused
from hf_mamba.preflight import resolve, verify
from hf_mamba.preflight.command_line import Arguments
from hf_mamba.preflight.data import STREAM
from hf_mamba.preflight.schedule import waits_for_data
from hf_mamba.run import ranks
from hf_mamba.run.folder import Run


def prepare_inputs(plan: Plan) -> PreparedData:
    """The plan's data, tokenised and packed, or as a stream; see `data.prepare_data` for errors.

    Rank 0 looks at the sources' files for all: with many files and many ranks, a shared file system would be asked for
    all of them by each rank. Every rank calls it.
    """
    options = _options(plan.data, plan.seq_len, plan.seed)
    if plan.data.streaming:
        return stream_data(plan.data.sources, **options)
    contents = ranks.on_main_for_long(lambda: _contents(plan.data)) if ranks.world_size() > 1 else None
    return prepare_data(plan.data.sources, vocab_size=plan.data.vocab_size, contents=contents, **options)


def _contents(data: DataPlan) -> list[str]:
    """The fingerprints of the files of all sources, for training and for evaluation."""
    lists = [specs for specs in (data.sources, data.eval_sources) if specs]
    sources = [source for specs in lists for source in parse_sources(specs, text_column=data.text_column)]
    return contents_of(sources, cache_root())


def refusal_without_steps(arguments: Arguments, plan: Plan | Refused) -> Refused | None:
    """What `verify` refuses of a run that waits for its data, where its steps do not matter; None where nothing."""
    assert isinstance(plan, Refused)
    likely = resolve(arguments, epoch_tokens=1000 * plan.known["tokens_per_step"])
    problems = verify(likely, unused=False).problems if isinstance(likely, Plan) else ()
    return replace(plan, problems=problems) if problems else None


def epoch_tokens(plan: Plan | Refused, build: bool = True) -> int | None:
    """Tokens of a pass over the data of a run that waits for nothing else; None where it does, or need not wait.

    Args:
        build: tokenise what is not in the cache; without it None, too, where there is no finished cache.

    Raises:
        ValueError: see `data.prepare_data`.
    """
    if not waits_for_data(plan.problems):
        return None
    data = DataPlan(**plan.known["data"]) if isinstance(plan.known["data"], dict) else plan.known["data"]
    options = _options(data, plan.known["seq_len"], plan.known["seed"])
    try:
        train = prepare_data(data.sources, vocab_size=data.vocab_size, build=build, **options).train
    except NotPrepared:
        return None
    assert isinstance(train, PackedDataset)
    return train.order.epoch_tokens()


def account(data: PreparedData, plan: Plan) -> list[str]:
    """What was read of each source and what was not used, and how often the run will see it."""
    lines, train = [], data.train
    passes = train.passes(plan.total_steps * plan.global_batch_size) if isinstance(train, PackedDataset) else []
    for number, source in enumerate(data.report["sources"]):
        line = f"data: {source['name']}"
        if "tokens" in source:
            kept, bad = source["documents"], source["unusable"]
            line += f": {kept + sum(bad.values()):,} records = {kept:,} kept + {sum(bad.values()):,} left out"
            line += f" ({_counts(bad)})" if bad else ""
            line += f"; {source['tokens']:,} tokens"
            line += f"; special tokens in the text: {_counts(source['special'])}" if source["special"] else ""
        if passes and number < len(train.names):
            line += f"; seen {passes[min(number, len(passes) - 1)]:.2f} times"
        lines.append(line)
    return lines


def stream_account(data: PreparedData) -> list[str]:
    """What all processes have read of a stream since this start, the rows that were read ahead included.

    Every rank calls it. Empty where the data was tokenised beforehand: see `account`.
    """
    if not isinstance(stream := data.train, StreamedDataset):
        return []
    lines = []
    for name, parts in zip(stream.names, zip(*ranks.gather(stream.account()), strict=True), strict=True):
        bad = sum((Counter(part["unusable"]) for part in parts), Counter())
        kept, held, tokens = (sum(part.get(key, 0) for part in parts) for key in ("kept", "held out", "tokens"))
        line = f"data: {name}: {kept + held + bad.total():,} records read = {kept:,} kept + {held:,} held out"
        lines.append(f"{line} + {bad.total():,} left out{f' ({_counts(bad)})' if bad else ''}; {tokens:,} tokens")
    return lines


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} × {what}" for what, count in sorted(counts.items(), key=lambda c: -c[1]))


def _options(data: DataPlan, seq_len: int, seed: int) -> dict[str, Any]:
    return {
        "seq_len": seq_len,
        "seed": seed,
        "tokenizer": data.tokenizer,
        "text_column": data.text_column,
        "eval_fraction": data.eval_fraction,
        "eval_sources": data.eval_sources,
        "eos_token": data.eos_token,
        "split_special_tokens": data.split_special_tokens,
        "template": data.template,
        "with_source": len(data.sources) > 1,  # then the loss of each is logged
    }


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
