"""Documents -> memory-mapped shards, once: parallel, resumable, content-addressed, published whole.

The folder `tokens/KEY.building` collects complete units, whoever writes them; a build that was killed goes on with the
missing ones, and the finished folder has the same bytes as one built in peace. KEY is a hash of the files' content,
the text column and the tokenizer.
"""

import contextlib
import json
import logging
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_mamba.data.cache import NotPrepared, cache_root, digest, locked
from hf_mamba.data.encoding import Encoding
from hf_mamba.data.records import Unit, check_columns, plan_units
from hf_mamba.data.segments import MAX_EXAMPLES, BadRecords
from hf_mamba.data.shards import FORMAT, MANIFEST, DamagedShards, TokenShards, check_file, forget_maps, seal
from hf_mamba.data.sources import Source
from hf_mamba.data.tokenizer import no_text, source_fingerprint
from hf_mamba.data.worker import Job, unit_names
from hf_mamba.files import disk_errors, disk_message, publish_folder, usable_cores, write_whole
from hf_mamba.progress import bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("hf_mamba.data")


def tokenize_source(
    source: Source,
    tokenizer: "PreTrainedTokenizerBase | Encoding",
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    num_proc: int | None = None,
    on_bad_record: str = "count",
    verify: bool = False,
    progress: bool = True,
    build: bool = True,
) -> TokenShards:
    """The tokens of a source, from the cache or built now.

    Any number of processes may call this at once: one builds, the others wait for it.

    Args:
        tokenizer: a fast tokenizer, or how its ids are made.
        num_proc: worker processes; as many as this process may use cores when None.
        on_bad_record: "count" skips records without usable text and reports them; "raise" makes them an error.
        verify: compare the checksums of a cached result, not only sizes; what is damaged is made again.
        progress: show a bar while building.
        build: make what is not in the cache.

    Raises:
        NotPrepared: (a ValueError) it is not in the cache, and `build` is false.
        ValueError: nothing readable, no text column, bad records with "raise", or a disk that is full or read-only.
    """
    if on_bad_record not in ("count", "raise"):
        raise ValueError(f'on_bad_record is {on_bad_record!r}; it must be "count" or "raise"')
    if num_proc is not None and num_proc < 1:
        raise ValueError(f"num_proc is {num_proc}; give at least 1 process, or leave it out to use all cores")
    root = cache_root(cache_dir)
    files = source.files()
    check_columns(files, source.text_column)
    content = source_fingerprint(files, source.text_column, root)
    encoding = tokenizer if isinstance(tokenizer, Encoding) else Encoding.of(tokenizer)
    fingerprint = encoding.fingerprint
    key = digest({"format": FORMAT, "content": content, "tokenizer": fingerprint})
    final = root / "tokens" / key
    shards = _whole(final, verify)  # published whole, so no lock is needed, nor permission to write
    if shards is None and not build:
        raise NotPrepared(f"{source.spec} is not tokenised yet")
    if shards is None:
        with locked(root, f"tokens-{key}"), disk_errors(final):
            shards = _whole(final, verify)
            if shards is None:
                cores = num_proc or usable_cores()
                strict = on_bad_record == "raise"
                parts = root / "parts" / key
                work = _Build(source, _reclaim(final), parts, plan_units(files), cores, strict, progress)
                identity = {"format": FORMAT, "content": content, "tokenizer": fingerprint}
                publish_folder(work.run(identity, encoding), final)
                forget_maps()  # of a damaged result in the same place
                shards = TokenShards(final)
    bad = _bad(shards.units)
    if bad.counts:
        message = _bad_message(source, bad)
        if on_bad_record == "raise":
            raise ValueError(message)
        logger.warning("%s (skipped)", message)
    return shards


def _whole(final: Path, verify: bool) -> TokenShards | None:
    """The finished shards; None when there are none, or damaged ones, which is said."""
    if not final.exists():
        return None
    try:
        shards = TokenShards(final)
        if verify:
            shards.verify()
        return shards
    except DamagedShards as damage:
        logger.warning("damaged: %s; it is made again", damage)
        return None


def _reclaim(final: Path) -> Path:
    """The folder to build in. A damaged result becomes that folder, for the sake of its good units."""
    building = final.with_name(final.name + ".building")
    if final.exists():
        shutil.rmtree(building, ignore_errors=True)
        os.replace(final, building)
        (building / MANIFEST).unlink(missing_ok=True)
    return building


