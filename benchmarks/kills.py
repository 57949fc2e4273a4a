"""How often a run may be killed: `python -m benchmarks.run kills [--kills 100] [--seed 0] [--out FILE]`.

Every start of a run is killed (SIGKILL) in one of its phases: just before a change of the disk, which is drawn, or some
milliseconds after it, while bytes are being written. After several kills the run is let finish, and everything that it
leaves must be what an undisturbed run leaves: the losses in the log, every tensor of the last checkpoint and the model,
the bytes of the tokens, the names of all files; and no process may be left. Two processes are killed together, or by
the death of their launcher alone. A conversion must give the same bytes. Writes benchmarks/results/kills.md.

Runs are forks of the tests' fork server, so that a start takes seconds; those under a launcher are real commands.
"""

import argparse
import contextlib
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from launching import LAUNCHERS, RECIPE, environment, free_port  # noqa: E402
from runs import SETTINGS, Launcher, curve, kill, log_lines, same_bytes, serving, wait_for  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "kills.md"
KILLS_OF_A_CHAIN = 5
RUN: dict[str, Any] = {
    "save_steps": 2,
    "save_total_limit": 2,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "per_device_eval_batch_size": 1,
}


class Phase(NamedTuple):
    """Changes of the disk, from the first that names `marker` on, and how many of them are worth a kill."""

    marker: str
    events: int


PHASES = {
    "tokenising": Phase("/hf_mamba/", 26),
    "saving": Phase("/.saving", 60),
    "rotating": Phase("/.saving/removed-", 14),
    "exporting": Phase("/model.partial", 28),
    "converting": Phase(".partial", 12),
}

# In the process that is to be killed: it says when it has come to the event, and goes no further where it is held.
STRIKE = """
def strike():
    import os, sys, time
    if os.environ.get("RANK", "0") != "0":
        return
    changes, seen = ("os.rename", "os.remove", "os.rmdir", "os.mkdir"), 0
    def count(name, arguments):
        nonlocal seen
        opened = name == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if not (opened or name in changes) or seen < 0:
            return
        if seen or any({marker!r} in str(part) for part in arguments[:2]):
            seen += 1
        if seen == {event}:
            seen = -1
            os.close(os.open({reached!r}, os.O_CREAT | os.O_WRONLY))
            if {held}:
                time.sleep(600)
    sys.addaudithook(count)
strike()
"""


@dataclass
class Tally:
    """Kills that hit, by what was killed, and what was not as it should be."""

    kills: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.kills.total()} kills, {len(self.faults)} faults; {dict(self.kills)} {self.faults[-1:]}"

    def check(self, what: str, differing: Any) -> None:
        if differing:
            self.faults.append(f"{what}: {differing}")


class Blow(NamedTuple):
    """One kill: before the n-th change of the disk in a phase, or some seconds after it."""

    phase: str
    event: int
    delay: float | None

    @classmethod
    def draw(cls, phase: str, rng: random.Random) -> "Blow":
        delay = None if rng.random() < 0.5 else rng.uniform(0, 0.05)
        return cls(phase, rng.randint(1, PHASES[phase].events), delay)

    def patch(self, reached: Path) -> str:
        marker = PHASES[self.phase].marker
        return STRIKE.format(marker=marker, event=self.event, reached=str(reached), held=self.delay is None)


def strike(blow: Blow, folder: Path, start: Callable[[str], Any], ended: Callable[[Any], bool]) -> Any:
    """Start something with a patch and wait until the blow's moment, or its end; what was started, or None."""
    reached = folder.with_name(f"{folder.name}.reached")
    reached.unlink(missing_ok=True)
    started = start(blow.patch(reached))
    wait_for(lambda: reached.exists() or ended(started), timeout=300)
    hit = reached.exists()
    reached.unlink(missing_ok=True)
    if hit and blow.delay:
        time.sleep(blow.delay)
    return started if hit else None


