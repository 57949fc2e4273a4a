"""Tokenizers: byte-level BPE trained on the data at hand, or any fast tokenizer by folder or hub name."""

import contextlib
import itertools
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_mamba.data.cache import Notes, NotPrepared, cache_root, digest, locked, remembered_checksums
from hf_mamba.data.records import check_columns, plan_units, read_unit
from hf_mamba.data.segments import BadRecords
from hf_mamba.data.sources import DataFile, Source
from hf_mamba.data.tokenizer_files import END_NAMES, END_OF_TEXT, NEEDS_SENTENCEPIECE, without_sentencepiece
from hf_mamba.files import disk_errors, publish_folder
from hf_mamba.names import MANIFEST

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

TRAINING_BYTES = 64 << 20  # enough to settle the merges of any usual vocabulary
_CONTENT = re.compile(r'"content": "([0-9a-f]+)"')  # at the begin of a manifest
MIN_VOCAB = 257  # 256 bytes and the special token


def load_tokenizer(name: str | os.PathLike[str], eos_token: str | None = None) -> "PreTrainedTokenizerBase":
    """A fast tokenizer with a token that ends documents, from a folder, a tokenizer.json or the hub.

    Args:
        eos_token: the token that ends documents; by default the tokenizer's own, or else one of END_NAMES.

    Raises:
        ValueError: it cannot be loaded, is not a fast one, or has no such token.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    name = os.path.expanduser(os.fspath(name))
    tokenizer: Any
    try:
        if os.path.isfile(name):  # as the tokenizers library saves it
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=name)
        else:
            tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:300].rstrip(".")
        if without_sentencepiece(str(error)):
            reason = NEEDS_SENTENCEPIECE
        elif os.path.isdir(name):
            reason = reason if os.path.isfile(os.path.join(name, "tokenizer.json")) else "it holds no tokenizer.json"
        elif name.startswith((".", "/")) or name.count("/") > 1:
            reason = "there is no such folder"
        raise ValueError(
            f"the tokenizer {name!r} cannot be loaded: {reason}; give a folder with a tokenizer.json, such a file, "
            "a hub name, or a vocab_size to train one"
        ) from error
    if eos_token is not None and eos_token not in tokenizer.get_vocab():
        raise ValueError(f"--eos_token {eos_token}: the tokenizer {name!r} has no such token; give one that it has")
    if eos_token is not None or tokenizer.eos_token is None:
        tokenizer.eos_token = eos_token or next((n for n in END_NAMES if n in tokenizer.get_vocab()), None)
    backend(tokenizer)
    return tokenizer


def backend(tokenizer: "PreTrainedTokenizerBase") -> "Tokenizer":
    """The `tokenizers.Tokenizer` inside, as a copy without truncation or padding.

    Raises:
        ValueError: there is none, or there is no eos_token to put between documents.
    """
    from tokenizers import Tokenizer

    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None:
        raise ValueError(
            f"{type(tokenizer).__name__} is not a fast tokenizer; tokenising needs a tokenizer.json "
            "(save it with AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER))"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no token that ends documents; name one of its tokens with --eos_token, or as "
            "eos_token in its tokenizer_config.json"
        )
    copy = Tokenizer.from_str(inner.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def train_tokenizer(
    sources: list[Source],
    vocab_size: int,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    build: bool = True,
    contents: Sequence[str] | None = None,
) -> "PreTrainedTokenizerBase":
    """Byte-level BPE trained on 64 MiB of the text, spread over the sources; cached.

    It has `vocab_size` entries, or fewer when the text has not enough distinct pairs; any text can be encoded and
    comes back exactly.

    Args:
        contents: see `tokenize_sources`.

    Raises:
        ValueError: vocab_size below 257, or data without text.
    """
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < MIN_VOCAB:
        raise ValueError(
            f"vocab_size is {vocab_size!r}; a byte-level tokenizer needs an integer of at least {MIN_VOCAB}"
        )
    root = cache_root(cache_dir)

    def folder(contents: Sequence[str]) -> Path:
        identity = {"format": 1, "bpe": vocab_size, "sources": list(contents), "bytes": TRAINING_BYTES}
        return root / "tokenizers" / digest(identity)

    if contents is None or not folder(contents).exists():
        contents = contents_of(sources, root)
    final = folder(contents)
    if not final.exists() and not build:
        raise NotPrepared(f"no tokenizer of {vocab_size} tokens is trained yet")
    if not final.exists():
        with locked(root, f"tokenizer-{final.name}"):
            if not final.exists():
                tokenizer = _train(sources, vocab_size)
                building = root / "parts" / f"tokenizer-{final.name}"
                shutil.rmtree(building, ignore_errors=True)
                with disk_errors(building):
                    tokenizer.save_pretrained(building)
                    publish_folder(building, final)
    return load_tokenizer(final)


def contents_of(sources: Sequence[Source], root: Path, files: list[list[DataFile]] | None = None) -> list[str]:
    """A name for the content of each source's files, wherever they lie: same bytes in the same order, same name.

    Args:
        files: of each source, where they are known.

    Raises:
        ValueError: nothing is there or readable, or the column is not.
    """
    files = [source.files() for source in sources] if files is None else files
    for source, found in zip(sources, files, strict=True):
        check_columns(found, source.text_column)
    checksums = iter(remembered_checksums([Path(f.path) for found in files for f in found], root))
    return [
        _content(found, source.text_column, list(itertools.islice(checksums, len(found))))
        for source, found in zip(sources, files, strict=True)
    ]


def not_tokenised(sources: list[Source], root: Path) -> list[Source]:
    """The sources whose tokens the cache has not, of any tokenizer. Of files, only names and dates are read."""
    contents, notes = set[str](), Notes(root)
    for manifest in root.glob(f"tokens/*/{MANIFEST}"):
        with contextlib.suppress(OSError), open(manifest, encoding="utf-8", errors="replace") as file:
            contents.update(_CONTENT.findall(file.read(1024)))

    def content(source: Source) -> str | None:
        try:
            files = source.files()
            checksums = notes.known([Path(f.path) for f in files])
        except (OSError, ValueError):
            return None
        return None if checksums is None else _content(files, source.text_column, checksums)

    return [source for source in sources if content(source) not in contents]


def _content(files: list[DataFile], text_column: str, checksums: list[str]) -> str:
    content = [[checksum, f.kind, f.compression] for checksum, f in zip(checksums, files, strict=True)]
    has_columns = any(f.kind != "text" for f in files)
    return digest([content, text_column if has_columns else None])


def _train(sources: list[Source], vocab_size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bad = BadRecords()
    texts = _sample(sources, bad)
    first = next(texts, None)
    if first is None:
        raise ValueError(no_text(sources, bad))

    def with_first() -> Iterator[str]:
        yield first
        yield from texts

    tokenizer.train_from_iterator(with_first(), trainer)
    roles = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), END_OF_TEXT)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **roles)


def _sample(sources: list[Source], bad: BadRecords) -> Iterator[str]:
    """Text for training the tokenizer: an equal share of the budget from every source, from its beginning."""
    for source in sources:
        left = TRAINING_BYTES // len(sources)
        files = source.files()
        check_columns(files, source.text_column)
        for unit in plan_units(files):
            for segment in read_unit(unit, source.text_column, bad):
                yield segment.text
                left -= len(segment.text)
                if left <= 0:
                    break
            if left <= 0:
                break


def no_text(sources: list[Source], bad: BadRecords) -> str:
    """The message for data without a single usable document."""
    names = ", ".join(source.spec for source in sources)
    reasons = ", ".join(f"{count:,} × {reason}" for reason, count in bad.counts.most_common(5))
    where = f" (first: {bad.examples[0]})" if bad.examples else ""
    return f"{names}: there is no text in it; unusable records: {reasons or 'none'}{where}"
