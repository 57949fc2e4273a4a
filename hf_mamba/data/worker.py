"""One tokenising process: `python -m hf_mamba.data.worker`; a line [FOLDER, PARTS, NUMBER] on stdin for each unit.

A fresh interpreter rather than a fork: the parent may hold CUDA, NCCL and other threads, which a fork would break.
"""

import json
import os
import sys
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from hf_mamba.data.encoding import Encoding
from hf_mamba.data.records import Unit, read_unit
from hf_mamba.data.segments import BadRecords, Segment
from hf_mamba.files import disk_reason, open_whole, write_whole

BATCH_CHARS = 1 << 20


@dataclass(frozen=True)
class Job:
    """What all units of one build share; `job.json` in the folder being built."""

    units: list[Unit]
    text_column: str
    encoding: Encoding

    def to_json(self) -> bytes:
        units = [unit.to_dict() for unit in self.units]
        value = {"units": units, "text_column": self.text_column, "encoding": self.encoding.to_dict()}
        return json.dumps(value).encode()

    def continues(self, path: Path) -> bool:
        """Whether a build whose `job.json` is at `path` cut the same units, wherever the files were then."""
        try:
            other = Job.load(path)
        except (OSError, ValueError, KeyError, TypeError):
            return False
        cuts, others = ([(len(u.files), u.begin, u.end) for u in job.units] for job in (self, other))
        return (cuts, self.encoding.to_dict()) == (others, other.encoding.to_dict())

    @classmethod
    def load(cls, path: Path, before: "Job | None" = None) -> "Job":
        """A job from its file; the tokenizer of the one before it is not made again where it is the same."""
        value = json.loads(path.read_text())
        units = [Unit.from_dict(unit) for unit in value["units"]]
        encoding = Encoding.from_dict(value["encoding"])
        if before is not None and encoding == replace(before.encoding, fingerprint=""):
            encoding = before.encoding
        return cls(units, value["text_column"], encoding)


def unit_names(number: int) -> tuple[str, str, str]:
    """Tokens, index and record of a unit. The record is written last: with it, the unit is complete."""
    return f"{number:06d}.bin", f"{number:06d}.idx", f"{number:06d}.json"


def tokenize_unit(number: int, job: Job, folder: Path, parts: Path) -> dict[str, Any]:
    """Write the tokens and the index of one unit; return its record, which is also written.

    The index is two rows of uint64, one column a segment: where it starts in the tokens, and the xxh3-64 of its text
    with the lowest bit saying whether it starts a document.
    """
    names = unit_names(number)
    encoding, bad = job.encoding, BadRecords()
    starts, digests = array("Q"), array("Q")
    special: Counter[str] = Counter()
    tokens = documents = text_bytes = 0
    checksum = xxhash.xxh3_128()
    with open_whole(folder / names[0], parts) as file:
        for batch in _batches(read_unit(job.units[number], job.text_column, bad, encoding.take)):
            for segment, ids in zip(batch, encoding.encode(batch), strict=True):
                raw = segment.raw()
                special += encoding.count_special(ids, segment)
                starts.append(tokens)
                digests.append(xxhash.xxh3_64_intdigest(raw) & ~1 | segment.first)
                tokens += len(ids)
                documents += segment.last
                text_bytes += len(raw) if segment.ids is None else 0
                block = np.array(ids, dtype=encoding.dtype).tobytes()
                checksum.update(block)
                file.write(block)
        size = file.tell()
    index = starts.tobytes() + digests.tobytes()
    write_whole(folder / names[1], index, parts)
    record = {
        "tokens": tokens,
        "segments": len(starts),
        "documents": documents,
        "text_bytes": text_bytes,
        "bad": dict(sorted(bad.counts.items())),
        "bad_examples": bad.examples,
        "special": dict(sorted(special.items())),
        "files": {
            names[0]: {"size": size, "checksum": checksum.hexdigest()},
            names[1]: {"size": len(index), "checksum": xxhash.xxh3_128_hexdigest(index)},
        },
    }
    write_whole(folder / names[2], json.dumps(record), parts)
    return record


def _batches(segments: Iterator[Segment]) -> Iterator[list[Segment]]:
    batch: list[Segment] = []
    size = 0
    for segment in segments:
        batch.append(segment)
        size += len(segment.text) + 4 * len(segment.ids or ())
        if size >= BATCH_CHARS:
            if os.getppid() != _PARENT:  # the parent was killed; its successor does this unit
                raise SystemExit(1)
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


_PARENT = os.getppid()


def main() -> None:
    """Do units until stdin ends. A reply is a unit's record, or {"error": message} for what the user can mend."""
    folder, job = None, None
    for line in sys.stdin:
        building, parts, number = json.loads(line)
        try:
            if job is None or building != folder:
                folder, job = building, Job.load(Path(building) / "job.json", job)
            reply = tokenize_unit(int(number), job, Path(building), Path(parts))
        except ValueError as error:
            reply = {"error": str(error)}
        except OSError as error:
            reason = disk_reason(error)
            if reason is None:
                raise
            reply = {"disk": reason}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, OSError):
        if isinstance(sys.exception(), OSError) and os.getppid() == _PARENT:
            raise
        raise SystemExit(1) from None  # interrupted, or left behind by a parent that was killed