def gone(pid: int) -> bool:
    """Whether a process has ended, waited for or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def left_behind(word: str) -> list[str]:
    """The processes with this in their command line, once they have had time to notice that they are alone."""

    def there() -> list[str]:
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if word in line and not gone(int(entry.name)):
                        found.append(f"{entry.name} {line[:200]}")
        return found

    with contextlib.suppress(TimeoutError):
        wait_for(lambda: not there(), timeout=20)
    return there()


def names(folder: Path) -> set[str]:
    """All files below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def differences(reference: Path, folder: Path) -> Iterator[str]:
    """Whatever distinguishes two finished runs, and the tokens in their caches `<run>-home`."""
    if curve(reference) != curve(folder):
        yield "the losses"
    if log_lines(reference, "eval_loss") != log_lines(folder, "eval_loss"):
        yield "the held-out losses"
    for part in ("checkpoint-10", "checkpoint-12", "model"):
        yield from (f"{part}: {name}" for name in same_bytes(reference / part, folder / part))
    yield from (f"{name} is there in one" for name in names(reference) ^ names(folder))
    one, other = (path.with_name(f"{path.name}-home") / "hf_mamba" for path in (reference, folder))
    if other.exists():
        tokens = {str(p.relative_to(one)): p.read_bytes() for p in (one / "tokens").rglob("*.[bi][id][nx]")}
        yield from (name for name, content in tokens.items() if (other / name).read_bytes() != content)
        yield from (f"{name} is there in one" for name in names(one) ^ names(other))


def chain(launcher: Launcher, tally: Tally, reference: Path, name: str, blows: list[Blow], world: int = 1) -> None:
    """One run, killed by each of the blows that hits, then let finish and compared with `reference`."""
    folder = launcher.folder / name
    home = folder.with_name(f"{name}-home")
    settings = RUN | ({"deepspeed": str(ROOT / "ds_configs" / "zero2.json")} if world > 1 else {})
    for blow in blows:
        launch = strike(
            blow,
            folder,
            lambda patch: launcher.start(folder, world, patch=patch, home=home, **settings),
            lambda launch: all(gone(rank.pid) for rank in launch.ranks),
        )
        if launch is None:
            tally.check(f"{name}, before {blow}", "" if (folder / "model").is_dir() else "it ended by itself")
            break
        with contextlib.suppress(ProcessLookupError):
            kill(launch)
        tally.kills[f"{blow.phase}, {world} process{'es' * (world > 1)}"] += 1
        tally.check(f"{name}, after {blow}", left_behind(f"{home}/"))
    done = launcher.start(folder, world, home=home, **settings)
    codes = done.wait(300)
    tally.check(name, "" if codes == [0] * world else f"{codes}: {done.text()[-500:]}")
    if codes == [0] * world:
        tally.check(f"{name} after {blows}", list(differences(reference, folder)))
    for path in (folder, home):
        shutil.rmtree(path, ignore_errors=True)


def under_launcher(folder: Path, tally: Tally, reference: Path, rng: random.Random, kills: int) -> None:
    """The launcher alone is killed, from its first second on: its ranks must end, and the next start go on."""
    run, cache = folder / "launched", folder / "launched-cache"
    settings = SETTINGS | RUN | {"deepspeed": str(ROOT / "ds_configs" / "zero2.json"), "output_dir": str(run)}
    settings |= {"dataset": str(folder / "corpus.jsonl"), "use_cpu": "true"}
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", *LAUNCHERS["deepspeed"]]
    command += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]

    def start(output: Any) -> subprocess.Popen[bytes]:
        port = ["--main_process_port", str(free_port())]
        return subprocess.Popen([*command, *port, RECIPE, *flags], env=environment(cache), stdout=output, stderr=output)

    with open(folder / "launched.txt", "wb") as output:
        for number in range(kills):
            launcher = start(output)
            if number % 2 == 0:  # while its ranks start
                wait_for(lambda pid=launcher.pid: Path(f"/proc/{pid}/task/{pid}/children").read_text(), timeout=120)
                time.sleep(rng.uniform(0, 6))
            else:
                seen = len(log_lines(run))
                wait_for(lambda seen=seen: len(log_lines(run)) > seen, timeout=300)
                time.sleep(rng.uniform(0, 0.5))
            launcher.kill()
            launcher.wait()
            tally.kills["the launcher alone, 2 processes"] += 1
            tally.check(f"launcher killed ({number})", left_behind(f"{run} "))
        code = start(output).wait(600)
    tally.check("launched", code and f"{code}: {(folder / 'launched.txt').read_text()[-500:]}")
    if not code:
        tally.check("launched", list(differences(reference, run)))