@dataclass(frozen=True)
class _Build:
    """One build of a source's shards, in `folder`; in `parts`, of this build alone, files are written before that."""

    source: Source
    folder: Path
    parts: Path
    units: list[Unit]
    num_proc: int
    strict: bool  # the first unusable record ends the build
    progress: bool

    def run(self, identity: dict[str, Any], encoding: Encoding) -> Path:
        """Make what is missing; return the folder with its manifest, ready to be published."""
        shutil.rmtree(self.parts, ignore_errors=True)
        self.parts.mkdir()
        try:
            return self._run(identity, encoding)
        finally:
            shutil.rmtree(self.parts, ignore_errors=True)

    def _run(self, identity: dict[str, Any], encoding: Encoding) -> Path:
        job = Job(self.units, self.source.text_column, encoding)
        if not job.continues(self.folder / "job.json"):
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
        write_whole(self.folder / "job.json", job.to_json(), self.parts)
        numbers = range(len(self.units))
        records = {n: record for n in numbers if (record := _finished(self.folder, n)) is not None}
        records |= self._tokenize([n for n in numbers if n not in records])
        units = [records[n] for n in numbers]
        if not any(unit["tokens"] for unit in units):
            shutil.rmtree(self.folder)
            raise ValueError(no_text([self.source], _bad(units)))
        manifest = {**identity, "dtype": encoding.dtype, "eos": encoding.eos, "units": units}
        write_whole(self.folder / MANIFEST, seal(manifest), self.parts)
        return self.folder

    def _tokenize(self, missing: list[int]) -> dict[int, dict[str, Any]]:
        """Have the missing units made by worker processes; the first failure stops them all."""
        todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in missing:
            todo.put(number)
        records: dict[int, dict[str, Any]] = {}
        failures: list[Exception] = []
        workers = [_Worker(self.folder, self.parts) for _ in range(min(len(missing), self.num_proc))]
        began = time.perf_counter()
        shown = bar(
            not self.progress,
            total=len(self.units),
            initial=len(self.units) - len(missing),
            desc=f"tokenising {self.source.spec}",
            unit="part",
        )

        def drive(worker: _Worker) -> None:
            while not failures:
                try:
                    number = todo.get_nowait()
                    records[number] = record = worker.do(number)
                    if record["bad"] and self.strict:
                        raise ValueError(_bad_message(self.source, _bad([record])))
                except queue.Empty:
                    return
                except Exception as error:
                    failures.append(error)
                    return
                shown.set_postfix_str(_rate(records, began), refresh=False)
                shown.update()

        threads = [threading.Thread(target=drive, args=(worker,), daemon=True) for worker in workers]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            for worker in workers:
                worker.stop()
            shown.close()
        if failures:
            raise failures[0]
        if records:
            logger.info("%s: tokenised %s", self.source.spec, _rate(records, began))
        return records


def _finished(folder: Path, number: int) -> dict[str, Any] | None:
    """The record of a unit that an earlier build completed and whose files are still what it wrote."""
    try:
        record = json.loads((folder / unit_names(number)[2]).read_text())
        for name, expected in record["files"].items():
            check_file(folder / name, expected, full=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return record


def _rate(records: dict[int, dict[str, Any]], began: float) -> str:
    done = list(records.values())
    seconds = time.perf_counter() - began
    tokens, size = sum(r["tokens"] for r in done), sum(r["text_bytes"] for r in done)
    return f"{tokens:,} tokens, {tokens / seconds:,.0f} tokens/s, {size / seconds / 1e6:.1f} MB/s"


class _Worker:
    """A child process that tokenises units, one at a time. It ends when its parent does."""

    def __init__(self, folder: Path, parts: Path) -> None:
        self.folder = folder
        package_home = str(Path(__file__).parents[2])
        path = os.pathsep.join([package_home, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hf_mamba.data.worker", str(folder), str(parts)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,  # Ctrl-C is for the parent, which ends them
            env={**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        )

    def do(self, number: int) -> dict[str, Any]:
        """One unit's record.

        Raises:
            ValueError: what the worker reports, or its death.
        """
        assert self.process.stdin
        assert self.process.stdout
        try:
            self.process.stdin.write(f"{number}\n")
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
            raise ValueError(disk_message(self.folder, reply["disk"]))
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
