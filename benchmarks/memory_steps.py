"""Real optimizer steps in processes of their own, and the most memory that was allocated in each phase.

On CPU the account is the allocator's: every allocation and release that `torch.profiler` reports, summed by address, so
that temporaries inside operators and kernels count. On CUDA it is `max_memory_allocated` and `max_memory_reserved`.
The peak is that of the steps after the first, which is when the optimizer's states exist. Each case runs in processes
forked from a parent that has imported everything; DeepSpeed builds its extensions once, before.
"""

from __future__ import annotations

import gc
import os
import queue
import re
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from memory_cases import FSDP2, Case

STEPS = 3
TIMEOUT = {"cpu": 300, "cuda": 900}  # seconds a case; the weights of the large presets are drawn on the host


def prepare(device: str) -> None:
    """Before torch is imported: one thread a CPU process, DeepSpeed's accelerator, ninja on the PATH."""
    if device == "cpu":
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["DS_ACCELERATOR"] = device
    os.environ.setdefault(
        "TORCH_EXTENSIONS_DIR", str(Path(tempfile.gettempdir()) / f"hf_mamba_extensions_{os.getuid()}")
    )
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    import deepspeed
    import torch  # noqa: F401

    import hf_mamba.models.mamba.modeling_mamba  # noqa: F401

    with suppress(ImportError):  # imports inductor, else in every fork
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401


def build_extensions(cases: list[Case]) -> None:
    """In the parent, so that forked processes find them built: a fork that compiles can hang on the lock."""
    from deepspeed.ops.op_builder import CPUAdamBuilder

    if any(case.offload != "none" for case in cases):
        CPUAdamBuilder().load()


def live_addresses(model: Any) -> set[int]:
    """The storages of all tensors that Python can reach; outside a graph, that is all there are."""
    import torch

    tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]  # FSDP2's whole gradients
    tensors = [getattr(t, "_local_tensor", t) for t in tensors]  # of a DTensor, which has no storage
    return {t.untyped_storage().data_ptr() for t in tensors if _dense(t)}


def _dense(tensor: Any) -> bool:
    return tensor.device.type == "cpu" and tensor.layout == sys.modules["torch"].strided


def run_steps(case: Case, marker: Any) -> list[tuple[int, set[int]]]:
    """STEPS optimizer steps of the case's model on random tokens; (time, live addresses) after each phase."""
    import torch

    torch.manual_seed(0)
    buckets: set[int] = set()
    build_engine = with_torch if case.stage in (None, FSDP2) else with_deepspeed
    model, device, one_micro = build_engine(case, buckets)
    alive: list[tuple[int, set[int]]] = []
    for step in range(STEPS):
        for micro in range(case.accumulation):

            @contextmanager
            def phase(name: str, step: int = step, micro: int = micro) -> Iterator[None]:
                if name == "step":  # what other threads have released in the backward
                    alive.append((time.time_ns(), live_addresses(model) | buckets))
                with marker(step, micro, name):
                    yield

            one_micro(packed_rows(case, device), micro, phase)
            if case.stage is not None or micro == case.accumulation - 1:  # when DDP's buckets are known
                alive.append((time.time_ns(), live_addresses(model) | buckets))
    return alive


