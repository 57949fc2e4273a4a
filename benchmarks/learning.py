"""How well each family learns, with AdamW and with Muon, on equal terms.

    python -m benchmarks.run learning            about 25 minutes of two quiet cores; started again, it goes on
    python -m benchmarks.run learning --small    rehearse in a minute or two, whose figures mean nothing

Two layers of each family are trained on the standard library's code, from nothing. Every pair of a family and an
optimizer first has one trial for each of RATES, judged on text that is cut from the training text. The best rate is
then trained with three seeds and judged on the held-out text, twice: with equal tokens, and with equal processor time,
which is Mamba's with AdamW. A step's time is measured beforehand, all pairs in turn on one thread: neither what else
the machine does nor the number of jobs decides who may train for longer.

Runs are processes of their own. What has been run is in learning.partial.jsonl until all is; learning.csv, learning.md
and learning.png are made of it.
"""

import argparse
import csv
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from hf_mamba.data import PackedDataset, TokenShards, parse_sources, tokenize_source, train_tokenizer
from hf_mamba.data.dataset import EvalDataset, collate
from hf_mamba.data.encoding import Encoding
from hf_mamba.data.shards import TokenStream
from hf_mamba.data.sources import EMBEDDED
from hf_mamba.family import family_of, get_preset
from hf_mamba.run.processes import use_cpu_well
from hf_mamba.training.evaluation import bytes_per_token
from hf_mamba.training.muon import Muon, muon_groups
from hf_mamba.training.optimizer import decay_groups

from . import apart

RESULTS = Path(__file__).parent / "results"
FAMILIES = {"mamba": "tiny_mamba", "mamba2": "tiny_mamba2", "hybrid": "tiny_hybrid"}
OPTIMIZERS = ("adamw", "muon")
PAIRS = tuple((family, optimizer) for family in FAMILIES for optimizer in OPTIMIZERS)
RATES = (3e-3, 6e-3, 12e-3, 24e-3)
SEEDS, TRIAL_SEED = (0, 1, 2), 100
WARM_UP, DECAY, CLIP, BETAS = 0.05, 0.1, 1.0, (0.9, 0.95)
REPORTED, CUT = (int(share * 2**64) for share in (0.01, 0.03))  # hashes below: held out; between: to choose a rate by
POINTS, TURNS = 6, 12  # evaluations of a run, timed steps of a pair
LIMIT = 3600  # seconds of a process
COLUMNS = ("kind", "family", "optimizer", "rate", "seed", "step", "tokens", "seconds", "bits_per_byte")
KINDS = {"tokens": "equal tokens", "time": "equal processor time"}
Pair = tuple[str, str]


@dataclass(frozen=True)
class Size:
    """What is trained: `steps` of `rows` of `length` tokens by Mamba with AdamW, and the models' sizes."""

    vocabulary: int = 1024
    length: int = 256
    rows: int = 4
    steps: int = 500
    width: int = 128
    layers: int = 2


SMALL = Size(300, 128, 2, 6, 32, 2)


class Run(NamedTuple):
    """One training; `kind` is "trial" or one of KINDS."""

    kind: str
    family: str
    optimizer: str
    rate: float
    seed: int
    steps: int


class Texts(NamedTuple):
    """The training text, what rates are chosen by, what is reported, and bytes of a token of these two."""

    train: TokenStream
    cut: EvalDataset
    reported: EvalDataset
    bytes: Mapping[str, float]


def read_texts(size: Size) -> Texts:
    source = parse_sources([EMBEDDED])[0]
    tokenizer: Any = train_tokenizer([source], size.vocabulary)
    shards = tokenize_source(source, Encoding.of(tokenizer, template=True, split_special_tokens=None), progress=False)
    parts = {"cut": between(shards, REPORTED, CUT), "reported": shards.runs(REPORTED, held_out=True)}
    rows = {
        name: EvalDataset([TokenStream([(0, shards, runs)])], size.length, int(tokenizer.eos_token_id))
        for name, runs in parts.items()
    }
    sizes = {name: bytes_per_token(dataset, tokenizer) for name, dataset in rows.items()}
    return Texts(TokenStream([(0, shards, shards.runs(CUT, held_out=False))]), **rows, bytes=sizes)


