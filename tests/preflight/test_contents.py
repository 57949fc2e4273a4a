"""What a run reads is looked at before it starts: weights, tokenizer, data and the ids in them."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_mamba import MambaConfig, MambaForCausalLM
from hf_mamba.data import parse_sources, train_tokenizer
from hf_mamba.findings import Findings
from hf_mamba.preflight import resolve
from hf_mamba.preflight.contents import check_contents


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 300 tokens, models of 304 rows whole and damaged, text and ids."""
    folder = tmp_path_factory.mktemp("there")
    rows = [json.dumps({"body": f"document {i} of words {i * i}"}) for i in range(50)]
    (folder / "a.jsonl").write_text("\n".join(rows))
    tokenizer = train_tokenizer(parse_sources([f"{folder}/a.jsonl@body"]), 300, cache_dir=folder / "cache")
    tokenizer.save_pretrained(folder / "tok")
    config = MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, vocab_size=304)
    MambaForCausalLM(config).save_pretrained(folder / "whole")
    for name in ("other_sizes", "cut", "fewer"):
        shutil.copytree(folder / "whole", folder / name)
    fields = json.loads((folder / "whole" / "config.json").read_text())
    (folder / "other_sizes" / "config.json").write_text(json.dumps(fields | {"state_size": 8}))
    (folder / "fewer" / "config.json").write_text(json.dumps(fields | {"num_hidden_layers": 3}))
    (folder / "cut" / "model.safetensors").write_bytes((folder / "whole" / "model.safetensors").read_bytes()[:-9])
    for name, ids in (("ids", [[1, 2], [3]]), ("rows", [[1, 2], [3, 4]]), ("foreign", [[1, 2], [3, 304]])):
        pq.write_table(pa.table({"input_ids": ids}), folder / f"{name}.parquet")
    (folder / "damaged.parquet").write_bytes(b"PAR1 and no more")
    return folder


def found(there: Path, **arguments: Any) -> Findings:
    given = {"preset": "tiny_mamba", "max_steps": 4, "output_dir": str(there / "run"), "vocab_size": 304}
    given |= {"tokenizer_name": str(there / "tok"), "dataset": [f"{there}/a.jsonl@body"], **arguments}
    out = Findings()
    plan = resolve({k: v for k, v in given.items() if v is not None}, environ={}, device="cpu", world_size=1)
    check_contents(plan.require(), out)
    return out


@pytest.mark.parametrize(
    ("arguments", "key", "why"),
    [
        ({"model_name_or_path": "other_sizes"}, "model_name_or_path", "tensors of another shape"),
        ({"model_name_or_path": "fewer"}, "model_name_or_path", "lacks 10 of"),
        ({"model_name_or_path": "cut"}, "model_name_or_path", "model.safetensors"),
        ({"model_name_or_path": "owner/nothing-here"}, "model_name_or_path", None),
        ({"vocab_size": 288}, "vocab_size", "Some tokens would have no row"),
        ({"dataset": ["a.jsonl"]}, "dataset", "no column 'text'; the columns there are: body; did you mean 'body'?"),
        ({"eval_dataset": ["a.jsonl"]}, "eval_dataset", "no column 'text'"),
        ({"dataset": ["owner/nothing"]}, "dataset", "as a hub data set it cannot be loaded"),
        ({"dataset": ["foreign.parquet"]}, "dataset", "row 1: id 304 is not one of the tokenizer's"),
        ({"dataset": ["ids.parquet"], "tokenizer_name": None}, "dataset", "these are ids; name the tokenizer"),
        ({"tokenizer_name": "owner/nothing"}, "tokenizer_name", "cannot be loaded"),
    ],
)
def test_what_would_end_the_run_is_a_problem_before_it(there: Path, arguments: dict[str, Any], key: str, why: str):
    here = {
        name: [f"{there}/{v}" if "." in v else v for v in value]
        if isinstance(value, list)
        else f"{there}/{value}"
        if isinstance(value, str) and "/" not in value
        else value
        for name, value in arguments.items()
    }
    if key == "model_name_or_path":
        here |= {"vocab_size": None, "preset": None}
    if why is None:  # a name of the Hub without its configuration is refused with the arguments
        with pytest.raises(ValueError, match="Its configuration cannot be read"):
            found(there, **here)
        return
    (problem,) = found(there, **here).problems
    assert problem.key == key
    assert why in problem.why


def test_what_can_be_used_is_no_problem_and_ids_are_a_note(there: Path):
    for arguments in ({}, {"model_name_or_path": str(there / "whole"), "preset": None, "vocab_size": None}):
        out = found(there, **arguments)
        assert (out.problems, out.notes) == ([], [])
    (note,) = found(there, dataset=[f"{there}/ids.parquet"]).notes
    assert "each record is a document" in note
    (note,) = found(there, dataset=[f"{there}/rows.parquet"]).notes
    assert "rows of 2 ids: they are taken as they are" in note
    assert not found(there, dataset=[f"{there}/damaged.parquet", f"{there}/a.jsonl@body"]).problems  # counted later


def test_nothing_is_looked_at_where_the_run_is_elsewhere(there: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    plan = resolve(
        {"preset": "tiny_mamba", "max_steps": 4, "dataset": [f"{there}/a.jsonl"], "num_gpus": 2, "use_cpu": True},
        environ={},
    ).require()
    out = Findings()
    check_contents(plan, out)
    assert not out.problems


def test_sentencepiece_folders_are_converted_or_say_what_to_install(there: Path, tmp_path: Path):
    folder = tmp_path / "llama"
    folder.mkdir()
    if importlib.util.find_spec("sentencepiece") is None:
        (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
        with pytest.raises(ValueError, match="pip install sentencepiece protobuf"):
            found(there, tokenizer_name=str(folder))
        return
    import sentencepiece

    texts = [json.loads(line)["body"] for line in (there / "a.jsonl").read_text().splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(folder / "tokenizer"), vocab_size=60, model_type="bpe"
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    )
    out = found(there, tokenizer_name=str(folder))
    assert not out.problems
    from hf_mamba.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in texts:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == theirs.encode(text)
    tokenizer.save_pretrained(tmp_path / "exported")
    assert (tmp_path / "exported" / "tokenizer.json").exists()
