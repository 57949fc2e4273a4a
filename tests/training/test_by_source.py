"""The evaluation's loss and the losses of the sources, against sums that are computed another way."""

import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from runs import ROOT, Launcher, held, kill, log_lines, wait_for
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hf_mamba.data import EvalDataset, StepSampler, prepare_data
from hf_mamba.data.dataset import ArrayStream
from hf_mamba.run.log import read_log
from hf_mamba.training.by_source import SHOWN, LossBySource, short_names
from hf_mamba.training.evaluation import bytes_per_token

SETTINGS = {
    "max_steps": 4,
    "logging_steps": 2,
    "learning_rate": 0.0,
    "min_lr": 0.0,
    "save_strategy": "no",
    "eval_fraction": 0.2,
}


@pytest.fixture(scope="module")
def sources(launcher: Launcher) -> list[str]:
    other = launcher.folder / "sums.jsonl"
    texts = [f"{i} and {j} make {i + j}. " * (1 + (i + j) % 7) for i in range(13) for j in range(9)]
    other.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return [f"{launcher.corpus}:0.6", f"{other}:0.4"]


class Sums:
    """(loss, predictions, logsumexp²) of a row, from the whole float64 logits of transformers' model, by documents."""

    def __init__(self, run: Path, sources: list[str], cache: Path):
        model = run / "model"  # at a rate of 0 it is what every step saw
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
        tokenizer = AutoTokenizer.from_pretrained(model)
        options = {"tokenizer": tokenizer, "seq_len": 48, "seed": 42, "eval_fraction": 0.2, "cache_dir": cache}
        self.data = prepare_data(sources, **options)

    @torch.no_grad()
    def of(self, row: dict[str, torch.Tensor]) -> torch.Tensor:
        total, count, squares = 0.0, 0, 0.0
        for document in row["seq_idx"].unique():
            inside = row["seq_idx"] == document
            tokens, targets = row["input_ids"][inside], row["labels"][inside][1:]
            logits = self.model(tokens[None]).logits[0, :-1].double()
            scores, kept = logits.log_softmax(-1), targets != -100
            total -= float(scores[torch.arange(len(targets)), targets.clamp(min=0)][kept].sum())
            count += int(kept.sum())
            squares += float(logits.logsumexp(-1)[kept].square().sum())
        return torch.tensor([total, count, squares], dtype=torch.float64)


@pytest.fixture(scope="module")
def sums(launcher: Launcher, sources: list[str]) -> Sums:
    launcher.run("sums-1", dataset=sources, per_device_eval_batch_size=4, **SETTINGS)
    return Sums(launcher.folder / "sums-1", sources, launcher.folder / "sums-cache")


ENGINES = {
    "sums-1": None,
    "sums-ddp": {"micro_batch_size": 2},
    "sums-zero3": {"deepspeed": str(ROOT / "ds_configs" / "zero3.json")},
}