def between(shards: TokenShards, low: int, high: int) -> np.ndarray:
    """The runs, as of `TokenShards.runs`, of the segments whose hash is from `low` up to `high`."""
    found = [np.zeros((0, 4), np.int64)]
    for number, unit in enumerate(shards.units):
        inside = np.zeros(unit["tokens"], bool)
        for threshold in (high, low):
            for where, begin, end, _ in shards.runs(threshold, held_out=True).tolist():
                if where == number:
                    inside[begin:end] = threshold == high
        edges = np.flatnonzero(np.diff(inside, prepend=False, append=False)).reshape(-1, 2)
        found.append(np.column_stack([np.full(len(edges), number), edges, np.ones(len(edges), np.int64)]))
    return np.concatenate(found)


def build(family: str, optimizer: str, rate: float, seed: int, size: Size) -> tuple[Any, torch.optim.Optimizer]:
    config = get_preset(FAMILIES[family]).config | {
        "vocab_size": size.vocabulary,
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
    }
    if family == "hybrid":
        config |= {"layer_types": ["mamba"] * (size.layers - 1) + ["attention"], "num_key_value_heads": 1}
        config |= {"num_attention_heads": size.width // 32, "shared_intermediate_size": 2 * size.width}
    kind = family_of(config)
    torch.manual_seed(seed)
    model: Any = kind.model_class(kind.config_class(**config))
    options: dict[str, Any] = {"lr": rate, "betas": BETAS, "fused": True}
    if optimizer == "muon":
        return model, Muon(muon_groups(model, model.config, DECAY), **options)
    return model, torch.optim.AdamW(decay_groups(model, DECAY), **options)


def step(model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> None:
    model(**batch, skip_logits=True).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad()


def rows_of(texts: Texts, size: Size, seed: int, steps: int) -> Iterator[dict[str, torch.Tensor]]:
    rows = PackedDataset([texts.train], size.length, seed)
    for number in range(steps):
        yield collate([rows[number * size.rows + i] for i in range(size.rows)])


def costs(texts: Texts, size: Size) -> dict[str, float]:
    """Processor seconds of a step of each pair, "family optimizer": the median of turns, the first two left out."""
    made = {pair: build(*pair, RATES[0], 0, size) for pair in PAIRS}
    seconds: dict[Pair, list[float]] = {pair: [] for pair in PAIRS}
    for batch in rows_of(texts, size, TRIAL_SEED, TURNS + 2):
        for pair, (model, optimizer) in made.items():
            begin = time.process_time()
            step(model, optimizer, batch)
            seconds[pair].append(time.process_time() - begin)
    return {" ".join(pair): statistics.median(found[2:]) for pair, found in seconds.items()}


def train(texts: Texts, size: Size, run: Run) -> list[tuple[int, float]]:
    """(step, bits per byte) of each evaluation; the rate rises for 5% of the steps and falls to nothing."""
    part = "cut" if run.kind == "trial" else "reported"
    looks = {run.steps} if part == "cut" else {math.ceil(run.steps * (i + 1) / POINTS) for i in range(POINTS)}
    model, optimizer = build(run.family, run.optimizer, run.rate, run.seed, size)
    warm, found = max(1, round(WARM_UP * run.steps)), []
    for number, batch in enumerate(rows_of(texts, size, run.seed, run.steps)):
        for group in optimizer.param_groups:
            group["lr"] = run.rate * min((number + 1) / warm, (run.steps - number) / max(1, run.steps - warm))
        step(model, optimizer, batch)
        if number + 1 in looks:
            found.append((number + 1, bits_per_byte(model, getattr(texts, part), texts.bytes[part])))
    return found


@torch.no_grad()
def bits_per_byte(model: Any, rows: EvalDataset, size: float) -> float:
    """`size` is the bytes of a token."""
    total = count = 0.0
    model.eval()
    for first in range(0, len(rows), 16):
        batch = collate([rows[i] for i in range(first, min(first + 16, len(rows)))])
        counted = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model(**batch, skip_logits=True).loss) * counted
        count += counted
    model.train()
    return total / count / math.log(2) / size


class Done:
    """What has been run of a size, in a file of lines: {"size", "run" or "cost", ...}."""

    def __init__(self, path: Path, size: Size) -> None:
        self.path, self.size = path, asdict(size)

    def lines(self) -> list[dict[str, Any]]:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [row for line in lines if (row := json.loads(line))["size"] == self.size]

    def add(self, **row: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"size": self.size, **row}) + "\n")

    def cost(self) -> dict[str, float] | None:
        return next((row["cost"] for row in self.lines() if "cost" in row), None)

    def runs(self) -> dict[Run, list[tuple[int, float]]]:
        return {Run(*row["run"]): [(s, b) for s, b in row["points"]] for row in self.lines() if "run" in row}


