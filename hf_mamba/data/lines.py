"""Lines of a file of bytes, packed or not; of a damaged archive, those that were whole before the damage."""

import zlib
from collections.abc import Iterator

from hf_mamba.data.segments import BadRecords, reason_of
from hf_mamba.data.sources import DataFile

BLOCK = 1 << 16
ROOM = 1 << 20  # unpacked at once: a small archive may hold very much


class DamagedArchive(Exception):
    """What follows in an archive cannot be unpacked."""


def read_lines(file: DataFile, begin: int, end: int, bad: BadRecords) -> Iterator[tuple[int, bytes]]:
    """(byte offset, line) of the lines that begin in [begin, end), and of the one after; end -1 is the file's end.

    Raises:
        ValueError: the disk cannot read the file.
    """
    offset = begin
    try:
        for offset, line in _plain(file.path, begin) if file.compression is None else _split(unpacked(file)):
            yield offset, line
            if 0 <= end <= offset:
                return
    except DamagedArchive as error:
        bad.add(f"damaged archive ({error})", f"{file.name} after byte {offset}")
    except OSError as error:
        raise ValueError(f"{file.path} cannot be read: {error.strerror or reason_of(error)}") from error


def head(file: DataFile, size: int = 4096) -> bytes:
    """The first bytes of a file, unpacked; of a damaged archive those that there are."""
    found = b""
    try:
        for block in unpacked(file):
            found += block
            if len(found) >= size:
                break
    except (OSError, DamagedArchive):
        pass
    return found[:size]


def unpacked(file: DataFile) -> Iterator[bytes]:
    """The bytes of a file in blocks.

    Raises:
        DamagedArchive: after the last bytes that can be had.
    """
    if file.compression == "gzip":
        yield from _gunzip(file.path)
    elif file.compression == "zstd":
        yield from _unzstd(file.path)
    else:
        with open(file.path, "rb") as handle:
            while block := handle.read(BLOCK):
                yield block


def _plain(path: str, begin: int) -> Iterator[tuple[int, bytes]]:
    with open(path, "rb", buffering=1 << 20) as handle:
        offset = begin
        if begin > 0:  # the line that holds byte begin-1 belongs to the range before
            handle.seek(begin - 1)
            offset = begin - 1 + len(handle.readline())
        while line := handle.readline():
            yield offset, line
            offset += len(line)


def _split(blocks: Iterator[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines of blocks; the last may have no end, but damage does not end a line."""
    offset = 0
    pieces: list[bytes] = []
    for block in blocks:
        *whole, rest = block.split(b"\n")
        for line in whole:
            line = b"".join([*pieces, line, b"\n"])
            pieces = []
            yield offset, line
            offset += len(line)
        if rest:
            pieces.append(rest)
    if pieces:
        yield offset, b"".join(pieces)


def _gunzip(path: str) -> Iterator[bytes]:
    """Members one after the other; zeros may follow the last (tapes)."""
    with open(path, "rb") as handle:
        member, members = zlib.decompressobj(31), 0
        fresh = True  # no byte of the member has been read
        while block := handle.read(BLOCK):
            while block:
                if fresh and members and not (block := block.lstrip(b"\0")):
                    break
                fresh, before = False, member.copy()
                try:
                    out = member.decompress(block, ROOM)
                except zlib.error:
                    yield from _before_the_damage(before, block)
                    raise DamagedArchive("it cannot be unpacked from here on") from None
                if out:
                    yield out
                block = member.unused_data if member.eof else member.unconsumed_tail
                if member.eof:
                    member, fresh, members = zlib.decompressobj(31), True, members + 1
    if not members and fresh:
        raise DamagedArchive("it is empty")
    if not fresh:
        if out := member.flush():
            yield out
        raise DamagedArchive("its end is missing")


def _before_the_damage(member: "zlib._Decompress", block: bytes) -> Iterator[bytes]:
    for i in range(len(block)):
        try:
            if out := member.decompress(block[i : i + 1]):
                yield out
        except zlib.error:
            return


def _unzstd(path: str) -> Iterator[bytes]:
    """Arrow gives nothing of a read that meets damage, so there smaller reads are tried from where it was met."""
    import pyarrow as pa

    given, size = 0, BLOCK
    while True:
        try:
            with pa.input_stream(path, compression="zstd", buffer_size=BLOCK) as stream:
                skip = given
                while skip:
                    skip -= len(stream.read(min(skip, size)))
                while out := stream.read(size):
                    given += len(out)
                    yield out
            break
        except OSError as error:
            if error.errno is not None:
                raise
            size //= 2
            if not size:
                raise DamagedArchive(reason_of(error)) from None
    if not given:
        with open(path, "rb") as handle:
            if not handle.read(1):
                raise DamagedArchive("it is empty")
