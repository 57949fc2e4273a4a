"""Withholds bad updates: one class an engine, because each takes its step, and knows the norm, in another place."""

import math
from typing import Any

import torch
from torch import nn

from hf_mamba.private import deepspeed as private
from hf_mamba.private.trainer import OpenTrainer
from hf_mamba.training.guard import Guard, withhold


class StepLoss:
    """The loss of the step in hand, this rank's, while its micro-batches come."""

    def __init__(self) -> None:
        self._done: torch.Tensor | None = None  # of the micro-batches before
        self._micro: torch.Tensor | None = None  # of the one in hand

    def start(self, loss: torch.Tensor) -> None:
        """A micro-batch's part in the loss of its step, before its backward."""
        self._micro = loss.detach()

    def finish(self, loss: torch.Tensor) -> None:
        """The same after its backward."""
        self._done = loss.clone() if self._done is None else self._done + loss

    def within_backward(self) -> torch.Tensor:
        """The step's loss while the backward of its last micro-batch goes on."""
        assert self._micro is not None
        return self._micro if self._done is None else self._done + self._micro

    def take(self) -> torch.Tensor:
        """The loss of the step whose micro-batches are all done; the next step starts from nothing."""
        done, self._done = self._done, None
        assert done is not None
        return done


def inner_optimizer(optimizer: Any) -> Any:
    """The optimizer within accelerate's and DeepSpeed's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


class PlainUpdates:
    """Trainer's own loop, also under DDP and FSDP: the step comes after the norm, so the guard judges in between.

    fp16's loss scaler withholds updates itself.
    """

    def __init__(self, trainer: OpenTrainer, guard: Guard, loss: StepLoss) -> None:
        self.trainer, self.guard, self.loss = trainer, guard, loss
        self.optimizer = inner_optimizer(trainer.optimizer)
        self.withheld: torch.Tensor | None = None  # the last judgement, on the device
        if not trainer.args.fp16:
            self.install()

    @staticmethod
    def serves(trainer: OpenTrainer) -> bool:
        return not trainer.is_deepspeed_enabled

    @property
    def step(self) -> int:
        """The number of the step in hand."""
        return self.trainer.state.global_step + 1

    @property
    def engine(self) -> Any:
        return self.trainer.model_wrapped

    def install(self) -> None:
        """Have the optimizer ask before it steps."""
        withhold(self.optimizer, lambda: self.withheld)

    def before_update(self, norm: Any) -> Any:
        """Judge by the gradient's norm, the last thing before Trainer has the optimizer step; returns it."""
        loss = self.loss.take()
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP's
        self.withheld = self.guard.judge(self.step, loss, torch.as_tensor(norm, device=loss.device))
        return norm


class StageZeroUpdates(PlainUpdates):
    """DeepSpeed's stage 0 in fp32: a bare optimizer, stepped within backward, that nothing looks after."""

    @staticmethod
    def serves(trainer: OpenTrainer) -> bool:
        return trainer.is_deepspeed_enabled and not private.looks_for_overflow(trainer.model_wrapped)

    def install(self) -> None:
        withhold(self.optimizer, self._judge_gradients)

    def _judge_gradients(self) -> torch.Tensor:
        parameters = (p for group in self.optimizer.param_groups for p in group["params"])
        self.withheld = ~torch.isfinite(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        return self.withheld

    def before_update(self, norm: Any) -> Any:
        """The update was applied, or not, within backward: the guard is told."""
        loss = self.loss.take()
        bad = self.withheld is not None and bool(self.withheld)
        self.guard.accept_engine_verdict(self.step, bad, loss, math.nan if norm is None else float(norm))
        return norm


class ZeroUpdates(PlainUpdates):
    """DeepSpeed's ZeRO (runtime/zero) and its fp16: within backward it looks for bad gradients itself.

    Spikes are judged where it calls the optimizer: withheld there, the fp32 weights stay, and those made of them.
    """

    _judged = 0  # the last step that the guard has judged

    @staticmethod
    def serves(trainer: OpenTrainer) -> bool:
        return trainer.is_deepspeed_enabled

    def install(self) -> None:
        if private.applies_everything(self.engine) and self.trainer.args.bf16:
            raise ValueError(
                'the DeepSpeed file has "check_grad_overflow": false, so an update that is not finite would be '
                "applied. Remove that line."
            )
        if self.guard.spikes is not None:
            withhold(self.optimizer, self._judge_in_step)
            if second := private.second_optimizer(self.engine):
                withhold(second, self._judge_in_step)

    def _judge_in_step(self) -> torch.Tensor | None:
        """Once for all the parts that ZeRO updates one after the other."""
        if self._judged != self.step:
            loss = self.loss.within_backward()
            self.withheld = self.guard.judge(self.step, loss, private.norm_in_step(self.engine, loss.device))
            self._judged = self.step
        return self.withheld

    def before_update(self, norm: Any) -> Any:
        loss = self.loss.take()
        bad = bool(private.overflow(self.engine))
        if bad and self.trainer.args.fp16:  # an overflow is the loss scaler's everyday business
            bad = not math.isfinite(float(loss))
        if self._judged != self.step:
            self.guard.accept_engine_verdict(self.step, bad, loss, math.nan if norm is None else float(norm))
        return norm


ENGINES = (StageZeroUpdates, ZeroUpdates, PlainUpdates)


def updates_of(trainer: OpenTrainer, guard: Guard, loss: StepLoss) -> PlainUpdates:
    """What withholds the updates of this trainer's engine, installed. Called when the engine is built.

    Raises:
        ValueError: the engine's own configuration would apply every update.
    """
    return next(kind for kind in ENGINES if kind.serves(trainer))(trainer, guard, loss)
