"""What can be seen of a run: log, samples, and the page, in a real browser."""

import html.parser
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import ROOT, Launcher, held, kill, log_lines, wait_for

from hf_mamba.report.html import POINTS, Series, plot, thin
from hf_mamba.report.page import main
from hf_mamba.run.log import HISTORY, Thinned, read_history, read_lines, read_log

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def run(launcher: Launcher) -> Path:
    other = launcher.folder / "other.jsonl"
    other.write_text(
        "\n".join(json.dumps({"text": f"{i} times {j} is {i * j}. " * 6}) for i in range(20) for j in range(9))
    )
    dataset = [f"{launcher.corpus}:0.6", f"{other}:0.4"]
    settings = {"eval_strategy": "steps", "eval_steps": 4, "sample_prompt": "the <b>quick", "dataset": dataset}
    launcher.run("seen", report_to="none", **settings)
    return launcher.folder / "seen"


def report(*folders: Path, output: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("hf-mamba")), "report", *map(str, folders), "--output", str(output)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_log_has_what_an_operator_looks_at(run: Path):
    rows = read_log(run)
    step = next(row for row in rows if row.get("step") == 5 and "loss" in row)
    assert {"grad_norm", "learning_rate", "data_wait_seconds", "data_wait_share", "tokens_per_second"} <= step.keys()
    assert 0 <= step["data_wait_share"] < 1
    assert step["memory_gb"] > 0
    assert [row["step"] for row in rows if row.get("save_seconds", 0) > 0] == [5, 9]  # in the line after the save
    for row in rows:
        if "eval_loss" in row:
            parts = {key: value for key, value in row.items() if key.startswith("eval_loss/")}
            assert len(parts) == 2
            assert min(parts.values()) <= row["eval_loss"] <= max(parts.values())
            assert row["eval_perplexity"] == pytest.approx(math.exp(row["eval_loss"]))
    assert len(log_lines(run, "eval_loss")) == 3


def test_samples_over_time(run: Path):
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert sorted({sample["step"] for sample in samples}) == [4, 8, 12]
    assert all(sample["text"].startswith("the <b>quick") for sample in samples)


def test_samples_of_a_model_that_no_rank_has_whole(launcher: Launcher):
    """Under ZeRO-3 the same as one process writes: at a rate of 0, from the first weights."""
    settings = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0, "min_lr": 0}
    settings |= {"save_strategy": "no", "sample_prompt": "the quick", "warmup_steps": 0}
    zero3 = {"deepspeed": str(ROOT / "ds_configs" / "zero3.json")}
    texts = []
    for name, world, more in (("whole", 1, {}), ("parts", 2, zero3)):
        folder = launcher.folder / f"samples-{name}"
        launcher.run(folder, world, **settings, **more)
        texts.append([json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()])
    assert texts[0] == texts[1]
    assert {sample["step"] for sample in texts[0]} == {1, 2}
    assert len(texts[0][0]["text"]) > len("the quick")


