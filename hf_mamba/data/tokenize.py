"""Documents -> memory-mapped shards, once: parallel, resumable, content-addressed, published whole.

The folder `tokens/KEY.building` collects complete units, whoever writes them; a build that was killed goes on with the
missing ones, and the finished folder has the same bytes as one built in peace. KEY is a hash of the files' content,
the text column and the tokenizer.
"""

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_mamba.data.cache import NotPrepared, cache_root, digest, locked
from hf_mamba.data.encoding import Encoding
from hf_mamba.data.records import plan_units
from hf_mamba.data.segments import MAX_EXAMPLES, BadRecords
from hf_mamba.data.shards import FORMAT, MANIFEST, DamagedShards, TokenShards, check_file, forget_maps, seal
from hf_mamba.data.sources import DataFile, Source
from hf_mamba.data.tokenizer import contents_of, no_text
from hf_mamba.data.worker import Job, unit_names
from hf_mamba.files import disk_errors, disk_message, publish_folder, usable_cores, write_whole
from hf_mamba.progress import bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("hf_mamba.data")


def tokenize_source(source: Source, tokenizer: "PreTrainedTokenizerBase | Encoding", **options: Any) -> TokenShards:
    """The tokens of one source; see `tokenize_sources`."""
    return tokenize_sources([source], tokenizer, **options)[0]


def tokenize_sources(
    sources: Sequence[Source],
    tokenizer: "PreTrainedTokenizerBase | Encoding",
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    num_proc: int | None = None,
    on_bad_record: str = "count",
    verify: bool = False,
    progress: bool = True,
    build: bool = True,
    contents: Sequence[str] | None = None,
) -> list[TokenShards]:
    """The tokens of some sources, from the cache or built now, all by the same processes.

    Any number of processes may call this at once: one builds, the others wait for it.

    Args:
        tokenizer: a fast tokenizer, or how its ids are made.
        num_proc: worker processes; as many as this process may use cores when None.
        on_bad_record: "count" skips records without usable text and reports them; "raise" makes them an error.
        verify: compare the checksums of a cached result, not only sizes; what is damaged is made again.
        progress: show a bar while building.
        build: make what is not in the cache.
        contents: the sources' fingerprints, as another process found them (see `contents_of`). Where the cache has
            their tokens, no file of the sources is looked at, and of the tokens those that are read.

    Raises:
        NotPrepared: (a ValueError) one is not in the cache, and `build` is false.
        ValueError: nothing readable, no text column, bad records with "raise", or a disk that is full or read-only.
    """
    if on_bad_record not in ("count", "raise"):
        raise ValueError(f'on_bad_record is {on_bad_record!r}; it must be "count" or "raise"')
    if num_proc is not None and num_proc < 1:
        raise ValueError(f"num_proc is {num_proc}; give at least 1 process, or leave it out to use all cores")
    root = cache_root(cache_dir)
    encoding = tokenizer if isinstance(tokenizer, Encoding) else Encoding.of(tokenizer)

    def identities(contents: Sequence[str]) -> dict[Path, dict[str, Any]]:
        """What is made of each source, by its folder; of equal sources, one."""
        made = [{"format": FORMAT, "content": content, "tokenizer": encoding.fingerprint} for content in contents]
        return {root / "tokens" / digest(identity): identity for identity in made}

    # published whole, so no lock is needed, nor permission to write
    shards = {final: _whole(final, verify, sized=True) for final in identities(contents or ())}
    builds: dict[Path, _Build] = {}
    if contents is None or None in shards.values():
        files = [source.files() for source in sources]
        contents = contents_of(sources, root, files)
        for final, identity in identities(contents).items():
            shards[final] = shards.get(final) or _whole(final, verify)
            if shards[final] is None:
                number = contents.index(identity["content"])
                builds[final] = _Build(sources[number], files[number], identity, encoding, final, verify)
    if builds and not build:
        raise NotPrepared(f"{next(iter(builds.values())).source.spec} is not tokenised yet")
    if builds:
        _make(list(builds.values()), num_proc or usable_cores(), on_bad_record == "raise", progress)
        forget_maps()  # of a damaged result in the same place
        shards |= {final: TokenShards(final) for final in builds}
    by_content = {one.content: one for one in shards.values() if one is not None}
    out = [by_content[content] for content in contents]
    for source, one in zip(sources, out, strict=True):
        bad = _bad(one.units)
        if bad.counts and on_bad_record == "raise":
            raise ValueError(_bad_message(source, bad))
        if bad.counts:
            logger.warning("%s (skipped)", _bad_message(source, bad))
    return out