def packed_rows(case: Case, device: Any) -> dict[str, Any]:
    """Random tokens of two documents a row, with the dtypes of data/dataset.py."""
    import torch

    shape = (case.batch, case.length)
    ids = torch.randint(0, case.model_config["vocab_size"], shape, device=device)
    documents = (torch.arange(case.length, device=device) > case.length // 2).int().expand(shape).contiguous()
    return {"input_ids": ids, "labels": ids, "seq_idx": documents}


def build(case: Case) -> tuple[Any, list[dict[str, Any]]]:
    """The model, and the optimizer's groups."""
    from hf_mamba.family import family_of
    from hf_mamba.training.muon import muon_groups
    from hf_mamba.training.optimizer import split_by_decay

    family = family_of(case.model_config)
    model = family.model_class._from_config(family.config_class(**case.model_config)).train()
    if case.checkpointing:
        model.gradient_checkpointing_enable()
    if case.optimizer == "muon":
        return model, muon_groups(model, model.config, 0.1)
    named = dict(model.named_parameters())
    groups = split_by_decay(named, model.config)
    decays, others = ([named[name] for name in groups[group]] for group in ("decay", "no_decay"))
    return model, [{"params": decays, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


OneMicro = Callable[[dict[str, Any], int, Callable[[str], Any]], None]


def with_deepspeed(case: Case, buckets: set[int]) -> tuple[Any, Any, OneMicro]:
    """(model, device, a micro-step) of DeepSpeed's engine."""
    import deepspeed
    import torch
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    config = case.ds_config()
    live = HfDeepSpeedConfig(config) if case.stage == 3 else None  # makes _from_config partition the weights
    model, groups = build(case)
    if case.offload == "none":
        optimizer: Any = torch.optim.AdamW(groups, lr=1e-3, **{case.optimizer: True})
    else:
        optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(groups, lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def one_micro(batch: dict[str, Any], micro: int, phase: Callable[[str], Any]) -> None:
        assert live is None or case.stage == 3
        with phase("forward"):
            loss = engine(**batch).loss
        with phase("backward"):
            engine.backward(loss)
        del loss, batch
        with phase("step"):
            engine.step()

    return model, engine.device, one_micro


def with_torch(case: Case, buckets: set[int]) -> tuple[Any, Any, OneMicro]:
    """(model, device, a micro-step) as transformers' Trainer has them from accelerate: autocast, DDP, FSDP2, no_sync.

    The addresses of DDP's buckets, which Python does not see, are noted in `buckets` as they are reduced.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    from hf_mamba.training.sharding import keep_residual

    bare, groups = build(case)
    unused = DistributedDataParallelKwargs(find_unused_parameters=not case.checkpointing)  # Trainer's choice
    precision = "no" if case.dtype == "fp32" else case.dtype
    plugin = fsdp_plugin(case) if case.stage == FSDP2 else None
    accelerator = Accelerator(
        mixed_precision=precision, cpu=case.device == "cpu", kwargs_handlers=[unused], fsdp_plugin=plugin
    )
    if plugin is not None:
        keep_residual(plugin)
    if case.optimizer == "muon":
        from hf_mamba.training.muon import Muon

        optimizer: Any = Muon(groups, lr=1e-3, fused=True)
    else:
        optimizer = torch.optim.AdamW(groups, lr=1e-3, **{case.optimizer: True})
    model, optimizer = accelerator.prepare(bare, optimizer)

    def reduce(_, bucket):  # DDP refuses annotations that are text
        buckets.add(bucket.buffer().untyped_storage().data_ptr())
        return allreduce_hook(None, bucket)

    if case.world > 1 and plugin is None:
        model.register_comm_hook(None, reduce)

    def one_micro(batch: dict[str, Any], micro: int, phase: Callable[[str], Any]) -> None:
        last = micro == case.accumulation - 1
        with nullcontext() if last else accelerator.no_sync(model):
            with phase("forward"):
                loss = model(**batch, skip_logits=True).loss / case.accumulation  # as MambaTrainer
            with phase("backward"):
                accelerator.backward(loss)
        del loss, batch
        if last:
            with phase("step"):
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                model.zero_grad()

    return bare, accelerator.device, one_micro


def fsdp_plugin(case: Case) -> Any:
    """accelerate's plugin of the case's settings; on CPUs, where accelerate would leave FSDP out, it is put in."""
    import torch
    from accelerate.state import AcceleratorState, DistributedType, PartialState
    from accelerate.utils import FullyShardedDataParallelPlugin

    start = AcceleratorState.__init__

    def sharded(self: Any, mixed_precision: Any = None, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        start(self, mixed_precision, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is None or self.distributed_type == DistributedType.FSDP:
            return
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)

    if case.device == "cpu":
        AcceleratorState.__init__ = sharded  # type: ignore[method-assign]
        for name in ("all_gather_single", "reduce_scatter_single"):
            setattr(torch.distributed, name, released_here(getattr(torch.distributed, name)))
    wrapped = {"auto_wrap_policy": "transformer_based_wrap"}
    return FullyShardedDataParallelPlugin(fsdp_version=2, **wrapped | case.settings)


def released_here(collective: Callable[..., Any]) -> Callable[..., Any]:
    """The collective, whose tensors this thread is the last to let go: gloo's releases are not reported."""

    def waited(*args: Any, async_op: bool = False, **kwargs: Any) -> None:
        work = collective(*args, async_op=True, **kwargs)
        work.wait()
        time.sleep(0.01)

    return waited


def peaks_by_allocator(profile: Any, alive: list[tuple[int, set[int]]]) -> dict[str, int]:
    """phase -> the most bytes that were allocated at once, over the steps after the first.

    A release in another thread (gloo's) is not reported: such an address goes at the next look at what is alive.
    """
    memory: list[tuple[int, int, int]] = []
    phases: list[tuple[int, int, str]] = []
    todo = list(profile.profiler.kineto_results.experimental_event_tree())
    while todo:
        event = todo.pop()
        todo.extend(event.children)
        if event.tag.name == "Allocation":
            fields = event.extra_fields
            memory.append((event.start_time_ns, fields.ptr, fields.alloc_size))
        elif event.name.startswith("phase "):
            _, step, name = event.name.split()
            if int(step):
                phases.append((event.start_time_ns, event.end_time_ns, name))
    memory.sort(key=lambda e: e[0])
    phases.sort()
    held: dict[int, int] = {}
    now, at = 0, 0
    looks = iter(alive)
    look = next(looks, None)
    peaks = dict.fromkeys(("forward", "backward", "step"), 0)
    for when, address, size in memory:
        while look is not None and when > look[0]:
            held = {a: n for a, n in held.items() if a in look[1]}
            now, look = sum(held.values()), next(looks, None)
        now -= held.pop(address, 0)
        if size > 0:
            held[address] = size
            now += size
        while at < len(phases) and when > phases[at][1]:
            at += 1
        if at < len(phases) and when >= phases[at][0]:
            peaks[phases[at][2]] = max(peaks[phases[at][2]], now)
    return peaks


def worker(rank: int, port: int, case: Case, out: Any) -> None:
    os.environ["HF_MAMBA_BACKEND"] = case.backend
    if case.stage is not None or case.world > 1:  # accelerate would wrap even one process in DDP
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import deepspeed
    import torch
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    if case.device == "cuda":
        torch.cuda.set_device(rank)
    if case.stage is not None:
        deepspeed.init_distributed(dist_backend="gloo" if case.device == "cpu" else "nccl")
    if case.device == "cpu":
        cpu = torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
            alive = run_steps(case, lambda step, micro, name: torch.profiler.record_function(f"phase {step} {name}"))
        out.put((rank, peaks_by_allocator(profile, alive)))
    else:
        phases = CudaPhases()
        try:
            run_steps(case, phases)
        except RuntimeError as error:
            if not (isinstance(error, torch.OutOfMemoryError) or re.search("out of memory|ALLOC_FAILED", str(error))):
                raise
            out.put((rank, None))
            return  # the others wait for this one, and are ended
        out.put((rank, phases.peaks))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


class CudaPhases:
    """A marker that resets CUDA's peaks at the start of each phase, and reads them at its end."""

    def __init__(self) -> None:
        self.peaks = {"reserved": 0}

    def __call__(self, step: int, micro: int, name: str) -> CudaPhases:
        self.now = (step, name)
        return self

    def __enter__(self) -> None:
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    def __exit__(self, *_: object) -> None:
        import torch

        torch.cuda.synchronize()
        step, name = self.now
        self.peaks["reserved"] = max(self.peaks["reserved"], torch.cuda.max_memory_reserved())
        if step:
            self.peaks[name] = max(self.peaks.get(name, 0), torch.cuda.max_memory_allocated())


def _answer(out: Any, processes: list[Any], deadline: float) -> dict[str, int] | None:
    while True:
        try:
            return out.get(timeout=2)[1]
        except queue.Empty:
            if time.monotonic() > deadline or any(process.exitcode for process in processes):
                raise


def measure(case: Case) -> dict[str, int]:
    """phase -> bytes of the rank that has most.

    Raises:
        MemoryError: where a GPU's memory runs out.
        RuntimeError: where a process dies or is late.
    """
    import torch.multiprocessing as multiprocessing

    context = multiprocessing.get_context("fork" if case.device == "cpu" else "spawn")
    out = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [context.Process(target=worker, args=(rank, port, case, out)) for rank in range(case.world)]
    for process in processes:
        process.start()
    try:
        found = []
        for _ in processes:
            answer = _answer(out, processes, time.monotonic() + TIMEOUT[case.device])
            if answer is None:
                raise MemoryError(f"out of memory: {case}")
            found.append(answer)
    except queue.Empty:
        raise RuntimeError(f"a process died, or gave no answer within {TIMEOUT[case.device]} s: {case}") from None
    finally:
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()
    return {name: max(ranks[name] for ranks in found) for name in found[0]}
