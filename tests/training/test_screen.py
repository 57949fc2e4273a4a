"""What a person sees while a run trains."""

import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from launching import RECIPE, ROOT, environment, write_corpus

from hf_mamba.training.screen import brief, line

LOGS = {
    "loss": 4.87124,
    "learning_rate": 4e-3,
    "grad_norm": 1.0237,
    "data_wait_seconds": 0.003,
    "data_wait_share": 0.0006,
    "tokens_per_second": 9012.3,
    "memory_gb": 0.8253,
    "epoch": 0.02,
}


def test_a_line_is_read_at_a_glance() -> None:
    assert line(LOGS, 20, 300, 3600.0) == (
        " 20/300  loss  4.871  rate 4.0e-03  grad  1.02      9,012 tok/s   1h00m left"
    )


@pytest.mark.parametrize("loss", [0.0, 11.3])
@pytest.mark.parametrize("norm", [0.0, 99.994, 12345.6, 1e9, float("inf"), float("nan")])
@pytest.mark.parametrize("left", [0.4, 59.6, 3599.0, 86399.0, 9e6])
def test_columns_stay_where_they_are(loss: float, norm: float, left: float) -> None:
    shown = line({**LOGS, "loss": loss, "grad_norm": norm}, 7, 10000, left)
    usual = line(LOGS, 10000, 10000, 60.0)
    assert len(shown) == len(usual) <= 80
    assert [shown.index(word) for word in ("loss", "rate", "grad", "tok/s", "left")] == [
        usual.index(word) for word in ("loss", "rate", "grad", "tok/s", "left")
    ]


def test_what_is_unusual_is_added() -> None:
    logs = {**LOGS, "mfu": 0.412, "data_wait_share": 0.12, "bad_steps": 2, "unusable_records": 0}
    shown = line(logs, 5, 10)
    for part in ("mfu 41.2%", "waiting for data 12%", "2 updates withheld"):
        assert part in shown
    assert "unusable" not in shown


def test_losses_of_sources_stand_below_the_line() -> None:
    sources = {f"loss/{'long' * 9}{number}.jsonl": 3.25 for number in range(20)}
    first, below = line({**LOGS, **sources}, 5, 10).split("\n")
    assert first == line(LOGS, 5, 10)
    assert below.startswith("       …")
    assert below.endswith("  and 17 more")
    assert len(below) <= 120
    evaluated = {"eval_loss": 4.2791, "eval_loss/a": 4.0, "eval_loss/b.jsonl": 4.5}
    assert line(evaluated, 3, 3) == "3/3  held-out loss 4.279\n     a 4.000  b.jsonl 4.500"


def test_evaluations_ends_and_a_callers_own_numbers() -> None:
    evaluated = {"eval_loss": 4.2791, "eval_perplexity": 72.17, "eval_bits_per_byte": 1.6272, "eval_runtime": 3.0}
    assert line(evaluated, 300, 300) == "300/300  held-out loss 4.279  perplexity 72.2  1.627 bits/byte"
    assert line({"train_runtime": 56.2, "train_loss": 4.9}, 300, 300) == "300/300  trained in 56s  mean loss 4.900"
    assert line({"accuracy": 0.51239, "note": "x"}, 1, 10) == " 1/10  accuracy 0.5124  note x"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0s"), (59.6, "1m00s"), (192, "3m12s"), (3599.7, "1h00m"), (18180, "5h03m"), (187200, "2d04h")],
)
def test_a_duration_has_two_units(seconds: float, words: str) -> None:
    assert brief(seconds) == words


