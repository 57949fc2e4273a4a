"""A plain transformers Trainer trains, evaluates and predicts with our classes what it does with stock ones.

Rows are padded, and the same weights begin: losses, gradient norms, metrics, predictions and the trained weights agree.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_beside_stock import pair
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

LENGTHS = (13, 5, 9, 13, 3, 7, 11, 4)
ROWS = [{"input_ids": (torch.arange(n) * 11 + 7 * n) % 60 + 1} for n in LENGTHS]


def padded(rows: list[dict]) -> dict[str, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(row["input_ids"]) for row in rows], batch_first=True)
    mask = (ids != 0).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def with_token_types(rows: list[dict]) -> dict[str, torch.Tensor]:
    batch = padded(rows)
    return batch | {"token_type_ids": torch.zeros_like(batch["input_ids"])}


def accuracy(prediction: Any) -> dict[str, float]:
    logits, labels = prediction.predictions, prediction.label_ids
    logits = logits[0] if isinstance(logits, tuple) else logits
    counted = labels[:, 1:] != -100
    return {"right": float((logits[:, :-1].argmax(-1) == labels[:, 1:])[counted].mean())}


def own_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    loss = F.cross_entropy(outputs["logits"][:, :-1].mT, labels[:, 1:], reduction="sum")
    return loss / ((labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch)


class OwnTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = own_loss(outputs, labels, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


class TupleTrainer(Trainer):
    """As from before outputs had names."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, return_dict=False)
        return (outputs[0], {"loss": outputs[0], "logits": outputs[1]}) if return_outputs else outputs[0]


EACH = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
# name: TrainingArguments, Trainer's own arguments, its class
CASES: dict[str, tuple[dict, dict, type[Trainer]]] = {
    "plain": ({}, {}, Trainer),
    "accumulation": ({"gradient_accumulation_steps": 2, "max_grad_norm": 0.1}, {}, Trainer),
    "accuracy": (EACH | {"load_best_model_at_end": True, "metric_for_best_model": "right"}, {}, Trainer),
    "predictions by parts": ({"eval_accumulation_steps": 1, "eval_do_concat_batches": True} | EACH, {}, Trainer),
    "loss alone": ({"prediction_loss_only": True} | EACH, {}, Trainer),
    "preprocessed logits": (
        EACH, {"compute_metrics": lambda p: {"sum": float(p.predictions[p.label_ids != -100].sum())},
               "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)}, Trainer,
    ),
    "inputs for metrics": (
        EACH | {"include_for_metrics": ["inputs", "loss"]},
        {"compute_metrics": lambda p: {"tokens": int((p.inputs > 0).sum()), "own": float(p.losses.mean())}}, Trainer,
    ),
    "own compute_loss": (EACH, {}, OwnTrainer),
    "own loss function": ({}, {"compute_loss_func": own_loss}, Trainer),
    "tuples": (EACH, {}, TupleTrainer),
    "label smoothing": ({"label_smoothing_factor": 0.1} | EACH, {}, Trainer),
    "checkpointing": ({"gradient_checkpointing": True} | EACH, {}, Trainer),
    "reentrant checkpointing": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, {}, Trainer,
    ),
    "bf16": ({"bf16": True} | EACH, {}, Trainer),
    "bf16 evaluation": ({"bf16_full_eval": True} | EACH, {}, Trainer),
    "by length": ({"train_sampling_strategy": "group_by_length"}, {}, Trainer),
    "neftune": ({"neftune_noise_alpha": 5.0} | EACH, {}, Trainer),
    "adafactor": ({"optim": "adafactor"}, {}, Trainer),
    "sgd": ({"optim": "sgd", "lr_scheduler_type": "cosine", "warmup_steps": 1}, {}, Trainer),
    "unused columns": ({"remove_unused_columns": False}, {"data_collator": with_token_types}, Trainer),
    "tokens seen": ({"include_num_input_tokens_seen": "all"}, {}, Trainer),
}  # fmt: skip


def run(model: torch.nn.Module, case: str, folder: Path) -> tuple[list[dict], Any, dict[str, torch.Tensor]]:
    settings, given, trainer_class = CASES[case]
    arguments = {
        "max_steps": 4, "use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 1, "save_steps": 100,
        "per_device_train_batch_size": 2, "per_device_eval_batch_size": 3, "learning_rate": 1e-2, "adam_epsilon": 1e-3,
    }  # fmt: skip
    trainer = trainer_class(
        model, TrainingArguments(str(folder), **arguments | settings), train_dataset=ROWS, eval_dataset=ROWS[:5],
        **{"data_collator": padded, "compute_metrics": accuracy} | given,
    )  # fmt: skip
    trainer.train()
    log = [
        {name: value for name, value in row.items() if not name.endswith(("_runtime", "_per_second", "_flos"))}
        for row in trainer.state.log_history
    ]
    found = trainer.predict(ROWS[3:])
    predictions = found.predictions
    if predictions is not None:  # what stands at padding means nothing
        predictions = predictions[found.label_ids != -100]
    return log, predictions, {name: p.detach().clone() for name, p in model.named_parameters()}


def check(kind: str, case: str, tmp_path: Path) -> None:
    results = []
    for whose, model in pair(kind).items():
        torch.manual_seed(0)
        results.append(run(model, case, tmp_path / whose))
    (log, predictions, weights), (stocks_log, stocks_predictions, stocks_weights) = results
    loose = 30 if "bf16" in case else 1
    assert [sorted(row) for row in log] == [sorted(row) for row in stocks_log]
    for row, stocks in zip(log, stocks_log, strict=True):
        assert row == pytest.approx(stocks, rel=2e-3 * loose, abs=2e-4 * loose), case
    assert (predictions is None) == (stocks_predictions is None)
    if predictions is not None:
        assert predictions.shape == stocks_predictions.shape
        assert np.abs(predictions - stocks_predictions).max() < 5e-3 * loose
    torch.testing.assert_close(weights, stocks_weights, rtol=1e-2 * loose, atol=2e-4 * loose)


@pytest.mark.parametrize("case", CASES)
def test_a_plain_trainer_does_with_ours_what_it_does_with_stock(case: str, tmp_path: Path):
    check("mamba", case, tmp_path)


@pytest.mark.parametrize("case", ["accuracy", "own compute_loss", "checkpointing", "neftune", "bf16"])
@pytest.mark.parametrize("kind", ["mamba2", "granitemoehybrid"])
def test_a_plain_trainer_does_so_with_every_family(kind: str, case: str, tmp_path: Path):
    check(kind, case, tmp_path)