def in_processes(done: Done, groups: Sequence[Sequence[Run]], jobs: int, small: bool) -> None:
    """Do what is missing of each group in a process of its own, `jobs` at a time; an empty group measures the costs.

    Raises:
        SystemExit: where one did not come to its end, once the others are through.
    """

    def start(group: Sequence[Run]) -> str:
        command = [sys.executable, "-m", "benchmarks.learning", str(done.path), json.dumps(group)]
        return apart.run([*command, *["--small"] * small], LIMIT)

    ended = done.runs()
    missing = [left for group in groups if (left := [run for run in group if run not in ended]) or not group]
    with ThreadPoolExecutor(jobs) as pool:
        reasons = [reason for reason in pool.map(start, missing) if reason]
    if reasons:
        raise SystemExit(
            f"A process was {reasons[0]}: what it said is above. The same command goes on with what is left."
        )


def measure(done: Done, jobs: int, small: bool) -> dict[str, float]:
    """Do all runs; returns the seconds of a step of each pair."""
    rates, seeds = (RATES[:2], SEEDS[:2]) if small else (RATES, SEEDS)
    if done.cost() is None:
        in_processes(done, [()], 1, small)
    cost = done.cost()
    assert cost is not None
    steps = done.size["steps"]
    trials = [[Run("trial", *pair, rate, TRIAL_SEED, steps) for rate in rates] for pair in PAIRS]
    in_processes(done, trials, jobs, small)
    ended = done.runs()
    groups = []
    for kind in KINDS:
        for pair, tried in zip(PAIRS, trials, strict=True):
            best = min(tried, key=lambda run: ended[run][-1][1])
            own = steps if kind == "tokens" else steps_of(cost, pair, steps)
            groups.append([Run(kind, *pair, best.rate, seed, own) for seed in seeds])
    in_processes(done, groups, jobs, small)
    return cost


def steps_of(cost: Mapping[str, float], pair: Pair, steps: int) -> int:
    """The steps of a pair that take as long as `steps` of Mamba with AdamW."""
    return round(steps * cost[" ".join(PAIRS[0])] / cost[" ".join(pair)])


# ---- what is written of it ----


def points(size: Size, cost: Mapping[str, float], runs: Mapping[Run, list[tuple[int, float]]]) -> Iterator[list[Any]]:
    """The rows of learning.csv."""
    for run, found in runs.items():
        for number, bits in found:
            tokens, seconds = number * size.rows * size.length, number * cost[f"{run.family} {run.optimizer}"]
            yield [
                run.kind,
                run.family,
                run.optimizer,
                run.rate,
                run.seed,
                number,
                tokens,
                f"{seconds:.2f}",
                f"{bits:.4f}",
            ]


def summary(size: Size, cost: Mapping[str, float], runs: Mapping[Run, list[tuple[int, float]]]) -> str:
    """learning.md: the tables and what they say."""
    lines = [
        "# How well each family learns",
        "",
        f"`python -m benchmarks.run learning`: {size.layers} layers of width {size.width}, a vocabulary of "
        f"{size.vocabulary:,}, steps of {size.rows} rows of {size.length} tokens of the standard library's code. "
        "Bits per byte of held-out files: the mean of the seeds, the least and the greatest. Every pair had as many "
        "trials of rates, on other text.",
    ]
    for kind, title in KINDS.items():
        lines += ["", f"## {title.capitalize()}", "", "| family | optimizer | rate | steps | seconds | bits per byte |"]
        lines.append("|---|---|---:|---:|---:|---|")
        ends = ends_of(kind, runs)
        for (family, optimizer), (run, bits) in ends.items():
            seconds = run.steps * cost[f"{family} {optimizer}"]
            spread = f"{statistics.mean(bits):.3f} [{min(bits):.3f} .. {max(bits):.3f}]"
            lines.append(f"| {family} | {optimizer} | {run.rate:g} | {run.steps} | {seconds:.0f} | {spread} |")
        lines += ["", *verdict({pair: bits for pair, (_, bits) in ends.items()})]
    lines += ["", *edges(runs), "The curves are of one training each: before its end, its rate has not fallen yet."]
    return "\n".join([*lines, "", "![bits per byte against tokens and seconds](learning.png)", ""])


def ends_of(kind: str, runs: Mapping[Run, list[tuple[int, float]]]) -> dict[Pair, tuple[Run, list[float]]]:
    """Each pair's runs of a kind: one of them, and what all of them came to."""
    found: dict[Pair, tuple[Run, list[float]]] = {}
    for run, curve in runs.items():
        if run.kind == kind:
            found.setdefault((run.family, run.optimizer), (run, []))[1].append(curve[-1][1])
    return found