def through_a_terminal(command: list[str], env: dict[str, str], interrupt: bytes = b"", expect: int = 0) -> str:
    """Everything that a command writes to a terminal of 80 columns; at the text `interrupt`, Ctrl-C is pressed."""
    main, other = pty.openpty()
    subprocess.run(["stty", "cols", "80", "rows", "40"], stdin=other, check=True)
    written: list[bytes] = []

    def read() -> None:
        pressed = not interrupt
        try:
            while part := os.read(main, 65536):
                written.append(part)
                if not pressed and interrupt in b"".join(written):
                    pressed = os.write(main, b"\x03") == 1
        except OSError:  # the last process has closed it
            pass

    reader = threading.Thread(target=read)
    reader.start()
    try:
        command = ["setsid", "-c", "-w", *command]  # in a terminal's foreground
        done = subprocess.run(command, stdin=other, stdout=other, stderr=other, env=env, cwd=ROOT, timeout=400)
    finally:
        os.close(other)
        reader.join()
        os.close(main)
    text = b"".join(written).decode()
    assert done.returncode == expect, text
    return text


def seen(text: str) -> list[str]:
    """The lines that stay: a carriage return writes over what stands."""
    lines = []
    for row in text.replace("\r\n", "\n").split("\n"):
        shown = ""
        for part in re.sub(r"\x1b\[[0-9;]*[a-zA-Z]", "", row).split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


def test_a_terminal_and_a_pipe_show_the_same_lines(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    command = [sys.executable, RECIPE, "--vocab_size", "320", "--seq_len", "48", "--max_steps", "4"]
    command += ["--use_cpu", "true", "--logging_steps", "1", "--save_steps", "2", "--eval_strategy", "steps"]
    command += ["--eval_steps", "2", "--dataset", str(corpus), "--sample_prompt", ""]
    env = environment(tmp_path)
    piped = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "a")], env=env, cwd=ROOT, capture_output=True, timeout=400, check=True
    )
    env.pop("TQDM_DISABLE")
    shown = through_a_terminal([*command, "--output_dir", str(tmp_path / "b")], env)
    assert "training:" in shown  # the bar
    for stream in (piped.stdout, piped.stderr):
        assert not set(stream) & {ord("\r"), 0x1B}
    screens = piped.stdout.decode().split("\n"), seen(shown)
    steps = [[row for row in screen if re.match(r"\d/4  ", row)] for screen in screens]
    timed = re.compile(r"\d\S* (tok/s|left)|waiting for data \d+%| in \S+")  # what two runs do not share
    what = [[timed.sub("", row).split() for row in rows] for rows in steps]
    assert what[0] == what[1]
    assert sum("loss" in row and "rate" in row for row in steps[1]) == 4
    assert sum("saved checkpoint-" in row for row in steps[1]) == 2
    assert "{'" not in shown


def test_ctrl_c_ends_a_launch_with_a_checkpoint(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    command = [sys.executable, "-m", "hf_mamba.cli", "launch", "--vocab_size", "320", "--seq_len", "48"]
    command += ["--max_steps", "100000", "--logging_steps", "1", "--use_cpu", "true", "--dataset", str(corpus)]
    command += ["--save_steps", "100000", "--output_dir", str(tmp_path / "run")]
    unset = {name: value for name, value in environment(tmp_path).items() if name != "OMP_NUM_THREADS"}
    shown = seen(through_a_terminal(command, unset, b" 2/100000  loss", expect=85))
    assert not [row for row in shown if "Traceback" in row or "values were not passed" in row]
    (step,) = [row.split()[-1] for row in shown if "stopping after step" in row]
    assert [row for row in shown if f"saved checkpoint-{step}" in row]


def test_long_work_shows_lines_in_a_pipe() -> None:
    script = (
        "from hf_mamba import progress; progress.EVERY = 0.0\n"
        "shown = progress.bar(total=3, desc='tokenising x', unit='part')\n"
        "for _ in range(3): shown.update()\n"
        "shown.close()"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    assert re.match(r"tokenising x: 3/3 parts, 00:00 so far, 00:00 left", lines[-1])
    assert all(row.startswith("tokenising x: ") for row in lines)
    assert "\r" not in done.stderr
