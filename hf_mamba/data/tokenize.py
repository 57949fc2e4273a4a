"""Documents -> memory-mapped shards, once: parallel, resumable, content-addressed, published whole.

The folder `tokens/KEY.building` collects complete units, whoever writes them; a build that was killed goes on with the
missing ones, and the finished folder has the same bytes as one built in peace. KEY is a hash of the files' content,
the text column and the tokenizer.
"""

import json
import logging
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cache import cache_root, digest, disk_errors, disk_message, locked, publish_folder, write_atomic
from .records import BadRecords, Unit, check_columns, plan_units
from .shards import FORMAT, MANIFEST, DamagedShards, TokenShards, check_file, seal
from .sources import Source
from .tokenizer import backend, no_text, source_fingerprint, tokenizer_fingerprint
from .worker import Job, unit_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("hf_mamba.data")


def tokenize_source(
    source: Source,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    num_proc: int | None = None,
    on_bad_record: str = "count",
    progress: bool = True,
) -> TokenShards:
    """The tokens of a source, from the cache or built now.

    Any number of processes may call this at once: one builds, the others wait for it.

    Args:
        num_proc: worker processes; as many as this process may use cores when None.
        on_bad_record: "count" skips records without usable text and reports them; "raise" makes them an error.
        progress: show a bar while building.

    Raises:
        ValueError: nothing readable, no text column, bad records with "raise", or a disk that is full or read-only.
    """
    if on_bad_record not in ("count", "raise"):
        raise ValueError(f'on_bad_record is {on_bad_record!r}; it must be "count" or "raise"')
    root = cache_root(cache_dir)
    files = source.files()
    check_columns(files, source.text_column)
    content = source_fingerprint(files, source.text_column, root)
    fingerprint = tokenizer_fingerprint(tokenizer)
    key = digest({"format": FORMAT, "content": content, "tokenizer": fingerprint})
    final = root / "tokens" / key
    with disk_errors(final), locked(root, f"tokens-{key}"):
        shards = _open(final)
        if shards is None:
            identity = {"format": FORMAT, "content": content, "tokenizer": fingerprint}
            shards = _build(final, identity, source, plan_units(files), tokenizer, num_proc, progress)
    _report_bad(shards, source, on_bad_record)
    return shards


def _open(final: Path) -> TokenShards | None:
    """The finished shards; None when they must be built. Damaged ones become a build that keeps their good units."""
    if not final.exists():
        return None
    try:
        return TokenShards(final)
    except DamagedShards as damage:
        logger.warning("%s; the damaged part is made again", damage)
        building = _building(final)
        shutil.rmtree(building, ignore_errors=True)
        os.replace(final, building)
        (building / MANIFEST).unlink(missing_ok=True)
        return None


def _building(final: Path) -> Path:
    return final.with_name(final.name + ".building")


def _build(
    final: Path,
    identity: dict[str, Any],
    source: Source,
    units: list[Unit],
    tokenizer: "PreTrainedTokenizerBase",
    num_proc: int | None,
    progress: bool,
) -> TokenShards:
    parts = final.parent.parent / "parts"
    folder = _building(final)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in parts.glob(f"{folder.name}.*"):
        stale.unlink(missing_ok=True)
    # The largest id, not the count: ids may have holes.
    largest = max(backend(tokenizer).get_vocab(with_added_tokens=True).values())
    job = Job(units, source.text_column, int(tokenizer.eos_token_id), "<u2" if largest < 1 << 16 else "<u4")
    write_atomic(folder / "job.json", job.to_json(), parts)
    write_atomic(folder / "tokenizer.json", backend(tokenizer).to_str().encode(), parts)
    records = {n: r for n in range(len(units)) if (r := _finished(folder, n)) is not None}
    records |= _run_workers(
        folder, parts, units, set(range(len(units))) - set(records), num_proc, source.spec, progress
    )
    manifest = {**identity, "dtype": job.dtype, "eos": job.eos, "units": [records[n] for n in range(len(units))]}
    if not any(unit["tokens"] for unit in manifest["units"]):
        shutil.rmtree(folder)
        raise ValueError(no_text([source], _bad(manifest)))
    write_atomic(folder / MANIFEST, seal(manifest), parts)
    publish_folder(folder, final)
    return TokenShards(final)


def _finished(folder: Path, number: int) -> dict[str, Any] | None:
    """The record of a unit that an earlier build completed and whose files are still what it wrote."""
    try:
        record = json.loads((folder / unit_names(number)[2]).read_text())
        for name, expected in record["files"].items():
            check_file(folder / name, expected, full=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return record


def _run_workers(
    folder: Path, parts: Path, units: list[Unit], missing: set[int], num_proc: int | None, name: str, progress: bool
) -> dict[int, dict[str, Any]]:
    """Have the missing units made by worker processes; the first failure stops them all."""
    from tqdm import tqdm

    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in sorted(missing):
        todo.put(number)
    count = min(len(missing), num_proc or len(os.sched_getaffinity(0)))
    records: dict[int, dict[str, Any]] = {}
    failures: list[Exception] = []
    workers = [_Worker(folder, parts) for _ in range(count)]
    began = time.perf_counter()
    bar = tqdm(total=len(units), initial=len(units) - len(missing), desc=f"tokenising {name}", disable=not progress)

    def drive(worker: "_Worker") -> None:
        while not failures:
            try:
                number = todo.get_nowait()
            except queue.Empty:
                return
            try:
                records[number] = worker.do(number)
            except Exception as error:
                failures.append(error)
                return
            bar.update()
            bar.set_postfix_str(f"{_rate(records, began)}", refresh=False)

    threads = [threading.Thread(target=drive, args=(worker,), daemon=True) for worker in workers]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        for worker in workers:
            worker.stop()
        bar.close()
    if failures:
        raise failures[0]
    if records:
        logger.info("%s: tokenised %s", name, _rate(records, began))
    return records


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
        self.process.communicate()


def _bad(manifest: dict[str, Any]) -> BadRecords:
    bad = BadRecords()
    for unit in manifest["units"]:
        bad.counts.update(unit["bad"])
        bad.examples = (bad.examples + unit["bad_examples"])[:5]
    return bad


def _report_bad(shards: TokenShards, source: Source, on_bad_record: str) -> None:
    bad = _bad(shards.manifest)
    if not bad.counts:
        return
    what = ", ".join(f"{count:,} × {reason}" for reason, count in bad.counts.most_common())
    message = f"{source.spec}: unusable records: {what}; the first: {'; '.join(bad.examples)}"
    if on_bad_record == "raise":
        raise ValueError(f'{message}. Mend them, or skip them with on_bad_record="count"')
    logger.warning("%s (skipped)", message)
