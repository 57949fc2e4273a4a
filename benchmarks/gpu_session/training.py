"""Whole training steps of published sizes: speed, MFU, and memory beside what the planner says; the recipe itself."""

import math
import statistics
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_session.step import Context
from benchmarks.gpu_session.timing import seconds, synchronize
from hf_mamba.family import all_presets, family_of, get_preset
from hf_mamba.preflight.cost.duration import device_name
from hf_mamba.preflight.cost.gpus import utilisation
from hf_mamba.preflight.cost.memory import estimate, largest_fitting
from hf_mamba.preflight.launch.machine import chosen_backend
from hf_mamba.run.log import read_log
from hf_mamba.training.performance import peak_memory

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))  # memory.py and its modules are scripts
STEPS = 12


def case_of(context: Context, preset: str, checkpointing: bool = False) -> Any:
    """A run without DeepSpeed in bf16, of one row."""
    from memory_cases import Case

    tiny = {"130m_mamba2": "tiny_mamba2", "350m_hybrid": "tiny_hybrid"}.get(preset, "tiny_mamba")
    preset = context.pick(preset, tiny)
    backend = chosen_backend(get_preset(preset).config, context.device, "bf16")
    length = context.pick(get_preset(preset).seq_len, 32)
    own = {"checkpointing": checkpointing, "batch": 1, "length": length, "backend": backend}
    return Case(preset, None, "bf16", device=context.device, **own)


def capacity(context: Context) -> int:
    return torch.cuda.get_device_properties(0).total_memory if not context.rehearse else 2 * 10**9


def whole_step(context: Context, preset: str, checkpointing: bool = False) -> None:
    """Steps of autocast over fp32 weights with fused AdamW, as MambaTrainer's, on rows of two documents."""
    from dataclasses import replace

    from memory_steps import packed_rows, with_torch

    case = case_of(context, preset, checkpointing)
    job = case.job()
    rows = min(context.pick(get_preset(case.model).micro_batch_size, 1), largest_fitting(job, capacity(context)))
    case = replace(case, batch=rows)
    with torch.device(context.device):
        _, device, one_micro = with_torch(case, set())

    def step() -> None:
        one_micro(packed_rows(case, device), 0, lambda _: nullcontext())

    for _ in range(2):  # compiles, and makes the optimizer's states
        step()
    synchronize()
    if not context.rehearse:
        torch.cuda.reset_peak_memory_stats()
    each = statistics.median(seconds(step) for _ in range(context.pick(8, 1)))
    setting = f"{case.model} B={rows} L={case.length}{', checkpointing' * checkpointing}"
    tokens = rows * case.length
    family = family_of(case.model_config)
    flops = family.token_flops(family.geometry(case.model_config), case.length)
    products = context.figure("card//products, bf16")
    floor = None if products is None else tokens * flops.executed(checkpointing) / products / 1e12
    context.report(setting, "step", 1e3 * each, "ms", None if floor is None else 1e3 * floor, "least: its products")
    context.report(setting, "speed", tokens / each, "tokens/s", note=f"backend {case.backend}")
    mfu = utilisation(flops.training, tokens / each, 1, device_name(), "bf16")
    if mfu is not None:
        context.report(setting, "MFU", mfu, "", 1)
    memory, predicted = peak_memory(), estimate(job, rows)
    measured = memory.get("allocated", memory.get("resident", 0))
    context.report(setting, "memory", measured / 1e9, "GB", predicted.peak.bytes / 1e9, predicted.peak.where)
    if not context.rehearse:
        free, total = torch.cuda.mem_get_info()
        context.report(setting, "memory, all", (total - free) / 1e9, "GB", predicted.device_bytes / 1e9)


def largest(context: Context) -> None:
    """A step of the largest published size of which one row fits, with checkpointing."""
    sizes = {
        name: sum(row.size for row in family_of(preset.config).parameters(preset.config))
        for name, preset in all_presets().items()
    }
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
        if context.rehearse or largest_fitting(case_of(context, name, True).job(), capacity(context)):
            return whole_step(context, name, checkpointing=True)


def automatic(context: Context) -> None:
    """Whether steps run out of memory at the micro-batch that "auto" chooses, and at 1.15 times of it."""
    from dataclasses import replace

    from memory_steps import measure, prepare

    prepare(context.device)
    case = case_of(context, "130m_mamba")
    chosen = largest_fitting(case.job(), capacity(context))
    for name, rows in (("auto", chosen), ("1.15 times", math.ceil(1.15 * chosen))):
        try:
            measure(replace(case, batch=context.pick(rows, 2)))
            out = 0
        except MemoryError:
            out = 1
        context.report(f"{case.model} L={case.length}", f"{name} runs out", out, "", note=f"{rows} rows")


def launch(context: Context, deepspeed: str) -> None:
    """Real training under `accelerate launch`: does it come to its end, learn, and go as fast as the step alone."""
    preset, data = context.pick(("130m_mamba", "embedded"), ("tiny_mamba", "hf_mamba/ops/*.py"))
    small = ["--use_cpu", "true", "--seq_len", "32", "--vocab_size", "320", "--micro_batch_size", "2"]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
        command += ["--use_deepspeed"] * (context.rehearse and deepspeed != "none") + ["recipes/pretrain.py"]
        command += ["--preset", preset, "--dataset", data, "--max_steps", str(STEPS), "--logging_steps", "1"]
        command += ["--warmup_steps", "2", "--gradient_accumulation_steps", "1", "--save_strategy", "no"]
        command += ["--deepspeed", deepspeed, "--output_dir", str(run), *small * context.rehearse]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        print(done.stdout[-12_000:], done.stderr[-4000:], flush=True)
        if done.returncode:
            raise SystemExit(f"the run ended with {done.returncode}")
        rows = [row for row in read_log(run) if "loss" in row]
    setting = f"{preset}, {deepspeed}"
    context.report(setting, "steps", rows[-1]["step"], "", STEPS)
    context.report(setting, "loss", rows[-1]["loss"], "", rows[0]["loss"], "the last beside the first")
    speeds = [row["tokens_per_second"] for row in rows[3:]]
    alone = context.figure(f"c-{preset}/{preset} B={get_preset(preset).micro_batch_size} L=2048/speed")
    context.report(setting, "speed", statistics.median(speeds), "tokens/s", alone, "beside a step alone")
    if "memory_predicted_gb" in rows[-1]:
        context.report(setting, "memory", rows[-1]["memory_gb"], "GB", rows[-1]["memory_predicted_gb"])
