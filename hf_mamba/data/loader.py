"""Which samples a process sees at a step: arithmetic, so a run can stop, resume and change its number of processes."""

import os
import shutil
import signal
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from multiprocessing.util import get_temp_dir
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from hf_mamba.data.dataset import PackedDataset, collate
from hf_mamba.data.streaming import StreamedDataset


class StepSampler(Sampler[list[int]]):
    """One rank's micro-batches: step s of the run takes samples [s·G, (s+1)·G), G = micro × accumulation × world.

    Micro-batch m of a step is samples s·G + m·micro·world + rank·micro … + micro.

    Args:
        micro_batch_size, accumulation, world_size, rank: the batch arithmetic (world_size: data-parallel processes).
        start_step: the first step to serve. Nothing before it is read or computed.
        num_steps: steps to serve; without end when None.
        start_sample: the sample that `start_step` begins with, if it is not start_step·G: after a change of G, the
            number of samples that the run has consumed.
        skip: ranges (begin, end) of sample numbers that are never served (a batch that broke the run); the samples
            after them move up, so every step still has G.

    Attributes:
        first_step: where an iteration begins; by default `start_step`. A run that is resumed sets it, and the length
            stays that of the whole run, of which Trainer derives its epochs.

    Raises:
        ValueError: numbers below 1, a rank outside the world, an empty range.
    """

    def __init__(
        self,
        *,
        micro_batch_size: int,
        accumulation: int = 1,
        world_size: int = 1,
        rank: int = 0,
        start_step: int = 0,
        num_steps: int | None = None,
        start_sample: int | None = None,
        skip: Sequence[tuple[int, int]] = (),
    ) -> None:
        sizes = {"micro_batch_size": micro_batch_size, "accumulation": accumulation, "world_size": world_size}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; with world_size {world_size} it must be 0 to {world_size - 1}")
        if start_step < 0 or (start_sample or 0) < 0:
            raise ValueError(f"start_step {start_step} and start_sample {start_sample} must not be negative")
        for begin, end in skip:
            if not 0 <= begin < end:
                raise ValueError(f"skip has the range ({begin}, {end}); write (first sample, one past the last)")
        self.micro_batch_size, self.accumulation = micro_batch_size, accumulation
        self.world_size, self.rank = world_size, rank
        self.global_batch_size = micro_batch_size * accumulation * world_size
        self.start_step, self.num_steps = start_step, num_steps
        self.first_step = start_step
        self.start_sample = start_step * self.global_batch_size if start_sample is None else start_sample
        self.skip = _merged(skip)
        # sample numbers before anything is left out -> how far they move up, changing where a range begins
        self._moved, self._from = [0], list[int]()
        for begin, end in self.skip:
            self._from.append(begin - self._moved[-1])
            self._moved.append(self._moved[-1] + end - begin)

    def samples(self, step: int) -> list[int]:
        """The sample numbers of all ranks at a step, in the order of micro-batches and ranks."""
        first = self.start_sample + (step - self.start_step) * self.global_batch_size
        return [self._served(n) for n in range(first, first + self.global_batch_size)]

    def micro_batch(self, step: int, micro: int) -> list[int]:
        """The sample numbers of this rank in micro-batch number `micro` of a step."""
        begin = (micro * self.world_size + self.rank) * self.micro_batch_size
        first = self.start_sample + (step - self.start_step) * self.global_batch_size + begin
        return [self._served(n) for n in range(first, first + self.micro_batch_size)]

    def consumed(self, step: int) -> int:
        """The `start_sample` for a run that resumes at `step`."""
        return self.start_sample + (step - self.start_step) * self.global_batch_size

    def __iter__(self) -> Iterator[list[int]]:
        step = self.first_step
        while self.num_steps is None or step < self.start_step + self.num_steps:
            for micro in range(self.accumulation):
                yield self.micro_batch(step, micro)
            step += 1

    def __len__(self) -> int:
        if self.num_steps is None:
            raise TypeError("a StepSampler without num_steps has no length")
        return self.num_steps * self.accumulation

    def _served(self, number: int) -> int:
        return number + self._moved[bisect_right(self._from, number)]


def _merged(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same numbers as ranges in order that do not overlap."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if merged and begin <= merged[-1][1]:
            begin, end = merged[-1][0], max(end, merged.pop()[1])
        merged.append((begin, end))
    return merged


def build_dataloader(
    dataset: "PackedDataset | StreamedDataset",
    *,
    micro_batch_size: int,
    accumulation: int = 1,
    world_size: int = 1,
    rank: int = 0,
    start_step: int = 0,
    num_steps: int | None = None,
    start_sample: int | None = None,
    skip: Sequence[tuple[int, int]] = (),
    num_workers: int = 0,
    prefetch_factor: int | None = None,
    pin_memory: bool = False,
) -> DataLoader[dict[str, Any]]:
    """This rank's batches from `start_step` on; each is input_ids, labels and seq_idx of (micro_batch_size, L).

    It already holds this rank's share: it must not be sharded again (do not pass it to `accelerator.prepare`). The
    sampler is `loader.batch_sampler`, a `StepSampler`, which names the samples of any step; arguments: see there.
    """
    sampler = StepSampler(
        micro_batch_size=micro_batch_size,
        accumulation=accumulation,
        world_size=world_size,
        rank=rank,
        start_step=start_step,
        num_steps=num_steps,
        start_sample=start_sample,
        skip=skip,
    )
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        worker_init_fn=outlive_signals,
        generator=torch.Generator().manual_seed(0),  # else every iterator would advance torch's global generator
    )


def outlive_signals(worker: int) -> None:
    """Let only its parent's SIGTERM end this worker process.

    Launchers and clusters signal every process of a run, which needs its workers until the step is done and saved.
    """
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # else torch's own handler ends the worker
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    shutil.rmtree(get_temp_dir(), ignore_errors=True)  # of the sockets that hand tensors over; nobody else removes it
    os._exit(0)