@pytest.mark.parametrize("name", ENGINES)
def test_every_prediction_counts_the_same(launcher: Launcher, sources: list[str], sums: Sums, name: str):
    """One process and two, whose batches do not come out even; and in training, with accumulation and without."""
    folder, train, rows = launcher.folder / name, sums.data.train, sums.data.eval
    if ENGINES[name] is not None:
        launcher.run(folder, 2, dataset=sources, per_device_eval_batch_size=2, **SETTINGS, **ENGINES[name])
    assert len(rows) % 4 in (1, 2)  # one process: a short batch; two: one without rows for the second
    expected = defaultdict(lambda: torch.zeros(3, dtype=torch.float64))
    names = ["corpus.jsonl", "sums.jsonl"]
    for number in range(len(rows)):
        of_row = sums.of(rows[number])
        for key in ("", "/" + names[rows.source_of(number)]):
            expected[f"eval_loss{key}", 4] += of_row
    sampler = StepSampler(micro_batch_size=8)
    for step in range(4):
        for sample in sampler.samples(step):
            expected[f"loss/{names[train.source_of(sample)]}", 2 + step // 2 * 2] += sums.of(train[sample])
    assert len(expected) == 3 + 4
    for (key, step), (loss, count, _) in expected.items():
        assert log_lines(folder, key)[step] == pytest.approx(float(loss / count), rel=2e-6), (key, step)
    assert log_lines(folder, "eval_perplexity")[4] == pytest.approx(math.exp(log_lines(folder, "eval_loss")[4]))


def test_the_z_loss_is_in_the_training_loss_and_nowhere_else(launcher: Launcher, sources: list[str], sums: Sums):
    """Two micro-batches a step; the model is that of the run without it, since neither learns."""
    folder, plain, weight = launcher.folder / "z-loss", launcher.folder / "sums-1", 0.125
    launcher.run(folder, dataset=sources, z_loss=weight, micro_batch_size=4, **SETTINGS)
    assert json.loads((folder / "plan.json").read_text())["z_loss"] == weight
    sampler, found = StepSampler(micro_batch_size=8), log_lines(folder, "loss")
    for last in (1, 3):
        steps = []
        for step in (last - 1, last):
            loss, count, squares = sum(sums.of(sums.data.train[sample]) for sample in sampler.samples(step))
            steps.append(float(loss + weight * squares) / float(count))
        assert found[last + 1] == pytest.approx(sum(steps) / 2, rel=2e-6)
    for key in ("eval_loss", "loss/corpus.jsonl", "loss/sums.jsonl"):
        assert log_lines(folder, key) == pytest.approx(log_lines(plain, key), rel=2e-6)
    assert all(a > b for a, b in zip(found.values(), log_lines(plain, "loss").values(), strict=True))


@pytest.mark.parametrize("world", [1, 2])
def test_a_kill_between_two_log_lines_loses_no_loss(launcher: Launcher, sources: list[str], world: int):
    settings = {"dataset": sources, "save_steps": 3, "logging_steps": 5, "max_steps": 10}
    whole, parts = (launcher.folder / f"by-source-{world}-{name}" for name in ("whole", "parts"))
    launcher.run(whole, world, **settings)
    launch = launcher.start(parts, world, patch=held("training_step", 4), **settings)
    wait_for(lambda: (parts / "checkpoint-3").is_dir())
    kill(launch)
    launcher.run(parts, world, **settings)
    key = "loss/corpus.jsonl"
    assert log_lines(parts, key) == log_lines(whole, key)
    assert sorted(log_lines(whole, key)) == [5, 10]


def test_the_loss_of_own_evaluation_data_is_their_weighted_mean(launcher: Launcher, sums: Sums, tmp_path: Path):
    """Weights and columns of their own; each source's documents in rows of their own, by transformers in float64."""
    texts = [["one two three. " * n for n in range(1, 9)], [f"{n} times {n} " * 5 for n in range(30)]]
    for name, column, lines in zip("ab", ("body", "talk"), texts, strict=True):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({column: line}) for line in lines))
    named = [f"{tmp_path}/a.jsonl@body:3", f"{tmp_path}/b.jsonl@talk:1"]
    settings = SETTINGS | {"eval_fraction": None, "eval_dataset": named, "sample_prompt": ""}
    launcher.run(tmp_path / "run", 2, dataset=str(launcher.corpus), per_device_eval_batch_size=2, **settings)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    means = []
    for lines in texts:
        total, count = 0.0, 0
        ids = [(n, i) for n, line in enumerate(lines) for i in [*tokenizer(line)["input_ids"], tokenizer.eos_token_id]]
        for start in range(0, len(ids), 48):  # a row, whose documents are told apart
            row = ids[start : start + 48]
            for document in {n for n, _ in row}:
                tokens = torch.tensor([i for n, i in row if n == document])
                with torch.no_grad():
                    scores = model(tokens[None]).logits[0, :-1].log_softmax(-1)
                total -= float(scores[torch.arange(len(tokens) - 1), tokens[1:]].sum())
                count += len(tokens) - 1
        means.append(total / count)
    found = {key: log_lines(tmp_path / "run", f"eval_loss{key}")[4] for key in ("", "/a.jsonl", "/b.jsonl")}
    assert [found["/a.jsonl"], found["/b.jsonl"]] == pytest.approx(means, rel=2e-6)
    assert found[""] == pytest.approx((3 * means[0] + means[1]) / 4, rel=2e-6)