def _whole(final: Path, verify: bool, sized: bool = False) -> TokenShards | None:
    """The finished shards; None when there are none, or damaged ones, which is said."""
    if not final.exists():
        return None
    try:
        shards = TokenShards(final, sized)
        if verify:
            shards.verify()
        return shards
    except DamagedShards as damage:
        logger.warning("damaged: %s; it is made again", damage)
        return None


def _reclaim(final: Path) -> None:
    """Make a damaged result the folder to build in, for the sake of its good units."""
    building = final.with_name(final.name + ".building")
    if final.exists():
        shutil.rmtree(building, ignore_errors=True)
        os.replace(final, building)
        (building / MANIFEST).unlink(missing_ok=True)


class _Build:
    """The build of one source's shards, beside `final`; it is published when its last unit is added.

    In `parts`, which is of this build alone, files are written before they get their names.
    """

    def __init__(
        self,
        source: Source,
        files: list[DataFile],
        identity: dict[str, Any],
        encoding: Encoding,
        final: Path,
        verify: bool,
    ) -> None:
        self.source, self.final, self.units = source, final, plan_units(files)
        self.folder = final.with_name(final.name + ".building")
        self.parts = final.parents[1] / "parts" / final.name
        self._identity, self._encoding, self._verify = identity, encoding, verify
        self._records: dict[int, dict[str, Any]] = {}
        self._held = contextlib.ExitStack()  # the lock, and the folder of parts

    def begin(self) -> list[int]:
        """Wait for the lock; the units to be made. There are none where another process has made them meanwhile."""
        self._held.enter_context(locked(self.final.parents[1], f"tokens-{self.final.name}"))
        with disk_errors(self.final):
            if _whole(self.final, self._verify) is not None:
                self.close()
                return []
            _reclaim(self.final)
            shutil.rmtree(self.parts, ignore_errors=True)
            self.parts.mkdir()
            self._held.callback(shutil.rmtree, self.parts, ignore_errors=True)
            job = Job(self.units, self.source.text_column, self._encoding)
            if not job.continues(self.folder / "job.json"):
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.mkdir()
            write_whole(self.folder / "job.json", job.to_json(), self.parts)
            numbers = range(len(self.units))
            self._records = {n: record for n in numbers if (record := _finished(self.folder, n)) is not None}
            if self.whole:
                self.publish()
        return [n for n in numbers if n not in self._records]

    @property
    def whole(self) -> bool:
        return len(self._records) == len(self.units)

    def add(self, number: int, record: dict[str, Any]) -> None:
        """A unit is made."""
        self._records[number] = record

    def publish(self) -> None:
        """Give the complete folder its name, and the lock back.

        Raises:
            ValueError: there is no text in it, or the disk's reason.
        """
        with disk_errors(self.final):
            units = [self._records[n] for n in range(len(self.units))]
            if not any(unit["tokens"] for unit in units):
                shutil.rmtree(self.folder)
                raise ValueError(no_text([self.source], _bad(units)))
            manifest = {**self._identity, "dtype": self._encoding.dtype, "eos": self._encoding.eos, "units": units}
            write_whole(self.folder / MANIFEST, seal(manifest), self.parts)
            publish_folder(self.folder, self.final)
        self.close()

    def close(self) -> None:
        """Give the lock back, in whatever state the build is; what is finished stays."""
        self._held.close()


