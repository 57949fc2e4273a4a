"""The data of a run, as training takes it."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hf_mamba.data.dataset import EvalDataset, PackedDataset
from hf_mamba.data.streaming import StreamedDataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PreparedData:
    """What training needs of the data.

    Attributes:
        train: endless rows, by sample number; a `StreamedDataset` must be opened first.
        eval: held-out rows; None when nothing is held out.
        fingerprint: decides the order of every token; stored with checkpoints, see `check_fingerprint`.
        report: per source its tokens, documents, bytes and unusable records; for the run's folder and the model card.
    """

    tokenizer: "PreTrainedTokenizerBase"
    train: "PackedDataset | StreamedDataset"
    eval: "EvalDataset | None"
    fingerprint: dict[str, Any]
    report: dict[str, Any] = field(default_factory=dict)
