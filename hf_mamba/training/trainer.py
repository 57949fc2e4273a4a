"""MambaTrainer: transformers' Trainer with the right decay groups, the data in its own order, and nothing lost."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerState
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import TrainOutput

from hf_mamba.data import PackedDataset, StepSampler, StreamedDataset, build_dataloader
from hf_mamba.models.common.order import ORDER, TRANSFORMERS, restore_first_order
from hf_mamba.preflight.data import STREAM
from hf_mamba.preflight.deepspeed.rates import factor
from hf_mamba.preflight.launch.extensions import compiling
from hf_mamba.preflight.optimizers import MUON
from hf_mamba.private.deepspeed import restore_clipping
from hf_mamba.private.torch import plain_name
from hf_mamba.progress import say
from hf_mamba.run import checkpoints, ranks
from hf_mamba.run.changes import update_settings
from hf_mamba.run.folder import Run
from hf_mamba.run.log import HISTORY
from hf_mamba.run.manifest import Manifest, read_manifest
from hf_mamba.run.signals import SignalFlag
from hf_mamba.run.skips import write_skips
from hf_mamba.training.by_source import SOURCE, LossBySource
from hf_mamba.training.callbacks import DataWait, RunLog, Samples
from hf_mamba.training.evaluation import ExactEvaluation
from hf_mamba.training.guard import BadStep, Guard, as_ranges, poison, record_bad_step
from hf_mamba.training.logged_loss import LoggedLoss
from hf_mamba.training.muon import make_muon
from hf_mamba.training.optimizer import split_by_decay
from hf_mamba.training.optimizers import restore_options, restore_rates, separate_counters
from hf_mamba.training.performance import Performance, peak_memory
from hf_mamba.training.preemption import (
    SAVE_AND_STOP,
    STOP_AND_REQUEUE,
    STOP_FOR_GOOD,
    AgreedStop,
    StopInEvaluation,
    exit_code,
)
from hf_mamba.training.screen import Screen, saved, without_bars
from hf_mamba.training.sharding import check_sharding, keep_residual
from hf_mamba.training.tracking import guard_trackers
from hf_mamba.training.updates import PlainUpdates, StepLoss, inner_optimizer, updates_of
from hf_mamba.training.watchdog import Watchdog

# transformers 5.17 loads the optimizer of a rank on a CPU to "cpu:0", a place that torch.load does not know
torch.serialization.register_package(
    100, lambda storage: None, lambda storage, place: storage if place.startswith("cpu:") else None
)


class Stateful(Protocol):
    """A part of a run that a resumed run must find as it was."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any) -> None: ...


