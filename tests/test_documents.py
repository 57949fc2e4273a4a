"""What the documents and help texts tell a reader to type can be typed."""

import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from launching import ROOT

from hf_mamba import cli
from hf_mamba.preflight.command_line import read_arguments
from hf_mamba.preflight.launch.command import split_launch_flags

DOCUMENTS = [
    *sorted(path for path in ROOT.glob("*.md") if path.name != "CHANGELOG.md"),  # which names what went
    ROOT / "benchmarks" / "README.md",
    ROOT / "hf_mamba" / "ops" / "TRITON.md",
    *sorted(path for path in (ROOT / "recipes").rglob("*") if path.suffix in {".py", ".yaml", ".sbatch", ".md"}),
]
PROGRAMS = (
    r"hf-mamba [a-z]|accelerate launch |torchrun |deepspeed -|python -m benchmarks|python (?:recipes|benchmarks)/"
)
BEGIN = re.compile(rf"(?:^|`|\$ |&& |# |srun [^`]*?)(?=(?:{PROGRAMS}))", re.MULTILINE)
# train.py is the script of another project, in the table of what its users typed.
FOREIGN = re.compile(r"\btrain\.py\b|<[a-z]")


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command in a text: between backticks, after `$ `, or a line of its own."""
    text = text.replace("\\\n", " ")
    text = re.sub(r"(?<!`)`([^`]+)`(?!`)", lambda match: "`" + " ".join(match[1].split()) + "`", text)
    for begin in BEGIN.finditer(text):
        rest = text[begin.end() :]
        quoted = begin[0].startswith("`") or begin[0].startswith("srun")
        command = rest.partition("`" if quoted else "\n")[0]
        command = re.split(r" (?:&&|\||2?>) | {3,}|[,;)]\s*$| # |:$", command)[0].strip().rstrip(".,:;")
        if FOREIGN.search(command):
            continue
        try:
            yield [word for word in shlex.split(re.sub(r"\[training flags\]|[][]", " ", command)) if word != "..."]
        except ValueError:  # prose with an apostrophe
            continue


def flags_of(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)]


def check_recipe(words: list[str]) -> None:
    """Every flag is an argument of a run."""
    found = [problem for problem in read_arguments(words).problems if problem.id == "unknown-flag"]
    assert not found


@cache
def help_of(*command: str) -> str:
    if command[0] == "hf-mamba":
        shown = io.StringIO()
        with redirect_stdout(shown), redirect_stderr(shown), pytest.raises(SystemExit) as ended:
            raise SystemExit(cli.main([*command[1:], "--help"]))
        assert not ended.value.code
        return shown.getvalue()
    done = subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def check(words: list[str]) -> None:
    """The program, its verb and every flag exist."""
    program, rest = words[0], words[1:]
    if program == "hf-mamba":
        verb, rest = rest[0], rest[1:]
        assert verb in cli.VERBS
        if verb in {"preflight", "launch"}:
            own = {"--json", "--write", "--provenance", "--convert"} if verb == "preflight" else set()
            own |= {f"--{name}" for name in vars(split_launch_flags([])[0])} if verb == "launch" else set()
            check_recipe([word for word in rest if word not in own and not word.isupper()])
        else:
            for flag in flags_of(rest):
                assert re.search(rf"{flag}\b", help_of("hf-mamba", verb)), flag
    elif program in {"accelerate", "torchrun", "deepspeed"}:
        scripts = [place for place, word in enumerate(rest) if word.endswith(".py")]
        launcher, recipe = (rest[: scripts[0]], rest[scripts[0] + 1 :]) if scripts else (rest, [])
        if program == "accelerate":
            known = {option for action in launch_command_parser()._actions for option in action.option_strings}
            assert set(flags_of(launcher)) <= known
        check_recipe(recipe)
    elif rest[:1] == ["recipes/pretrain.py"]:
        check_recipe(rest[1:])
    elif rest[0] == "-m" and rest[1] != "benchmarks.run":
        module = ROOT / rest[1].replace(".", "/")
        assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file()
        for flag in flags_of(rest[2:]):
            assert re.search(rf"{flag}\b", help_of(*rest[:2])), flag
    elif rest[:2] == ["-m", "benchmarks.run"]:
        for flag in flags_of(rest):
            assert re.search(rf"{flag}\b", help_of("-m", "benchmarks.run", *rest[2:3])), flag
    else:
        assert (ROOT / rest[0]).is_file()
        for flag in flags_of(rest):
            assert re.search(rf"{flag}\b", help_of(rest[0])), flag


CASES = [(path, words) for path in DOCUMENTS for words in commands(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("path", "words"), CASES, ids=[f"{path.name}-{shlex.join(words)}" for path, words in CASES])
def test_a_documents_command_can_be_typed(path: Path, words: list[str]) -> None:
    check(words)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_a_help_texts_commands_can_be_typed(verb: str) -> None:
    for words in commands(help_of("hf-mamba", verb)):
        check(words)


def test_the_commands_are_found() -> None:
    assert len(CASES) > 40
    found = list(commands("Text `hf-mamba memory --gpu\nH100` and\n$ python recipes/pretrain.py --dry_run\n"))
    assert found == [["hf-mamba", "memory", "--gpu", "H100"], ["python", "recipes/pretrain.py", "--dry_run"]]
    with pytest.raises(AssertionError):
        check(["hf-mamba", "memory", "--no_such_flag"])
    with pytest.raises(AssertionError):
        check(["accelerate", "launch", "recipes/pretrain.py", "--no_such_flag", "1"])


def test_readmes_example_trains_on_a_data_set_in_memory(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = (
        block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "Dataset.from_dict" in block
    )
    script = tmp_path / "example.py"
    script.write_text(
        example + "\nprint('losses', [row['loss'] for row in trainer.state.log_history if 'loss' in row])"
    )
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(loss) for loss in re.findall(r"[\d.]+", done.stdout.split("losses")[1])]
    assert losses[-1] < losses[0] - 0.5
