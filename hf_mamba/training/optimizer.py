"""Which parameters decay: the matrices, and never the state space's own parameters, biases or norms.

The original marks A_log, D and dt_proj.bias `_no_weight_decay` (mamba_ssm/modules/mamba_simple.py), a mark that
transformers' Trainer does not read: left to itself it decays A_log, D and norm_f.
"""

import re
from collections.abc import Iterable

# name of the group -> patterns of the parameters in it; together they cover a Mamba, each parameter once
DECAY_GROUPS: dict[str, tuple[str, ...]] = {
    "decay": (
        r"embeddings\.weight$",
        r"in_proj\.weight$",
        r"conv1d\.weight$",
        r"x_proj\.weight$",
        r"dt_proj\.weight$",
        r"out_proj\.weight$",
        r"lm_head\.weight$",
    ),
    "no_decay": (r"A_log$", r"\.D$", r"\.bias$", r"norm\.weight$", r"norm_f\.weight$"),
}


def split_by_decay(names: Iterable[str], absent: Iterable[str] = ()) -> dict[str, list[str]]:
    """Put every parameter into exactly one group.

    Args:
        names: all parameter names.
        absent: patterns that may match nothing here, such as the head of a tied model.

    Raises:
        ValueError: for a parameter that no group or more than one group matches, or a pattern that matches nothing.
    """
    groups: dict[str, list[str]] = {group: [] for group in DECAY_GROUPS}
    unused = {pattern for patterns in DECAY_GROUPS.values() for pattern in patterns} - set(absent)
    for name in names:
        matches = [
            (group, pattern)
            for group, patterns in DECAY_GROUPS.items()
            for pattern in patterns
            if re.search(pattern, name)
        ]
        if len({group for group, _ in matches}) != 1:
            found = "no decay group matches" if not matches else f"{matches} all match"
            raise ValueError(f"{found} the parameter {name!r}: name it in exactly one of decay.DECAY_GROUPS.")
        groups[matches[0][0]].append(name)
        unused -= {pattern for _, pattern in matches}
    if unused:
        raise ValueError(f"the decay patterns {sorted(unused)} match no parameter: mend or remove them.")
    return groups
