"""The data of a run: what the arguments ask for, prepared."""

from collections.abc import Mapping
from typing import Any

from hf_mamba.data import PreparedData, prepare_data
from hf_mamba.preflight.plan import Plan


def prepare_inputs(plan: Plan, wanted: Mapping[str, Any]) -> PreparedData:
    """Tokenise and pack the data that the arguments name; see `data.prepare_data` for errors.

    Args:
        plan: gives the row length, the seed and the vocabulary.
        wanted: the arguments as written, of which `dataset`, `tokenizer_name`, `model_name_or_path` (whose tokenizer
            serves where none is named), `text_column` and `eval_fraction` are read.
    """
    tokenizer = wanted.get("tokenizer_name") or wanted.get("model_name_or_path")
    assert plan.seq_len is not None
    options = {name: wanted[name] for name in ("text_column", "eval_fraction") if name in wanted}
    return prepare_data(
        wanted.get("dataset") or ["embedded"],
        seq_len=plan.seq_len,
        seed=plan.training_arguments["seed"],
        tokenizer=tokenizer,
        vocab_size=None if tokenizer else plan.model_config["vocab_size"],
        **options,
    )