def test_the_page_is_one_file_that_a_browser_shows(run: Path, tmp_path: Path):
    page = tmp_path / "page.html"
    assert report(run, output=page).returncode == 0
    text = page.read_text()
    html.parser.HTMLParser().feed(text)
    assert "the &lt;b&gt;quick" in text  # what a model writes is not markup
    assert not re.findall(r"<script|<link|src=|@import|url\(|https?://", text)
    for expected in (
        "Loss by source in training",
        "Loss by source in evaluation",
        "Throughput",
        "Waiting for data",
        "warmup_steps",
        "flag --warmup_steps",
    ):
        assert expected in text
    if BROWSER is None:
        pytest.skip("no browser is installed (chromium)")
    base = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    dom = subprocess.run([*base, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=False)
    assert dom.stdout.count("<svg") == text.count("<svg") >= 7
    assert dom.stdout.count("<polyline") == text.count("<polyline")
    assert "nan" not in " ".join(re.findall(r'points="([^"]*)"', dom.stdout)).lower()
    shot = tmp_path / "page.png"
    command = [*base, f"--screenshot={shot}", "--window-size=1200,1600", page.as_uri()]
    subprocess.run(command, capture_output=True, timeout=120, check=False)
    from matplotlib.image import imread

    colours = (imread(shot)[..., :3] * 255).round().astype(int)
    for curve in ((0x33, 0x66, 0xCC), (0xDC, 0x39, 0x12)):  # both curves of the loss are drawn
        assert (abs(colours - curve).sum(-1) < 30).sum() > 50


def test_while_the_run_goes_on_and_side_by_side(launcher: Launcher, run: Path, tmp_path: Path):
    folder = launcher.folder / "going-on"
    launch = launcher.start(folder, patch=held("training_step", 3))
    wait_for(lambda: 3 in log_lines(folder))
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"loss": 1.0, "st')  # a line that is being written
    assert main([str(run), str(folder), "--output", str(tmp_path / "two.html")]) == 0
    kill(launch)
    text = (tmp_path / "two.html").read_text()
    assert "running" in text
    assert "finished" in text
    assert "remaining" in text
    assert "going-on, training" in text
    assert "seen, training" in text
    colours = set(re.findall(r"color:(#\w+)'>&#9632;</span> (going-on|seen)(?:, training)?</span>", text))
    assert len(colours) == 2  # each run has one colour in all plots


def test_not_a_run(tmp_path: Path):
    done = report(tmp_path, output=tmp_path / "x.html")
    assert done.returncode == 2
    assert "holds no run.json" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_log_of_a_run_that_was_resumed(tmp_path: Path):
    """Lines that were done again count once; a line that a kill cut in two is left out."""
    lines = ['{"resumed_at": 0}', '{"step": 1, "loss": 3}', '{"step": 2, "loss": "nan"}', '{"step": 3, "lo']
    lines += ["", '{"resumed_at": 1}', '{"step": 2, "loss": 2.5}']
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    assert [(row["step"], row["loss"]) for row in read_log(tmp_path)] == [(1, 3), (2, 2.5)]


@given(
    values=st.lists(st.floats(-10, 10), min_size=1, max_size=120),
    gaps=st.lists(st.integers(1, 9), min_size=120, max_size=120),
    limit=st.integers(2, 150),
    back=st.integers(0, 400),
)
def test_a_curve_that_grows_is_thinned_and_cut(values: list[float], gaps: list[int], limit: int, back: int):
    points = list(zip(itertools.accumulate(gaps), values, strict=False))
    curve = Thinned[tuple[int, float]](limit)
    for step, value in points:
        curve.add(step, value, (step, value))
    kept = curve.items()
    assert len(kept) <= 2 * limit
    assert set(kept) <= set(points)
    assert kept == sorted(kept)
    assert min(v for _, v in kept) == min(values)
    assert max(v for _, v in kept) == max(values)
    if points[-1][0] < limit:
        assert kept == points
    curve.cut(back)
    assert curve.items() == [point for point in kept if point[0] <= back]


def log_of(folder: Path, lines: int) -> Path:
    """A run's folder with a log in which steps were done again, evaluated and withheld."""
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    with open(folder / "log.jsonl", "w") as file:
        for step in range(1, lines + 1):
            loss = 50.0 if step == lines // 3 else 3 + step % 7 / 10
            file.write(json.dumps({"loss": loss, "loss/a": 3.0, "mfu": 0.5, "step": step, "time": step}) + "\n")
            if step % 200 == 0:
                file.write(json.dumps({"eval_loss": 4 - step / lines, "step": step}) + "\n")
            if step % (lines // 10) == 0:
                file.write(f'{{"loss": 1e3, "step": {step + 1}}}\n{{"resumed_at": {step}}}\n')
    return folder


def test_a_log_ten_times_as_long_takes_no_more_memory_and_no_more_page(tmp_path: Path, monkeypatch):
    read = Counter[int]()

    def counted(path: Path):
        for line in read_lines(path):
            read[lines] += path.name == "log.jsonl"
            yield line

    monkeypatch.setattr("hf_mamba.run.log.read_lines", counted)
    peaks = {}
    for lines in (3_000, 30_000):
        folder = log_of(tmp_path / str(lines), lines)
        tracemalloc.start()
        main([str(folder), "--output", str(tmp_path / "page.html")])
        peaks[lines] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        text = (tmp_path / "page.html").read_text()
        assert len(text) < 60_000
        assert f"<td>{lines:,}</td>" in text
        assert f"<td>{3 + lines % 7 / 10:.4g}</td>" in text  # the last loss
        assert "1e+03" not in text  # the lines that were done again
        assert read[lines] == lines + lines // 200 + 20  # each line once
        history = read_history(folder, until=lines - 1)
        assert max(row["loss"] for row in history if "loss" in row) == 50
        assert max(row["step"] for row in history) == lines - 1
        assert len(history) <= 4 * HISTORY + 1
    assert peaks[30_000] < 1.5 * peaks[3_000]


def test_lines_before_the_logs_first_come_from_the_checkpoint(tmp_path: Path):
    """A branch's log begins where the run went on."""
    (tmp_path / "log.jsonl").write_text('{"resumed_at": 4}\n{"step": 5, "loss": 2.0}\n{"step": 6, "loss": 1.0}\n')
    state = [{"step": step, "loss": 9.0} for step in range(1, 6)]
    assert [row["loss"] for row in read_history(tmp_path, 5, state)] == [9.0, 9.0, 9.0, 9.0, 2.0]
    assert read_history(tmp_path / "elsewhere", None, state) == state


def test_a_long_curve_is_thinned_without_losing_a_spike():
    points = [(float(x), math.sin(x / 1000)) for x in range(100_000)]
    points[70_001] = (70_001.0, 50.0)
    points[20_002] = (20_002.0, -50.0)
    kept = thin(points)
    assert len(kept) <= POINTS + 2
    assert {(70_001.0, 50.0), (20_002.0, -50.0)} <= set(kept)
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    assert len(plot("t", "", [Series("s", points)])) < 40_000


@pytest.mark.parametrize("points", [[(0.0, 0.0)], [(5.0, 3.0), (5.0, 3.0)], [(0.0, -1e-9), (1e12, 1e12)]])
def test_plots_of_odd_curves(points: list[tuple[float, float]]):
    drawing = plot("t", "u", [Series("<s>", points)])
    assert "nan" not in drawing
    assert "&lt;s&gt;" in drawing
