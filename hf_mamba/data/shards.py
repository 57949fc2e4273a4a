"""Reading tokenised text: shards on disk, the held-out split, and endless streams of tokens."""

import contextlib
import json
import resource
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from hf_mamba.data.cache import digest, file_checksum
from hf_mamba.data.segments import DataError
from hf_mamba.files import write_whole

FORMAT = 1  # raised when the same text would become other files; part of the cache's key
MANIFEST = "manifest.json"
OPEN_FILES = 256  # memory maps kept at least; each holds a descriptor, and the usual soft limit is 1024
MAPS = 1 << 15  # and at most: Linux gives a process 65,530
KEPT_FROM = 100_000  # segments of a source, from which on what is computed of its index is kept beside it


class DamagedShards(DataError):
    """A file of the cache is not what was written; run again, and it is made again."""


def seal(manifest: dict[str, Any]) -> bytes:
    """A manifest with its own checksum."""
    return json.dumps({"checksum": digest(manifest), "manifest": manifest}).encode()


def check_file(path: Path, expected: dict[str, Any], *, full: bool) -> None:
    """Compare a file with its manifest entry: the size, and in full the checksum.

    Raises:
        DamagedShards: it differs or is missing.
    """
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise DamagedShards(f"{path} is missing") from None
    if size != expected["size"]:
        raise DamagedShards(f"{path} has {size:,} bytes instead of {expected['size']:,}")
    if full and file_checksum(path) != expected["checksum"]:
        raise DamagedShards(f"{path} has another checksum than when it was written")


