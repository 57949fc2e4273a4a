"""The profile of the operation that is furthest from the least it could take, by torch's profiler and by ncu."""

import shutil
import subprocess
import sys

import torch

from benchmarks.gpu_session.figures import Figure, read_figures
from benchmarks.gpu_session.step import Context
from benchmarks.gpu_session.times import OURS, SUITES
from benchmarks.gpu_session.timing import synchronize

PROFILE = "profile.txt"
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "WarpStateStats", "MemoryWorkloadAnalysis", "SchedulerStats")


def slowest(context: Context) -> None:
    """Writes profile.txt; in it each kernel's share, and what the counters say of each where ncu is installed."""
    found = worst(read_figures(context.folder))
    if found is None:
        raise SystemExit("nothing of ours was timed beside what it could take: step b comes first")
    suite = found.step.partition("-")[2]
    run = one_call(context, suite, found.setting)
    activities = [torch.profiler.ProfilerActivity.CPU, *[torch.profiler.ProfilerActivity.CUDA] * (not context.rehearse)]
    run()
    with torch.profiler.profile(activities=activities) as profile:
        run()
        synchronize()
    order = context.pick("self_device_time_total", "self_cpu_time_total")
    table = profile.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=60)
    (context.folder / PROFILE).write_text(f"{found.key}\n{table}\n")
    context.report(found.setting, "profiled", 1, "", note=f"{found.step}, {found.ratio:.1f} times the least")
    ncu = shutil.which("ncu")
    if ncu is None:
        print("ncu is not installed", flush=True)
        return
    command = [ncu, "--clock-control", "none", "--profile-from-start", "off", "--launch-count", "8"]
    command += [argument for name in SECTIONS for argument in ("--section", name)]
    command += [sys.executable, "-m", "benchmarks.gpu_session.step", "once", ".profiles:once", str(context.folder)]
    done = subprocess.run([*command, suite, found.setting], capture_output=True, text=True, check=False)
    with (context.folder / PROFILE).open("a") as file:
        file.write(done.stdout[-200_000:] + done.stderr[-2000:])


def worst(figures: list[Figure]) -> Figure | None:
    """Our kernel's call with the most time over the least."""
    ours = [figure for figure in figures if figure.step.startswith("b-") and figure.name == OURS and figure.beside]
    return max(ours, key=lambda figure: figure.ratio, default=None)


def one_call(context: Context, suite: str, setting: str):
    return next(contest.steps[OURS] for contest in SUITES[suite](context) if contest.setting == setting)


def once(context: Context, suite: str, setting: str) -> None:
    """The call alone, for ncu."""
    run = one_call(context, suite, setting)
    run()
    synchronize()
    torch.cuda.profiler.start()
    run()
    synchronize()
    torch.cuda.profiler.stop()