def _make(builds: list[_Build], num_proc: int, strict: bool, progress: bool) -> None:
    """Have all builds made by the same processes, in their order; the first failure stops them all.

    A build is begun when the units of those before it are handed out: a process holds few locks at a time, and never
    waits for one while another that it holds has units left to hand out, so two processes cannot wait for each other.

    Args:
        strict: the first unusable record is a failure.
    """
    coming, begun = iter(builds), list[_Build]()
    todo: deque[tuple[_Build, int]] = deque()
    failures: list[Exception] = []
    ended = threading.Event()
    handing_out, counting = threading.Lock(), threading.Lock()
    units, name = sum(len(build.units) for build in builds), builds[0].source.spec
    what = name if len(builds) == 1 else f"{len(builds)} sources"
    shown = bar(not progress, total=units, desc=f"tokenising {what}", unit="part")
    rate = _Rate()

    def next_unit() -> tuple[_Build, int] | None:
        with handing_out:
            while not todo:
                if (build := next(coming, None)) is None:
                    return None
                begun.append(build)
                numbers = build.begin()
                shown.update(len(build.units) - len(numbers))
                todo.extend((build, number) for number in numbers)
            return todo.popleft()

    def drive(worker: _Worker) -> None:
        try:
            while not ended.is_set() and (unit := next_unit()) is not None:
                build, number = unit
                record = worker.do((build.folder, build.parts, number))
                if record["bad"] and strict:
                    raise ValueError(_bad_message(build.source, _bad([record])))
                with counting:
                    build.add(number, record)
                    rate.add(record)
                    shown.set_postfix_str(str(rate), refresh=False)
                    shown.update()
                    last = build.whole
                if last:
                    build.publish()
        except Exception as error:
            failures.append(error)
            ended.set()

    workers: list[_Worker] = []
    try:
        if (first := next_unit()) is None:  # another process has made all, while this one waited
            return
        todo.appendleft(first)
        workers += [_Worker() for _ in range(min(units, num_proc))]
        threads = [threading.Thread(target=drive, args=(worker,), daemon=True) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        ended.set()
        for started in workers:
            started.stop()
        for build in begun:
            build.close()
        shown.close()
    if failures:
        raise failures[0]
    if rate.tokens:
        logger.info("%s: tokenised %s", what, rate)


def _finished(folder: Path, number: int) -> dict[str, Any] | None:
    """The record of a unit that an earlier build completed and whose files are still what it wrote."""
    try:
        record = json.loads((folder / unit_names(number)[2]).read_text())
        for name, expected in record["files"].items():
            check_file(folder / name, expected, full=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return record


class _Rate:
    """What has been tokenised since it was made, and how fast."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.tokens = self._bytes = 0

    def add(self, record: dict[str, Any]) -> None:
        self.tokens += record["tokens"]
        self._bytes += record["text_bytes"]

    def __str__(self) -> str:
        seconds = time.perf_counter() - self._began
        speed = f"{self.tokens / seconds:,.0f} tokens/s, {self._bytes / seconds / 1e6:.1f} MB/s"
        return f"{self.tokens:,} tokens, {speed}"


class _Worker:
    """A child process that tokenises units, one at a time. It ends when its parent does."""

    def __init__(self) -> None:
        package_home = str(Path(__file__).parents[2])
        path = os.pathsep.join([package_home, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hf_mamba.data.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,  # Ctrl-C is for the parent, which ends them
            env={**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        )

    def do(self, unit: tuple[Path, Path, int]) -> dict[str, Any]:
        """The record of a unit, which has its build's folder, a folder for parts of files, and its number.

        Raises:
            ValueError: what the worker reports, or its death.
        """
        assert self.process.stdin
        assert self.process.stdout
        try:
            self.process.stdin.write(json.dumps([str(part) for part in unit]) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self.process.wait()
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            hint = "; if memory ran out, use fewer processes (num_proc)" if code == -9 else "; its message is above"
            raise ValueError(f"a tokenising process {how}{hint}. What is finished is kept and will be used again.")
        reply = json.loads(line)
        if "disk" in reply:
            raise ValueError(disk_message(unit[0], reply["disk"]))
        if "error" in reply:
            raise ValueError(reply["error"])
        return reply

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                assert pipe
                pipe.close()


def _bad(units: list[dict[str, Any]]) -> BadRecords:
    bad = BadRecords()
    for unit in units:
        bad.counts.update(unit["bad"])
        bad.examples = (bad.examples + unit["bad_examples"])[:MAX_EXAMPLES]
    return bad


def _bad_message(source: Source, bad: BadRecords) -> str:
    what = ", ".join(f"{count:,} × {reason}" for reason, count in bad.counts.most_common())
    return f"{source.spec}: unusable records: {what}; the first: {'; '.join(bad.examples)}"
