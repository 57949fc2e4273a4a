"""Which statements of this repository the figures of a session confirm or refute. Standard library only.

A statement is a row: the words, the file in which they stand (a test holds that they do), the figures that speak of it
and what each of them has to be. One whose words change is looked at again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from benchmarks.gpu_session.figures import Done, Figure

Holds = Callable[[Figure], bool | None]  # None: the figure says nothing


@dataclass(frozen=True)
class Statement:
    """Words of this repository that figures can confirm or refute.

    Attributes:
        file, says: where they stand, and they.
        figures: a pattern of figures' "step/setting/name".
        holds: what each of these has to be, and `means` in words.
    """

    file: str
    says: str
    figures: str
    means: str
    holds: Holds


def within(factor: float) -> Holds:
    return lambda figure: figure.value <= factor


def below_beside(factor: float = 1) -> Holds:
    return lambda figure: None if figure.beside is None else figure.value <= factor * figure.beside


def at_least(least: float) -> Holds:
    return lambda figure: figure.value >= least


def matches(share: float) -> Holds:
    return lambda figure: abs(figure.ratio - 1) <= share


README, FIGURES, TRITON = "README.md", "benchmarks/README.md", "hf_mamba/ops/TRITON.md"
DISPATCH, NORM, GPUS = "hf_mamba/ops/dispatch.py", "hf_mamba/ops/mamba_ssm.py", "hf_mamba/preflight/cost/gpus.py"

STATEMENTS = tuple(
    Statement(*row)
    for row in (
        (README, "on GPUs the kernels are Triton's", "a-*/error", "errors are within tolerance", below_beside()),
        (README, "on GPUs the kernels are Triton's", "a-tests/*/failed", "no test fails", within(0)),
        (README, "on GPUs the kernels are Triton's", "a-tests/*/error", "no test ends with an error", within(0)),
        (TRITON, "in a fixed order", "a-repeats/*/broken promises", "20 runs give the same bits", within(0)),
        (TRITON, "cannot show a race", "a-races/*/races", "racecheck finds none", within(0)),
        (DISPATCH, "triton, then torch", "b-*/triton / torch", "triton is faster", within(1)),
        (DISPATCH, "where installed", "b-*/triton / mamba-ssm as dispatched", "mamba_ssm is faster", at_least(1)),
        (
            TRITON,
            "Rules instead of autotuning",
            "b-scan/*/triton / best rule",
            "another is at most 5% faster",
            within(1.05),
        ),
        (NORM, "one pass over memory", "b-pointwise/gated_rms_norm*/triton", "1.5 times its bytes", below_beside(1.5)),
        (README, "never builds the whole logits", "b-head/*memory", "it takes less memory", within(1)),
        (FIGURES, "head with loss", "b-head/*/hf_mamba / all logits", "it is at most 10% slower", within(1.1)),
        (README, "will start, fit and finish", "c-*/steps", "all steps are made", matches(0)),
        (README, "will start, fit and finish", "c-*/loss", "the loss falls", below_beside()),
        (README, "will start, fit and finish", "c-auto/*/auto runs out", "memory does not run out", within(0)),
        (README, "what fits, and which micro-batch", "c-auto/*/1.15 times runs out", "memory runs out", at_least(1)),
        ("CONTRIBUTING.md", "within 5%", "c-*/memory", "measured within 5% of the prediction", matches(0.05)),
        (FIGURES, "are stated allowances", "c-*/memory, all", "the prediction with them is enough", below_beside()),
        (GPUS, "Dense peak rates in TFLOP/s", "card//products, *", "none is exceeded", below_beside()),
        (GPUS, "Dense peak rates in TFLOP/s", "c-*/MFU", "none is exceeded", below_beside()),
        (README, "one CUDA graph per batch size", "d-*/static / hf_mamba", "it is faster than without", within(1)),
        (README, "`generate` are transformers' own", "d-*/* / transformers", "and at least as fast", within(1)),
    )
)


def report(figures: Sequence[Figure], done: Mapping[str, Done], steps: Sequence[str]) -> tuple[str, str]:
    """report.md, and the statements alone."""
    lines = judge(figures)
    summary = "\n".join(lines)
    card = [figure.note for figure in figures if figure.key == "card//multiprocessors"]
    out = [
        "# A session on a GPU",
        "",
        *card,
        "",
        "## What the figures say of statements here",
        "",
        *lines,
        "",
        "## Steps",
        "",
    ]
    out += ["| step | seconds | |", "|---|---:|---|"]
    for name in steps:
        row = done.get(name)
        out.append(f"| {name} | {row.seconds if row else ''} | {row.why.replace('|', '/') if row else 'not run'} |")
    out += ["", "## Figures", "", "| step | setting | | figure | beside | note |", "|---|---|---|---:|---:|---|"]
    for f in figures:
        beside = "" if f.beside is None else f"{f.beside:.4g} ({f.ratio:.2f})" if f.beside else "0"
        out.append(f"| {f.step} | {f.setting} | {f.name} | {f.value:.4g} {f.unit} | {beside} | {f.note} |")
    return "\n".join(out) + "\n", summary


def judge(figures: Sequence[Figure], statements: Sequence[Statement] = STATEMENTS) -> list[str]:
    """A table: each statement with its verdict, and the figures that refute it."""
    lines = ["| verdict | statement | that is | figures |", "|---|---|---|---|"]
    for row in statements:
        judged = [(f, row.holds(f)) for f in figures if fnmatchcase(f.key, row.figures)]
        found = [figure for figure, holds in judged if holds is not None]
        against = [figure for figure, holds in judged if holds is False]
        verdict = "refuted" if against else "confirmed" if found else "open"
        shown = "; ".join(f"{figure.key} {figure.value:.4g} {figure.unit}".strip() for figure in against[:4])
        more = f"; and {len(against) - 4} more" if len(against) > 4 else ""
        refuting = f"{len(against)} of {len(found)}: {shown}{more}"
        said = refuting if against else str(len(found)) if found else row.figures
        lines.append(f"| {verdict} | {row.file}: {row.says} | {row.means} | {said} |")
    return lines
