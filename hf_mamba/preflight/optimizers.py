"""The optimizers of which the pre-flight knows more than the name: AdamW, and Muon, which transformers has not."""

from collections.abc import Iterable

from hf_mamba.family import Parameter
from hf_mamba.sizes import muon_batch

ADAMW = ("adamw_torch", "adamw_torch_fused")
MUON = "muon"  # training/muon.py
INSTEAD = {MUON: "adamw_torch_fused"}  # --optim of ours -> what TrainingArguments is told


def moment_bytes(table: Iterable[Parameter], muon: bool) -> int:
    """Bytes of the fp32 state: two moments of an element, one where Muon orthogonalises."""
    return sum((4 if muon and row.matrices else 8) * row.size for row in table)


def muon_step_bytes(table: Iterable[Parameter], gpu: bool) -> int:
    """What Muon's step adds at its largest: the stacked updates, then of them two in hand and two of their products."""
    half = 2 if gpu else 4  # bytes of an element in the iteration
    largest = 0
    for row in table:
        columns = row.size // row.shape[0]
        for rows in set(row.matrices):
            alike = sum(other.matrices.count(rows) for other in table if other.shape[1:] == row.shape[1:])
            count = min(alike, muon_batch(rows * columns))
            size, product = count * rows * columns, count * min(rows, columns) ** 2
            largest = max(largest, 4 * size + half * (2 * size + 2 * product))
    return largest
