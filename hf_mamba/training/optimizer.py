"""Which parameters decay: those that the family's table says, whatever transformers' Trainer would choose.

Left to itself, Trainer decays every parameter that is no bias and in no norm it knows: a state space's own, too.
"""

from collections.abc import Iterable
from typing import Any

from hf_mamba.family import family_of


def split_by_decay(names: Iterable[str], config: Any) -> dict[str, list[str]]:
    """Put every parameter of a model into exactly one group, "decay" or "no_decay".

    Args:
        names: all parameter names. config: the model's configuration.

    Raises:
        ValueError: for a parameter that the table lacks, or a row that no parameter has.
    """
    rows = {row.name: row for row in family_of(config).parameters(config)}
    groups: dict[str, list[str]] = {"decay": [], "no_decay": []}
    for name in names:
        if name not in rows:
            raise ValueError(f"no decay group has the parameter {name!r}: name it in the family's table.")
        groups["decay" if rows.pop(name).decays else "no_decay"].append(name)
    if rows:
        raise ValueError(f"the rows {sorted(rows)} of the family's table match no parameter: mend or remove them.")
    return groups


def decay_groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Make an optimizer's two groups of a language model's parameters: matrices decay, all others do not.

    For a plain Trainer, which offers a model no say in it: `Trainer(model, arguments, optimizers=(AdamW(
    decay_groups(model, 0.1), lr=1e-3), None))`.

    Raises:
        ValueError: for a parameter that is not the model's own, such as an adapter's.
    """
    parameters = dict(model.named_parameters())
    groups = split_by_decay(parameters, model.config)
    rates = {"decay": weight_decay, "no_decay": 0.0}
    return [{"params": [parameters[n] for n in groups[k]], "weight_decay": rate} for k, rate in rates.items()]
