"""The front door: names of data -> tokenizer, training rows, held-out rows, and a fingerprint of it all."""

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from hf_mamba.data.dataset import EvalDataset, PackedDataset
from hf_mamba.data.encoding import Encoding
from hf_mamba.data.order import ORDER_VERSION
from hf_mamba.data.prepared import PreparedData
from hf_mamba.data.shards import TokenShards, TokenStream
from hf_mamba.data.sources import EMBEDDED, Source, parse_sources
from hf_mamba.data.streaming import EVAL_TOKENS, StreamedDataset
from hf_mamba.data.tokenize import tokenize_sources
from hf_mamba.data.tokenizer import load_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_mamba.data.streaming import StreamedDataset

TEXT_VERSION = 1  # of how a text becomes ids, where a fingerprint names it: before, all special tokens were text
logger = logging.getLogger("hf_mamba.data")


def prepare_data(
    sources: Sequence[str] = (EMBEDDED,),
    *,
    seq_len: int,
    seed: int = 0,
    tokenizer: "str | os.PathLike[str] | PreTrainedTokenizerBase | None" = None,
    vocab_size: int | None = None,
    eval_fraction: float = 0.01,
    eval_sources: Sequence[str] = (),
    text_column: str = "text",
    eos_token: str | None = None,
    split_special_tokens: bool | None = None,
    template: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
    num_proc: int | None = None,
    on_bad_record: str = "count",
    with_source: bool = False,
    verify: bool = False,
    progress: bool = True,
    build: bool = True,
    contents: Sequence[str] | None = None,
) -> PreparedData:
    """Tokenise what is not in the cache yet, and lay out the rows.

    Args:
        sources: see `parse_sources`. Without weights, all sources together are one epoch, in which each token comes
            once; with weights, each source has its share of the samples and epochs of its own.
        seq_len: L, tokens per row.
        seed: of the order.
        tokenizer: a folder, a hub name or a loaded fast tokenizer; or
        vocab_size: train a byte-level BPE of this size on the sources. Exactly one of the two.
        eval_fraction: share of the segments (see `records`) held out, by the hash of their text: the same text is never
            in both parts, and stays in its part when data is added. At least one is held out unless this is 0.
        eval_sources: hold out nothing and evaluate on these instead.
        text_column: the column with the text, for files that have columns, where a source names none.
        eos_token: see `load_tokenizer`.
        split_special_tokens, template: see `Encoding.of`.
        cache_dir: see `cache_root`.
        num_proc, on_bad_record, verify, progress, build: see `tokenize_sources`.
        contents: of the sources and then those for evaluation; see `tokenize_sources`.
        with_source: rows name their source; see `PackedDataset`.

    Raises:
        ValueError: anything a user can mend, in one message.
    """
    if (tokenizer is None) == (vocab_size is None):
        raise ValueError("give either a tokenizer (folder or hub name) or the vocab_size of one to train")
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"eval_fraction is {eval_fraction}; it must be at least 0 and below 1")
    if isinstance(seq_len, bool) or not isinstance(seq_len, int) or seq_len < 2:
        raise ValueError(f"seq_len is {seq_len!r}; a row needs an integer of at least 2 tokens")
    parsed = parse_sources(sources, text_column=text_column)
    parsed_eval = parse_sources(eval_sources, text_column=text_column) if eval_sources else []
    if vocab_size is not None:
        tokenizer = train_tokenizer(
            parsed, vocab_size, cache_dir=cache_dir, build=build, contents=contents and contents[: len(parsed)]
        )
    elif isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = load_tokenizer(tokenizer, eos_token)
    assert not isinstance(tokenizer, (str, os.PathLike, type(None)))

    encoding = Encoding.of(tokenizer, template=template, split_special_tokens=split_special_tokens)

    tokens = tokenize_sources(
        [*parsed, *parsed_eval],
        encoding,
        cache_dir=cache_dir,
        num_proc=num_proc,
        on_bad_record=on_bad_record,
        verify=verify,
        progress=progress,
        build=build,
        contents=contents,
    )
    shards, eval_shards = tokens[: len(parsed)], tokens[len(parsed) :]
    threshold = 0 if parsed_eval else _threshold(shards, eval_fraction)
    parts = [(n, s, s.runs(threshold, held_out=False)) for n, s in enumerate(shards)]
    weights = None if parsed[0].weight is None else [float(s.weight or 0) for s in parsed]
    streams = [TokenStream(parts)] if weights is None else [TokenStream([part]) for part in parts]
    train = PackedDataset(streams, seq_len, seed, weights, [s.spec for s in parsed], with_source)
    held_out = TokenStream([(n, s, s.runs(threshold, held_out=True)) for n, s in enumerate(shards)])
    fingerprint: dict[str, Any] = {
        **({"text": TEXT_VERSION} if template else {}),
        "order": ORDER_VERSION,
        "seed": seed,
        "seq_len": seq_len,
        "tokenizer": shards[0].tokenizer,
        "held_out": threshold,
        "sources": [
            {"name": source.spec, "content": s.content, "tokens": s.tokens, "weight": source.weight}
            for source, s in zip(parsed, shards, strict=True)
        ],
    }
    pad = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
    rows = EvalDataset([held_out], seq_len, pad, train.names) if held_out.size else None
    if parsed_eval:
        rows = _own_evaluation(parsed_eval, eval_shards, seq_len, pad)
    report = {
        "train_tokens": train.tokens,
        "eval_tokens": rows.tokens if rows else 0,
        "sources": [_figures(p, s) for p, s in zip([*parsed, *parsed_eval], [*shards, *eval_shards], strict=True)],
    }
    logger.info("data: %s training tokens, %s held out", f"{train.tokens:,}", f"{report['eval_tokens']:,}")
    return PreparedData(tokenizer, train, rows, fingerprint, report)


