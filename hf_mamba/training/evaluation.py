"""Evaluation as one number that means something: the sum of all losses over the number of all predictions.

Trainer averages the means of batches, gives a process whose rows are out some rows again, and makes the whole logits.
Here every held-out token counts once, on any number of processes, and the loss is computed in chunks.
"""

import math
from collections.abc import Iterator
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers.trainer_utils import EvalLoopOutput

from hf_mamba.data import EvalDataset
from hf_mamba.data.dataset import IGNORE, collate
from hf_mamba.data.loader import outlive_signals
from hf_mamba.private.trainer import OpenTrainer
from hf_mamba.training.by_source import SOURCE, LossBySource, short_names

FILLER = -1
COUNTED = 2**20  # held-out tokens, from the first of each source on, whose text is measured


def bytes_per_token(rows: EvalDataset, tokenizer: Any) -> float:
    """Bytes of UTF-8 that a held-out token stands for on average; what is put around a document stands for none."""
    size = count = 0
    for stream in rows.streams:
        tokens, starts = stream.read(0, min(stream.size, COUNTED // len(rows.streams)))
        documents = np.split(tokens, starts[starts > 0])
        text = [tokenizer.decode(document.tolist(), skip_special_tokens=True) for document in documents]
        size, count = size + sum(len(part.encode()) for part in text), count + len(tokens)
    return size / count


class EvalRows(Dataset[dict[str, Tensor]]):
    """The rows of an `EvalDataset` with their sources; FILLER is a row of which nothing counts."""

    def __init__(self, rows: EvalDataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        row = dict(self.rows[max(number, 0)])
        if number == FILLER:
            row["labels"] = torch.full_like(row["labels"], IGNORE)
        row[SOURCE] = torch.tensor(self.rows.source_of(max(number, 0)))
        return row


class EvalSampler(Sampler[list[int]]):
    """One rank's batches: all ranks have as many, since under ZeRO-3 and FSDP each takes part in every forward."""

    def __init__(self, rows: int, batch_size: int, rank: int, world_size: int) -> None:
        self.rows, self.batch_size, self.rank, self.world_size = rows, batch_size, rank, world_size

    def __len__(self) -> int:
        return -(-self.rows // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(len(self)):
            begin = (number * self.world_size + self.rank) * self.batch_size
            yield list(range(begin, min(begin + self.batch_size, self.rows))) or [FILLER]


class ExactEvaluation(OpenTrainer):
    """A Trainer that evaluates an `EvalDataset` exactly, with the loss of each source; others as ever."""

    _token_bytes: ClassVar[WeakKeyDictionary[EvalDataset, float]] = WeakKeyDictionary()

    @staticmethod
    def sources_of(dataset: Any) -> list[str]:
        """The short names of a data set's sources."""
        return short_names(list(getattr(dataset, "names", ())) or [""])

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(dataset, EvalDataset):
            return super().get_eval_dataloader(eval_dataset)
        args = self.args
        return DataLoader(
            EvalRows(dataset),
            batch_sampler=EvalSampler(len(dataset), args.eval_batch_size, args.process_index, args.world_size),
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            worker_init_fn=outlive_signals,
            generator=torch.Generator().manual_seed(0),  # else every iterator would advance torch's global generator
        )

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if SOURCE not in inputs:
            return super().prediction_step(model, inputs, *args, **kwargs)
        inputs = send_to_device(inputs, self.args.device)
        sources = inputs.pop(SOURCE)
        with torch.no_grad(), self.compute_loss_context_manager():
            output = model(**inputs, num_items_in_batch=1, skip_logits=True, return_token_losses=True)
        self._losses.add(output.token_losses, inputs["labels"], sources)
        return None, None, None  # nothing for Trainer to gather

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        rows = dataloader.dataset.rows if isinstance(dataloader.dataset, EvalRows) else None
        self._losses = LossBySource(self.sources_of(rows), self.args.device)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if isinstance(dataloader.dataset, EvalRows):
            metrics: Any = output.metrics
            metrics[f"{metric_key_prefix}_loss"], parts, shown = self._losses.drain()
            if rows is not None and rows.weights:
                shares = dict(zip(self._losses.names, rows.weights, strict=True))
                total = sum(shares[name] for name in parts)
                metrics[f"{metric_key_prefix}_loss"] = sum(shares[n] * loss for n, loss in parts.items()) / total
            elif rows is not None and self.processing_class is not None:
                if rows not in self._token_bytes:
                    self._token_bytes[rows] = bytes_per_token(rows, self.processing_class)
                if size := self._token_bytes[rows]:
                    bits = metrics[f"{metric_key_prefix}_loss"] / math.log(2)
                    metrics[f"{metric_key_prefix}_bits_per_byte"] = bits / size
            if len(parts) > 1:
                metrics |= {f"{metric_key_prefix}_loss/{name}": loss for name, loss in shown.items()}
        return output