def test_a_line_names_the_largest_of_many_sources():
    """The same ones on every line, also after a resume; the others count as one, and nothing is lost of the mean."""
    sizes = [1 + number % 50 for number in range(3000)]
    labels = torch.ones(1, 9, dtype=torch.long)

    def fill(losses: LossBySource, shift: float) -> None:
        for number, size in enumerate(sizes):
            labels[:] = -100
            labels[:, 1 : 1 + size % 9] = 1
            losses.add((labels[:, 1:] != -100) * (shift + number), labels, torch.tensor([number]))

    names = [f"{number}.jsonl" for number in range(3000)]
    losses, resumed = (LossBySource(names, torch.device("cpu")) for _ in range(2))
    fill(losses, 1.0)
    first = losses.drain()
    resumed.load_state_dict(losses.state_dict())
    fill(losses, 2.0)
    fill(resumed, 2.0)
    second = losses.drain()
    assert second == resumed.drain()
    assert list(first.shown) == list(second.shown)
    assert len(first.shown) == SHOWN
    assert list(first.shown)[-1] == f"the other {3001 - SHOWN} sources"
    counts = [size % 9 for size in sizes]
    largest = [counts[names.index(name)] for name in list(first.shown)[:-1]]
    assert min(largest) == max(counts)
    told = sum(first.shown[name] * 8 for name in list(first.shown)[:-1])
    told += first.shown[f"the other {3001 - SHOWN} sources"] * (sum(counts) - 8 * len(largest))
    assert told / sum(counts) == pytest.approx(first.mean)


def test_names_of_sources_are_as_short_as_tells_them_apart():
    assert short_names(["/a/b.jsonl", "c/d/*.parquet"]) == ["b.jsonl", "*.parquet"]
    assert short_names(["/a/x.jsonl", "/b/x.jsonl", "embedded"]) == ["a/x.jsonl", "b/x.jsonl", "embedded"]
    assert short_names(["/x.jsonl", "x.jsonl"]) == ["/x.jsonl", "x.jsonl"]
    assert short_names([""]) == [""]


def test_the_bytes_of_a_token_are_those_of_the_text():
    """A tokenizer of bytes: every document is its bytes and one token for its end, and bits per byte follow."""
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(sorted(letters))}, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    texts = ["one  line\n", "Δ_t = softplus(Δ)", "", "世界 , . ' s"]
    documents = [np.array([*tokenizer(text)["input_ids"], tokenizer.eos_token_id]) for text in texts]
    assert [len(document) for document in documents] == [len(text.encode()) + 1 for text in texts]
    rows = EvalDataset([ArrayStream(documents)], seq_len=8, pad_id=0)
    size = sum(len(text.encode()) for text in texts)
    assert bytes_per_token(rows, tokenizer) == size / (size + len(texts))


def test_bits_per_byte_stand_in_the_log(launcher: Launcher, sums: Sums):
    log = read_log(launcher.folder / "sums-1")
    losses = {row["step"]: row["eval_loss"] for row in log if "eval_loss" in row}
    bits = {row["step"]: row["eval_bits_per_byte"] for row in log if "eval_loss" in row}
    tokenizer = AutoTokenizer.from_pretrained(launcher.folder / "sums-1" / "model")
    assert sums.data.eval is not None
    for step, loss in losses.items():
        assert bits[step] == pytest.approx(loss / math.log(2) / bytes_per_token(sums.data.eval, tokenizer))