def _own_evaluation(sources: list[Source], shards: list[TokenShards], seq_len: int, pad: int) -> EvalDataset:
    """Every token of the sources named for evaluation, in rows of one source; weights are for the mean of losses."""
    streams = [TokenStream([(n, s, s.runs(0, held_out=False))]) for n, s in enumerate(shards)]
    weights = [s.weight for s in sources if s.weight is not None]
    return EvalDataset(streams, seq_len, pad, [s.spec for s in sources], weights)


def _threshold(shards: Sequence[TokenShards], fraction: float) -> int:
    """Hashes below this are held out: the asked fraction of all hashes, or else the smallest hash that there is."""
    threshold = int(fraction * 2**64)
    if fraction == 0:
        return 0
    ranges = [s.hash_range() for s in shards]
    smallest, largest = min(low for low, _ in ranges), max(high for _, high in ranges)
    if smallest < threshold:
        return threshold
    if smallest == largest:
        raise ValueError(
            "the data is one piece of text, so none of it can be held out for evaluation; "
            "give more documents, or write --eval_fraction 0"
        )
    return smallest + 2


def _figures(source: Source, shards: TokenShards) -> dict[str, Any]:
    return {
        "name": source.spec,
        "tokens": shards.tokens,
        "documents": shards.documents,
        "text_bytes": shards.text_bytes,
        "unusable": shards.bad,
        "special": shards.special,
    }


def stream_data(
    sources: Sequence[str],
    *,
    tokenizer: "str | PreTrainedTokenizerBase",
    seq_len: int,
    seed: int = 0,
    eval_fraction: float = 0.01,
    eval_sources: Sequence[str] = (),
    text_column: str = "text",
    eos_token: str | None = None,
    split_special_tokens: bool | None = None,
    template: bool = True,
    with_source: bool = False,
) -> PreparedData:
    """`prepare_data` for a data set too large to tokenise first; `train` is a `StreamedDataset`, to be opened.

    Raises:
        ValueError: anything a user can mend, in one message.
    """
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"eval_fraction is {eval_fraction}; it must be at least 0 and below 1")
    if isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer, eos_token)
    encoding = Encoding.of(tokenizer, template=template, split_special_tokens=split_special_tokens)
    fraction = 0.0 if eval_sources else eval_fraction
    options: dict[str, Any] = {"seed": seed, "eval_fraction": fraction, "text_column": text_column}
    train = StreamedDataset(sources, encoding, seq_len=seq_len, with_source=with_source, **options)
    if template:
        train.fingerprint["text"] = TEXT_VERSION
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    rows = None
    if eval_sources:
        parsed = parse_sources(eval_sources, text_column=text_column)
        shards = tokenize_sources(parsed, encoding)
        rows = _own_evaluation(parsed, shards, seq_len, int(pad))
    elif eval_fraction:
        rows = train.held_out(EVAL_TOKENS, int(pad))
    report = {"sources": [{"name": name} for name in train.names], "eval_tokens": rows.tokens if rows else 0}
    return PreparedData(tokenizer, train, rows, train.fingerprint, report)