class TokenShards:
    """A source's tokens, EOS after each document, memory-mapped.

    Opening compares the sizes of all files, unless another process has, and mapping a file its own; `verify` compares
    checksums.

    Args:
        sized: another process has compared the sizes: with many shards and many ranks, a shared file system would be
            asked for each file by each rank.

    Attributes:
        tokens, documents, text_bytes: totals.
        bad: reason -> number of records that could not be used.
        special: name -> how often a special token stands in the text, and is one there.

    Raises:
        DamagedShards: (a ValueError) a file is missing, cut short or changed.
    """

    def __init__(self, path: Path, sized: bool = False) -> None:
        self.path = path
        try:
            sealed = json.loads((path / MANIFEST).read_text())
            manifest = sealed["manifest"]
            if sealed["checksum"] != digest(manifest):
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError):
            raise DamagedShards(f"{path / MANIFEST} is missing or damaged") from None
        self.manifest: dict[str, Any] = manifest
        self.units: list[dict[str, Any]] = manifest["units"]
        self.content: str = manifest["content"]
        self.tokenizer: str = manifest["tokenizer"]
        self.tokens, self.documents, self.text_bytes = (
            sum(unit[key] for unit in self.units) for key in ("tokens", "documents", "text_bytes")
        )
        self.bad, self.special = self._sums("bad"), self._sums("special")
        if not sized:
            self._check(full=False)

    def _sums(self, key: str) -> dict[str, int]:
        sums: Counter[str] = Counter()
        for unit in self.units:
            sums.update(unit.get(key, {}))
        return dict(sums)

    def verify(self) -> None:
        """Read everything and compare checksums."""
        self._check(full=True)

    def _check(self, *, full: bool) -> None:
        for unit in self.units:
            for name, expected in unit["files"].items():
                check_file(self.path / name, expected, full=full)

    def hash_range(self) -> tuple[int, int]:
        """The smallest and the largest hash of a segment's text; the lowest bit is 0."""

        def compute() -> np.ndarray:
            hashes = [self._index(u)[1] for u in range(len(self.units)) if self.units[u]["segments"]]
            return np.array([min(h.min() for h in hashes), max(h.max() for h in hashes)], np.uint64)

        low, high = self._kept("hashes", compute, 1).ravel().view(np.uint64).tolist()
        return low & ~1, high & ~1

    def runs(self, threshold: int, *, held_out: bool) -> np.ndarray:
        """The tokens of the segments whose hash is below `threshold` (held out), or of the others.

        Returns:
            (R, 4) int64, one row a run of consecutive tokens: unit, begin, end, and 1 if it does not go on from the run
            before.
        """
        if threshold == 0:
            return self._runs(threshold, held_out)
        name = f"{'held-out' if held_out else 'train'}-{threshold:x}"
        return self._kept(name, lambda: self._runs(threshold, held_out), 4)

    def _kept(self, name: str, compute: Callable[[], np.ndarray], columns: int) -> np.ndarray:
        """An array of 8-byte values that is computed of the whole index; of a large one once for all processes."""
        folder = self.path.parents[1] / "files"
        if sum(unit["segments"] for unit in self.units) < KEPT_FROM or not folder.is_dir():
            return compute()
        path = folder / f"{self.path.name}.{name}"
        with contextlib.suppress(OSError):
            raw = path.read_bytes()
            if raw[:16] == xxhash.xxh3_128_digest(path.name.encode() + raw[16:]):
                return np.frombuffer(raw, np.int64, offset=16).reshape(-1, columns)
        array = compute()
        raw = array.tobytes()
        with contextlib.suppress(OSError):  # a full or read-only disk: each process computes it
            write_whole(path, xxhash.xxh3_128_digest(path.name.encode() + raw) + raw)
        return array

    def _runs(self, threshold: int, held_out: bool) -> np.ndarray:
        if threshold == 0:  # no index is read
            filled = [(number, unit["tokens"]) for number, unit in enumerate(self.units) if unit["segments"]]
            whole = [(number, 0, tokens, int(place == 0)) for place, (number, tokens) in enumerate(filled)]
            return np.array([] if held_out else whole, np.int64).reshape(-1, 4)
        runs = [np.zeros((0, 4), np.int64)]
        touching = False
        for number, unit in enumerate(self.units):
            if not unit["segments"]:
                continue
            starts, hashes = self._index(number)
            wanted = (hashes < np.uint64(threshold)) == held_out
            edges = np.flatnonzero(np.diff(wanted, prepend=False, append=False))
            places = np.append(starts, np.uint64(unit["tokens"])).astype(np.int64)[edges].reshape(-1, 2)
            fresh = np.ones(len(places), np.int64)
            if len(places) and touching and places[0, 0] == 0:
                fresh[0] = 0
            runs.append(np.column_stack([np.full(len(places), number), places, fresh]))
            touching = bool(wanted[-1])
        return np.concatenate(runs)

    def read(self, unit: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [begin, end) of a unit, and the positions in them (from 0) at which documents start."""
        tokens = self._map(unit, "bin", self.manifest["dtype"], self.units[unit]["tokens"])[begin:end]
        starts, digests = self._index(unit)
        a, b = np.searchsorted(starts, np.array([begin, end], np.uint64))
        inside = (digests[a:b] & np.uint64(1)).astype(bool)
        begins = (starts[a:b][inside] - np.uint64(begin)).astype(np.int64)
        if begin == 0 and len(tokens) and not (len(begins) and begins[0] == 0) and self._begun_before(unit):
            begins = np.append(0, begins)
        return tokens, begins

    def _begun_before(self, unit: int) -> bool:
        """Whether a document begins at the end of the units before, with nothing there that could be used."""
        for number in reversed(range(unit)):
            starts, digests = self._index(number)
            tokens = self.units[number]["tokens"]
            if (digests[starts == tokens] & np.uint64(1)).any():
                return True
            if tokens:
                break
        return False

    def _index(self, unit: int) -> np.ndarray:
        """(2, S) uint64: starts and hashes of the unit's segments."""
        return self._map(unit, "idx", "<u8", 2 * self.units[unit]["segments"]).reshape(2, -1)

    def _map(self, unit: int, suffix: str, dtype: str, length: int) -> np.ndarray:
        path = str(self.path / f"{unit:06d}.{suffix}")
        try:
            found = _maps()(path, dtype)
        except FileNotFoundError:
            raise DamagedShards(f"{path} is missing") from None
        if len(found) != length:
            raise DamagedShards(f"{path} holds {len(found):,} numbers instead of {length:,}")
        return found


@cache
def _maps() -> Callable[[str, str], np.ndarray]:
    """`_open` with as many maps kept as this process may: else every row of a large source would open its files."""
    unlimited = resource.RLIM_INFINITY
    soft, hard = (4 * MAPS if n == unlimited else n for n in resource.getrlimit(resource.RLIMIT_NOFILE))
    if soft < (wanted := min(2 * MAPS, hard)):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return lru_cache(maxsize=max(OPEN_FILES, min(MAPS, soft // 2)))(_open)


def _open(path: str, dtype: str) -> np.ndarray:
    try:
        # A plain view: np.memmap's own slicing costs microseconds each time.
        return np.asarray(np.memmap(path, dtype=dtype, mode="r"))
    except ValueError:  # an empty file cannot be mapped
        return np.zeros(0, dtype)


def forget_maps() -> None:
    """Map files anew from now on: those in some place have been replaced."""
    _maps.cache_clear()


class TokenStream:
    """The tokens of some sources in a row, as if they were one array.

    Args:
        parts: for each source its number, its shards and the runs of them that belong to the stream.
    """

    def __init__(self, parts: Sequence[tuple[int, TokenShards, np.ndarray]]) -> None:
        self._shards = [shards for _, shards, _ in parts]
        self._sources = [source for source, _, _ in parts]
        rows = [np.column_stack([np.full(len(runs), p), runs]) for p, (_, _, runs) in enumerate(parts)]
        self._runs = np.concatenate([np.zeros((0, 5), np.int64), *rows])  # part, unit, begin, end, fresh
        self._ends = np.cumsum(self._runs[:, 3] - self._runs[:, 2])
        self.size = int(self._ends[-1]) if len(self._ends) else 0

    def read(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """`length` tokens from `start` of the stream repeated for ever, and where in them new documents begin.

        A place where the text does not go on from the token before (something held out, another source, the wrap)
        counts as a new document. Position 0 is listed only if a document begins there.
        """
        pieces, marks = [], []
        done, position = 0, start % self.size
        run = int(np.searchsorted(self._ends, position, side="right"))
        while done < length:
            part, unit, begin, end, fresh = self._runs[run].tolist()
            left = int(self._ends[run]) - position
            take = min(left, length - done)
            ids, starts = self._shards[part].read(unit, end - left, end - left + take)
            pieces.append(ids)
            if fresh and end - left == begin and not (len(starts) and starts[0] == 0):
                marks.append(np.array([done]))
            marks.append(starts + done)
            done += take
            position = (position + take) % self.size
            run = (run + 1) % len(self._runs)
        return np.concatenate(pieces), np.concatenate(marks)

    def source_at(self, position: int) -> int:
        """The number of the source that the token at `position` comes from."""
        run = int(np.searchsorted(self._ends, position % self.size, side="right"))
        return self._sources[int(self._runs[run, 0])]
