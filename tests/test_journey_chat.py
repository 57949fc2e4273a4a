"""A user's chat data with a tokenizer of their own, through the command line: what is written is what is trained."""

import json
from pathlib import Path

import numpy as np
import pytest
from launching import logged, recipe
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_mamba import MambaConfig, MambaForCausalLM
from hf_mamba.data import TokenShards, parse_sources, train_tokenizer

CHATS = [
    f"<|im_start|>user\nquestion {i} please<|im_end|>\n<|im_start|>assistant\nanswer {7 * i}<|im_end|>"
    for i in range(80)
]


@pytest.fixture(scope="module")
def journey(tmp_path_factory) -> tuple[Path, str]:
    """Two epochs over chats in a column of their own, with a broken line, evaluated on others; the screen."""
    folder = tmp_path_factory.mktemp("chat")
    rows = [json.dumps({"chat": text}) for text in CHATS]
    (folder / "chat.jsonl").write_text("\n".join([*rows, "{broken"]))
    (folder / "held.jsonl").write_text("\n".join(row.replace("chat", "talk") for row in rows[:9]))
    trained = train_tokenizer(parse_sources([f"{folder}/chat.jsonl@chat"]), 300, cache_dir=folder / "first")
    own = PreTrainedTokenizerFast(
        tokenizer_object=trained.backend_tokenizer, bos_token="<s>", additional_special_tokens=["</s>"]
    )
    own.add_special_tokens({"additional_special_tokens": ["</s>", "<|im_start|>", "<|im_end|>"]})
    bos = [("<s>", own.bos_token_id)]
    own.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=bos)
    own.save_pretrained(folder / "tokenizer")
    rows_of = -(-len(own) // 16) * 16
    MambaForCausalLM(
        MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, vocab_size=rows_of)
    ).save_pretrained(folder / "start")
    flags = f"--dataset {folder}/chat.jsonl@chat --eval_dataset {folder}/held.jsonl@talk --seq_len 64 --use_cpu "
    flags += f"--tokenizer_name {folder}/tokenizer --eos_token </s> --model_name_or_path {folder}/start "
    flags += (
        f"--num_train_epochs 2 --global_batch_size 4 --micro_batch_size 4 --logging_steps 1 --output_dir {folder}/run"
    )
    done = recipe("plain", [*flags.split(), "--sample_prompt", "<|im_start|>user"], folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return folder, done.stdout + done.stderr


def shards(folder: Path) -> TokenShards:
    found = [TokenShards(path) for path in (folder / "hf" / "hf_mamba" / "tokens").iterdir()]
    return max(found, key=lambda shards: shards.documents)


def test_the_screen_says_what_was_read_and_how_often_it_is_seen(journey):
    folder, screen = journey
    assert "Documents end with </s> (--eos_token)." in screen
    assert "81 records = 80 kept + 1 left out (1 × invalid JSON)" in screen
    assert f"special tokens in the text: {160:,} × <|im_end|>, {160:,} × <|im_start|>" in screen
    assert "chat.jsonl byte" in screen
    tokens = shards(folder).tokens
    steps = -(-2 * tokens // 256)
    assert f"2 epochs (flag --num_train_epochs) of {tokens} tokens / 256 a step" in screen
    assert json.loads((folder / "run" / "plan.json").read_text())["total_steps"] == steps
    assert f"seen {steps * 256 / tokens:.2f} times" in screen
    assert logged(folder / "run", "epoch")[steps - 1] == pytest.approx(steps * 256 / tokens)
    assert len(logged(folder / "run", "loss")) == steps


def test_what_was_trained_is_what_the_exported_tokenizer_makes_of_a_prompt(journey):
    folder, screen = journey
    tokenizer = AutoTokenizer.from_pretrained(folder / "run" / "model")
    assert tokenizer.eos_token == "</s>"
    read = shards(folder)
    tokens, starts = read.read(0, 0, read.tokens)
    for text, ids in zip(CHATS, np.split(tokens, starts[1:]), strict=True):
        assert ids.tolist() == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert logged(folder / "run", "eval_loss")[-1] > 0
    assert "<|im_start|>" not in screen.rsplit("model:", 1)[1]  # a special token, left out of the sample
    assert "user" in screen.rsplit("model:", 1)[1]
