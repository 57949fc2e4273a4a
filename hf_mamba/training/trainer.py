"""MambaTrainer: transformers' Trainer with the right decay groups, the data in its own order, and perplexity."""

import math
import re
from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer

from hf_mamba.data import PackedDataset, build_dataloader

from .decay import split_by_decay


class MambaTrainer(Trainer):
    """Trains what the Plan says; everything else is transformers' Trainer.

    Step s reads samples [s·G, (s+1)·G) of the training set, G the global batch size, whatever the number of processes.
    """

    train_dataset: PackedDataset

    def get_train_dataloader(self) -> DataLoader:
        """This rank's micro-batches of the whole run, in order. A resumed run skips by arithmetic, without reading."""
        args = self.args
        return build_dataloader(
            self.train_dataset,
            micro_batch_size=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            world_size=args.world_size,
            rank=args.process_index,
            num_steps=args.max_steps,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
        )

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The names of the parameters that decay; see decay.py."""
        # FSDP and torch.compile put their own names in between
        names = {re.sub(r"_fsdp_wrapped_module\.|_orig_mod\.", "", name): name for name, _ in model.named_parameters()}
        absent = []
        if not any(name.endswith("lm_head.weight") for name in names):
            absent.append(r"lm_head\.weight$")  # tied
        return [names[name] for name in split_by_decay(names, absent)["decay"]]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the perplexity to what an evaluation logs."""
        if "eval_loss" in logs:
            logs["eval_perplexity"] = math.exp(min(logs["eval_loss"], 700.0))
        super().log(logs, *args, **kwargs)