class MambaTrainer(ExactEvaluation):
    """Trains what the Plan says; everything else is transformers' Trainer.

    Step s reads samples [s·G, (s+1)·G) of the training set, G the global batch size, whatever the number of processes.
    Checkpoints are whole or absent (checkpoints.py), a signal saves and stops all ranks (preemption.py), and an update
    that is not finite is not applied (guard.py).

    Args:
        run: the open run folder, with the plan.
        signals: where signals are noted; without it, they end the process as they do any other.

    Raises:
        PlanError: (a ValueError) where accelerate shards in another way than planned.
    """

    train_dataset: PackedDataset | StreamedDataset

    def __init__(self, *args: Any, run: Run, signals: SignalFlag | None = None, **kwargs: Any) -> None:
        wanted = kwargs.get("args", args[1] if len(args) > 1 else None)
        if wanted is not None and wanted.push_to_hub:
            raise ValueError("push_to_hub: Trainer would push what may still be removed. Add a publishing.Publisher.")
        super().__init__(*args, **kwargs)
        self.run, self.plan = run, run.plan
        if run.manifest is not None and ORDER not in run.manifest.run:
            restore_first_order(self.accelerator.unwrap_model(self.model))
        handler = self.callback_handler
        handler.callbacks = guard_trackers(handler.callbacks, run.folder)
        self.sharding = check_sharding(self.accelerator, self.plan.fsdp)
        if self.sharding is not None:
            keep_residual(self.accelerator.state.fsdp_plugin)
        self.stop = AgreedStop(signals)
        self.guard = Guard(
            self.args.device, self.args.world_size, self.plan.run.spike_sigma, not self.args.fp16, self._bad_step
        )
        self.data_wait = DataWait()
        self.bad_steps: list[BadStep] = []
        self._other_time: dict[str, float] = {}  # since the last line of the log
        self.by_source = LossBySource(self.sources_of(self.train_dataset), self.args.device)
        self.logged_loss = LoggedLoss(self.args.device)
        # what a checkpoint keeps of each, by its key in the manifest
        self.stateful: dict[str, Stateful] = {
            "guard": self.guard,
            "by_source": self.by_source,
            "unlogged": self.logged_loss,
        }
        self.performance = Performance(self.plan)
        self._own_options: list[dict[str, Any]] = []  # of the optimizer's groups
        self._saved = self.run.checkpoint.name if self.run.checkpoint else None
        self._resumed: Manifest | None = None
        self._schedule: LambdaLR | None = None  # of the user's DeepSpeed file
        self._step_loss = StepLoss()
        self._updates: PlainUpdates  # once the engine is built
        own = [self.pop_callback(theirs) for theirs in (ProgressCallback, PrinterCallback)]
        if any(own):  # a notebook's own table stays
            self.add_callback(Screen())
        self.add_callback(_Events(self))
        self.add_callback(self.data_wait)
        self.add_callback(self.performance)
        self.add_callback(RunLog(self.run.folder))
        if prompt := self.plan.run.sample_prompt:
            sharded = self.is_fsdp_enabled or is_deepspeed_zero3_enabled()
            self.add_callback(Samples(self.run.folder, prompt, sharded))
        self.add_callback(self.stop)
        self.add_callback(Watchdog(self.run.folder, 0.9 * self.args.ddp_timeout))

    @property
    def exit_code(self) -> int:
        """What the process should exit with: 0 unless the run was stopped (see preemption.py)."""
        return exit_code(self.stop.decision)

    @property
    def evaluated(self) -> bool:
        """Whether the log has an evaluation of the step that training is at."""
        return any("eval_loss" in row and row["step"] == self.state.global_step for row in self.state.log_history)

    # ---- data and optimizer ----

    def get_train_dataloader(self) -> DataLoader:
        """This rank's micro-batches, in order, from the step on that the run goes on at."""
        args = self.args
        loader = build_dataloader(
            self.train_dataset,
            micro_batch_size=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            world_size=args.world_size,
            rank=args.process_index,
            num_steps=args.max_steps,
            skip=self.run.skip,
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
        )
        assert isinstance(loader.batch_sampler, StepSampler)
        self.sampler = loader.batch_sampler
        if self._resumed is not None:
            self.sampler.first_step = self._resumed.step
        return loader

    def get_batch_samples(self, epoch_iterator: Iterator, *args: Any, **kwargs: Any) -> Any:
        return super().get_batch_samples(self.data_wait.timed(epoch_iterator), *args, **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The names of the parameters that decay; see optimizer.py."""
        names = {plain_name(name): name for name, _ in model.named_parameters()}
        config: Any = self.accelerator.unwrap_model(model).config
        return [names[name] for name in split_by_decay(names, config)["decay"]]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.plan.optim == MUON:
            chosen: Any = self.model if model is None else model
            self.optimizer = make_muon(chosen, self.accelerator.unwrap_model(chosen).config, self.args)
        optimizer = super().create_optimizer(model)
        if isinstance(optimizer, torch.optim.Optimizer):
            self._own_options = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        return optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Makes the schedule of the user's DeepSpeed file, step for step, or transformers' own where there is none."""
        rates = self.plan.rates
        if self.lr_scheduler is None and rates is not None:
            stepped: Any = optimizer or self.optimizer
            self.lr_scheduler = self._schedule = LambdaLR(stepped, lambda step: factor(rates, step))
        return super().create_scheduler(num_training_steps, optimizer)

    # ---- the step ----

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if model.training:
            z_loss = self.plan.z_loss
            read = self.label_smoother is not None  # the logits, by Trainer
            inputs = {**inputs, "skip_logits": not read} | ({"z_loss": z_loss} if z_loss else {})
        if not model.training or SOURCE not in inputs:
            result: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        else:
            inputs = {**inputs, "return_token_losses": True}
            sources = inputs.pop(SOURCE)
            result = super().compute_loss(model, inputs, True, num_items_in_batch)
            self.by_source.add(result[1].token_losses, inputs["labels"], sources)
            result = result if return_outputs else result[0]
        if not model.training:
            return result
        loss = poison(result[0] if return_outputs else result)
        divided = num_items_in_batch is not None and self.model_accepts_loss_kwargs
        self._step_loss.start(loss.detach() / (1 if divided else self.current_gradient_accumulation_steps))
        return (loss, result[1]) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self._step_loss.finish(loss)
        self.logged_loss.add(loss)
        return loss

    def before_update(self, norm: Any) -> Any:
        return self._updates.before_update(norm)

    def _bad_step(self, bad: BadStep) -> None:
        """On every rank, as soon as the host knows of an update that was withheld."""
        self.bad_steps.append(bad)
        if ranks.rank() == 0:
            samples = self.sampler.samples(bad.step - 1)
            sources = self.train_dataset.source_counts(samples) if self.train_dataset.names else {}
            record_bad_step(self.run.folder, bad, samples, sources)
            say(
                f"step {bad.step}: {bad.kind} (loss {bad.loss:g}, gradient norm {bad.grad_norm:g}); the update is not "
                f"applied ({self.guard.consecutive} in a row; the run ends at {self.plan.run.max_bad_steps})",
                error=True,
            )
        if self.guard.consecutive >= self.plan.run.max_bad_steps:
            back_to = self._saved or "the beginning"
            again = self.plan.run.rewind and back_to != self.run.rewound_to
            self.stop.request(STOP_AND_REQUEUE if again else STOP_FOR_GOOD)

    # ---- beginning and end ----

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train to the end, or until a stop is agreed: then `exit_code` is not 0."""
        self._resumed = None
        if resume_from_checkpoint is not None:
            resume_from_checkpoint = str(resume_from_checkpoint)
            self._resumed = read_manifest(Path(resume_from_checkpoint))
            due = self._resumed.run.get("evaluation_due") and self._resumed.step < self.args.max_steps
            self.args.eval_on_start = bool(due and self.eval_dataset is not None)
            self.args.ignore_data_skip = True  # Trainer would draw all batches before: the sampler begins behind them
        if self._schedule is not None and self.lr_scheduler is self._schedule:
            self.lr_scheduler = None  # a second train() starts anew
        if self.is_world_process_zero() and (words := compiling(self.plan)):
            say(words)
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            if isinstance(self.train_dataset, StreamedDataset):
                self.train_dataset.close()
        self.guard.flush()
        self._say_why()
        return output._replace(training_loss=output.metrics["train_loss"])

    def begin(self) -> None:
        """Once everything is built and loaded: what transformers does not restore."""
        if getattr(self, "_updates", None) is None or self._updates.optimizer is not inner_optimizer(self.optimizer):
            self._updates = updates_of(self, self.guard, self._step_loss)
        self.logged_loss.begin(self.state.global_step)
        self.run.write_status("running", step=self.state.global_step)
        if self._resumed is None:
            return
        self._restore_settings()
        self.find_best()
        self.forget_lines()
        for key, part in self.stateful.items():
            if state := self._resumed.run.get(key):
                part.load_state_dict(state)

    def find_best(self) -> None:
        """Name the best checkpoint where it lies now, wherever the folder lay when it was saved."""
        best = self.run.folder / f"checkpoint-{self.state.best_global_step}"
        if best.is_dir():
            self.state.best_model_checkpoint = str(best)

    def _restore_settings(self) -> None:
        """Put the plan's settings of an update in the place of the checkpoint's."""
        optimizer: Any = inner_optimizer(self.optimizer)
        engine: Any = self.model_wrapped
        restore_options(optimizer, self._own_options)
        peaks = [options["lr"] for options in self._own_options]
        restore_rates(self.lr_scheduler, optimizer, peaks, self.state.global_step)
        if self.is_deepspeed_enabled:
            restore_clipping(engine)
            if engine.load_universal_checkpoint():
                separate_counters(optimizer)

    def _say_why(self) -> None:
        """Tell a script, and a person, why the run was stopped."""
        decision, step = self.stop.decision, self.state.global_step
        folder = self.run.folder
        if decision == SAVE_AND_STOP:
            self.run.write_status("requeue", self.exit_code, step)
        elif decision == STOP_AND_REQUEUE:
            back_to = self._saved or "the beginning"
            if ranks.rank() == 0:
                done = int(back_to.rsplit("-", 1)[1]) if self._saved else 0
                bad = [b.step for b in self.bad_steps[-self.guard.consecutive :] if b.step > done]
                numbers = sorted(n for b in bad for n in self.sampler.samples(b - 1))
                write_skips(folder, [*self.run.skip, *as_ranges(numbers)], back_to)
                say(f"going back to {back_to} without {len(numbers)} samples: run again", error=True)
            self.run.write_status("requeue", self.exit_code, step, rewound=True)
        elif decision == STOP_FOR_GOOD:
            if ranks.rank() == 0:
                say(
                    f"error: {self.guard.consecutive} updates in a row could not be applied, so the run ends at step "
                    f"{step}. Their samples are in {folder / 'bad_steps.jsonl'}; the last checkpoint is "
                    f"{self._saved or 'none'}. Look at the data, or lower --learning_rate in a new run; --rewind "
                    "leaves such samples out.",
                    error=True,
                )
            self.run.write_status("bad numbers", self.exit_code, step)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in Trainer; empty when a stop was agreed on the way, after which training saves and ends."""
        try:
            with self._not_training():
                return super().evaluate(*args, **kwargs)
        except StopInEvaluation:
            if self.is_in_train:
                self.args.metric_for_best_model = None  # no number to compare
                self.control.should_evaluate = False
                self.control.should_training_stop = True
                self.control.should_save = self.stop.decision == SAVE_AND_STOP
            else:
                if self._saved != f"checkpoint-{self.state.global_step}":
                    self.save_checkpoint()
                self._say_why()
            return {}

    @contextmanager
    def _not_training(self, name: str = "") -> Iterator[None]:
        """Time that is not the steps' own; the next line of the log says how much it was, where it has a name."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - begin
            for clock in (self.data_wait, self.performance):
                clock.leave_out(seconds)
            if name:
                self._other_time[name] = round(self._other_time.get(name, 0.0) + seconds, 4)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the perplexity to what an evaluation logs, and to a step how long it waited for data."""
        if "eval_loss" in logs:
            logs["eval_perplexity"] = math.exp(min(logs["eval_loss"], 700.0))
        if "loss" in logs:
            logs["loss"] = self.logged_loss.drain(self.state.global_step)
            logs |= self._figures()
        if "train_loss" in logs:
            logs["train_loss"] = self.logged_loss.of_session(self.state.global_step)
        self.run.require_folder()
        if isinstance(self.train_dataset, PackedDataset) and self.state.global_step and hasattr(self, "sampler"):
            seen = self.sampler.samples(self.state.global_step - 1)[-1] + 1
            self.state.epoch = self.train_dataset.epoch(seen)  # Trainer's is the share of the run
        if self.is_in_train:
            self.run.write_status("running", step=self.state.global_step)
        super().log(logs, *args, **kwargs)
        self.forget_lines()

    def forget_lines(self) -> None:
        """Keep the last lines of the log in memory, and in checkpoints; log.jsonl has all."""
        del self.state.log_history[:-HISTORY]

    def _figures(self) -> dict[str, float]:
        """Beside the loss, since the last line of the log. Every rank calls it."""
        out = self.data_wait.drain() | self._other_time
        self._other_time.clear()
        if self.guard.total:
            out["bad_steps"] = self.guard.total
        if len(self.by_source.names) > 1:
            out |= {f"loss/{name}": loss for name, loss in self.by_source.drain().shown.items()}
        if isinstance(self.train_dataset, StreamedDataset):
            out["unusable_records"] = sum(ranks.gather(self.train_dataset.unusable()))
        if self.performance is not None:
            memory = peak_memory()
            out |= self.performance.drain()
            out["memory_gb"] = round(memory.get("allocated", memory.get("resident", 0)) / 1e9, 4)
            if self.performance.report is not None:
                out["memory_predicted_gb"] = round(self.performance.report.predicted_bytes / 1e9, 4)
        return out

    # ---- checkpoints ----

    def save_checkpoint(self) -> None:
        """As in Trainer, whole or absent; see checkpoints.py for errors."""
        step, folder = self.state.global_step, self.run.folder
        name = f"checkpoint-{step}"
        ranks.on_main(self.run.require_folder)
        began, to_resume = time.perf_counter(), self._to_resume()
        with self._not_training("save_seconds"), without_bars(), checkpoints.saving(folder, step, to_resume) as staging:
            final, self.args.output_dir = self.args.output_dir, str(staging)
            try:
                super().save_checkpoint()
            finally:
                self.args.output_dir = final
            best = self.state.best_global_step and str(folder / f"checkpoint-{self.state.best_global_step}")
            if best and best != self.state.best_model_checkpoint:  # Trainer named the folder it was staged in
                self.state.best_model_checkpoint = best
                if self.args.should_save:
                    self.state.save_to_json(str(staging / name / "trainer_state.json"))
        self._saved = name
        if ranks.rank() == 0:
            size = sum(entry["size"] for entry in read_manifest(folder / name).files.values())
            say(saved(name, size, time.perf_counter() - began, step, self.state.max_steps))
            checkpoints.rotate(folder, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _to_resume(self) -> dict[str, Any]:
        """What a resumed run needs besides the files. Every rank calls it."""
        args, train = self.args, self.train_dataset
        return {
            **({STREAM: ranks.gather(train.state_dict())} if isinstance(train, StreamedDataset) else {}),
            "fingerprint": self.run.fingerprint,
            "skip": self.run.skip,
            "global_batch_size": self.sampler.global_batch_size,
            "settings": update_settings(self.plan.known),
            **({ORDER: TRANSFORMERS} if self.run.manifest is None or ORDER in self.run.manifest.run else {}),
            "resumable": not args.save_only_model,
            "evaluation_due": self.stop.during_evaluation,
            **{key: part.state_dict() for key, part in self.stateful.items()},
        }


class _Events(TrainerCallback):
    """The trainer's own part in the events of a run."""

    def __init__(self, trainer: MambaTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._trainer.begin()

    def on_step_end(self, args: Any, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        state.epoch = state.global_step / state.max_steps  # Trainer counts from where a run was resumed
        # Trainer holds the schedule back after a skipped update; the rate here is a function of the step
        if self._trainer.accelerator.optimizer_step_was_skipped:
            schedule = self._trainer.lr_scheduler
            assert schedule is not None
            schedule.step()