def conversions(folder: Path, tally: Tally, model: Path, rng: random.Random, kills: int) -> None:
    """`hf-mamba convert` in both directions: killed, run again, and the bytes compared with an undisturbed one's."""
    code = "import sys; exec(sys.argv.pop(1)); from hf_mamba.cli import main; sys.exit(main())"
    undisturbed: dict[str, Path] = {}
    for number in range(kills):
        to = ("state-spaces", "transformers")[number % 2]
        source = undisturbed.get("state-spaces", model) if to == "transformers" else model
        target = folder / "conversions" / to

        def command(patch: str, target: Path = target, source: Path = source, to: str = to) -> subprocess.Popen[bytes]:
            words = [sys.executable, "-c", code, patch, "convert", str(source), str(target), "--to", to]
            return subprocess.Popen(words, stdout=subprocess.DEVNULL)

        if to not in undisturbed:
            undisturbed[to] = folder / "converted" / to
            assert command("", undisturbed[to]).wait() == 0
        blow = Blow.draw("converting", rng)
        started = strike(blow, target, command, lambda process: process.poll() is not None)
        if started is not None:
            started.kill()
            started.wait()
            tally.kills["converting"] += 1
        if not target.exists():  # killed after its publication, it is whole
            tally.check(f"convert {blow}", command("").wait() and "another code")
        one, other = undisturbed[to], target
        tally.check(f"convert {blow}, names", sorted(names(one) ^ names(other)))
        tally.check(f"convert {blow}", [n for n in names(one) if (one / n).read_bytes() != (other / n).read_bytes()])
        shutil.rmtree(target)
        tally.check(f"convert {blow}, left", os.listdir(target.parent))


def undisturbed(launcher: Launcher, name: str, world: int = 1) -> Path:
    """A run that nobody kills."""
    settings = RUN | ({"deepspeed": str(ROOT / "ds_configs" / "zero2.json")} if world > 1 else {})
    launcher.run(name, world, home=launcher.folder / f"{name}-home", **settings)
    return launcher.folder / name


def measure(launcher: Launcher, kills: int, seed: int, report: Callable[[Tally], Any] = print) -> Tally:
    """At least this many kills: a quarter under ZeRO-2, a tenth each of launchers and of conversions."""
    tally, rng = Tally(), random.Random(seed)
    phases = list(PHASES)[:-1]
    reference, of_two = undisturbed(launcher, "undisturbed"), undisturbed(launcher, "undisturbed-2", 2)
    conversions(launcher.folder, tally, reference / "model", rng, kills // 10)
    report(tally)
    under_launcher(launcher.folder, tally, of_two, rng, kills // 10)
    report(tally)
    number = 0
    while tally.kills.total() < kills:
        number, world = number + 1, 2 if tally.kills.total() >= 0.75 * kills else 1
        order = sorted((rng.choice(phases) for _ in range(KILLS_OF_A_CHAIN)), key=phases.index)
        blows = [Blow.draw(phase, rng) for phase in order]
        chain(launcher, tally, of_two if world > 1 else reference, f"killed-{number}", blows, world)
        report(tally)
    return tally


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run kills", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as launcher:
        tally = measure(launcher, options.kills, options.seed, lambda tally: print(tally, flush=True))
    rows = "".join(f"| {what} | {count} |\n" for what, count in sorted(tally.kills.items()))
    text = (
        f"# Kills\n\n`python -m benchmarks.run kills --kills {options.kills} --seed {options.seed}`, "
        f"{time.monotonic() - began:.0f} s on {len(os.sched_getaffinity(0))} cores ({platform.platform()}).\n\n"
        f"| killed while | times |\n|---|---:|\n{rows}| **all** | {tally.kills.total()} |\n\n"
        f"Not as it would have been undisturbed: {len(tally.faults)}\n\n" + "".join(f"- {f}\n" for f in tally.faults)
    )
    options.out.write_text(text)
    print(text)
    return bool(tally.faults)
