"""`hf-mamba generate`: what it writes is what the model generates, from every kind of folder."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from hf_mamba import MambaForCausalLM, cli
from hf_mamba.family import get_family

PROMPT = "the cat sat"


def written(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert cli.main(["generate", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_it_writes_what_the_model_generates(stock_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = MambaForCausalLM.from_pretrained(stock_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(stock_folder)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])

    def text(**settings: object) -> str:
        torch.manual_seed(3)
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, **settings)
        return tokenizer.decode(made[0], skip_special_tokens=True)

    length = ("--max_new_tokens", 12)
    assert written(capsys, stock_folder, PROMPT, *length, "--temperature", 0).strip() == text(do_sample=False).strip()
    drawn = written(capsys, stock_folder, PROMPT, *length, "--seed", 3, "--temperature", 0.9, "--top_p", 0.95)
    assert drawn.strip() == text(do_sample=True, temperature=0.9, top_p=0.95).strip()
    assert drawn != written(capsys, stock_folder, PROMPT, *length, "--seed", 4, "--temperature", 0.9, "--top_p", 0.95)
    assert PROMPT in drawn


def test_every_family_and_an_empty_prompt(
    tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = get_family("mamba2")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": len(tokenizer), "state_size": 16}
    config = family.config_class(**sizes, head_dim=16, n_groups=1, num_heads=4, expand=2)
    family.model_class(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert written(capsys, tmp_path, "", "--max_new_tokens", 5).strip()
    monkeypatch.setattr("sys.stdin.read", lambda: PROMPT, raising=False)
    assert written(capsys, tmp_path, "-", "--max_new_tokens", 5).startswith(PROMPT)


def test_what_cannot_be_written(stock_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(stock_folder, bare, ignore=shutil.ignore_patterns("tokenizer*", "special_tokens*"))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for words, message in (
        ((bare, PROMPT), "holds no tokenizer"),
        ((tmp_path, PROMPT), "model_type is 'llama'"),
        ((tmp_path / "nowhere", PROMPT), "nowhere"),
        ((stock_folder, PROMPT, "--temperature", "-1"), "temperature"),
    ):
        assert cli.main(["generate", *map(str, words)]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert "Traceback" not in said
