"""Names of the Hub are looked at before a run starts: a tokenizer, a model, and what is not there."""

from collections.abc import Callable
from pathlib import Path

from hub_server import Commit, Hub, Repository
from transformers import PreTrainedTokenizerFast

PLANS = """
from hf_mamba import cli
for flags in {flags!r}:
    print("###", flush=True)
    cli.main(["preflight", "--use_cpu", "true", "--max_steps", "2", "--seq_len", "16", *flags])
"""


def repository(folder: Path) -> Repository:
    found = Repository(False)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    found.branches["main"].append(Commit("files", files, set()))
    return found


def test_names_of_the_hub_are_looked_at(
    stock_folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, run_python: Callable[..., str]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((stock_folder / "config.json").read_bytes())
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    own = ["--output_dir", str(tmp_path / "run")]
    lines = [
        ["--tokenizer_name", "tester/tokenizer", "--vocab_size", "16", *own],
        ["--tokenizer_name", "tester/tokenizer", "--vocab_size", "8", *own],
        ["--model_name_or_path", "tester/whole", *own],
        ["--model_name_or_path", "tester/bare", "--tokenizer_name", "tester/tokenizer", *own],
        ["--tokenizer_name", "tester/none", *own],
    ]
    with Hub() as hub:
        hub.repositories["tester/tokenizer"] = repository(tmp_path / "tokenizer")
        hub.repositories["tester/whole"] = repository(stock_folder)
        hub.repositories["tester/bare"] = repository(bare)
        said = run_python(PLANS.format(flags=lines), HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0")
    there, few, whole, bare_said, none = said.split("###")[1:]
    assert "Documents end with <eos>" in there
    assert there.rstrip().endswith("ready to start")
    assert "8 rows of the embedding and 16 tokens of tester/tokenizer" in few
    assert whole.rstrip().endswith("ready to start")
    assert "It holds no weights" in bare_said
    assert "tester/none" in none
    assert "not started: 1 problem" in none
