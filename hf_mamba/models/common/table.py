"""The part of the table of tensors that families share: embeddings, blocks, final norm, head."""

from collections.abc import Callable, Iterable
from typing import Any

from hf_mamba.family import Parameter


def whole_table(
    g: Any,
    block: Callable[[int], Iterable[Parameter]],
    embeddings: str = "backbone.embeddings",
    norm: str = "backbone.norm_f",
) -> tuple[Parameter, ...]:
    """Every parameter in the order of `named_parameters()`; a tied head has no row.

    Args:
        g: sizes, with `hidden_size`, `num_hidden_layers`, `vocab_size` and `tie_word_embeddings`.
        block: a layer's number -> its rows.
        embeddings, norm: the names of these modules.
    """
    layers = g.num_hidden_layers
    rows = [Parameter(f"{embeddings}.weight", (g.vocab_size, g.hidden_size), "embeddings", -1, True)]
    for layer in range(layers):
        rows += block(layer)
    rows.append(Parameter(f"{norm}.weight", (g.hidden_size,), "norm_f", layers, False))
    if not g.tie_word_embeddings:
        rows.append(Parameter("lm_head.weight", (g.vocab_size, g.hidden_size), "lm_head", layers, True))
    return tuple(rows)