def verdict(bits: Mapping[Pair, Sequence[float]]) -> list[str]:
    """What the seeds' figures say: Muon beside AdamW in each family, then the families, each with its better one."""
    lines = []
    for family in FAMILIES:
        words = compare(bits[family, "muon"], bits[family, "adamw"])
        lines.append(f"- {family}: Muon {words} AdamW.")
    best = {family: min((bits[family, o] for o in OPTIMIZERS), key=statistics.mean) for family in FAMILIES}
    first, *others = sorted(best, key=lambda family: statistics.mean(best[family]))
    words = "; it ".join(f"{compare(best[first], best[other])} {other}" for other in others)
    return [*lines, f"- The families, each with its better optimizer: {first} {words}."]


def compare(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """ "needs 3.1% fewer bits than", or that the seeds' ranges meet."""
    change = statistics.mean(ours) / statistics.mean(theirs) - 1
    if max(ours) >= min(theirs) and max(theirs) >= min(ours):
        return f"is within the seeds' range ({change:+.1%}) of"
    return f"needs {abs(change):.1%} {'fewer' if change < 0 else 'more'} bits than"


def edges(runs: Mapping[Run, list[tuple[int, float]]]) -> list[str]:
    """A line where a chosen rate is the least or the greatest that was tried: a better one may lie beyond."""
    tried = {run.rate for run in runs if run.kind == "trial"}
    chosen = {(run.family, run.optimizer): run.rate for run in runs if run.kind != "trial"}
    names = [" with ".join(pair) for pair, rate in chosen.items() if rate in (min(tried), max(tried))]
    return (
        [f"At the edge of the rates that were tried: {', '.join(names)}. A better one may lie beyond."] if names else []
    )


def plot(rows: Iterable[Sequence[Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves: dict[tuple[Any, ...], list[Sequence[Any]]] = {}
    for row in rows:
        if row[0] in KINDS:
            curves.setdefault(tuple(row[:5]), []).append(row)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    named = set()
    for (kind, family, optimizer, *_), curve in curves.items():
        axis, column = axes[list(KINDS).index(kind)], COLUMNS.index("tokens" if kind == "tokens" else "seconds")
        label = None if (kind, family, optimizer) in named else f"{family}, {optimizer}"
        named.add((kind, family, optimizer))
        style = {"color": f"C{list(FAMILIES).index(family)}", "linestyle": "-" if optimizer == "muon" else "--"}
        axis.plot([float(row[column]) for row in curve], [float(row[-1]) for row in curve], label=label, **style)
    for axis, (kind, title) in zip(axes, KINDS.items(), strict=True):
        axis.set(xlabel="tokens" if kind == "tokens" else "processor seconds of one thread", title=title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("bits per byte, held-out files")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run learning", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="by default benchmarks/results; of a rehearsal, a temporary folder")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument("--small", action="store_true", help="rehearse: six steps, whose figures mean nothing")
    options = parser.parse_args(argv)
    size = SMALL if options.small else Size()
    out = options.out or (Path(tempfile.mkdtemp(prefix="learning-")) if options.small else RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    done = Done(out / "learning.partial.jsonl", size)
    read_texts(size)  # tokenises, so that no two runs do
    cost = measure(done, options.jobs, options.small)
    runs = done.runs()
    rows = list(points(size, cost, runs))
    with (out / "learning.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    (out / "learning.md").write_text(text := summary(size, cost, runs))
    plot(rows, out / "learning.png")
    done.path.unlink()
    print(f"{text}\nin {out}")
    return 0


def run_group(argv: list[str]) -> None:
    """Do the runs of a group, in a process that `in_processes` starts."""
    path, group, *small = argv
    size = SMALL if small else Size()
    use_cpu_well(deepspeed=False)
    torch.set_num_threads(1)
    texts, done = read_texts(size), Done(Path(path), size)
    runs = [Run(*run) for run in json.loads(group)]
    if not runs:
        done.add(cost=costs(texts, size))
    for run in runs:
        begin = time.process_time()
        found = train(texts, size, run)
        done.add(run=run, points=found)
        seconds = time.process_time() - begin
        print(
            f"  {' '.join(map(str, run))}: {found[-1][1]:.4f} bits per byte, {seconds:.0f} processor seconds",
            flush=True,
        )


if __name__ == "__main__":
    run_group(sys.argv[1:])
