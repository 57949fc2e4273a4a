"""trl's trainers take two steps on a tiny model, whole and with LoRA, and begin at the loss that theory names."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from hf_mamba import register, unregister
from hf_mamba.family import get_family

trl = pytest.importorskip("trl", reason="trl is not installed (pip install .[test])")
peft = pytest.importorskip("peft", reason="peft is not installed (pip install .[test])")

PROMPTS = ["the cat", "a dog", "the dog", "the"]
ANSWERS = ["sat on a mat", "ran", "sat", "cat"]
OTHERS = ["ran a", "mat mat", "and and", "on on"]
PREFERENCES = {"prompt": PROMPTS, "chosen": ANSWERS, "rejected": OTHERS}
JUDGED = {"prompt": PROMPTS, "completion": ANSWERS, "label": [True, True, False, False]}
SAMPLED = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1, "generation_kwargs": {"min_new_tokens": 4}}

# name: settings, data, first loss. A policy that equals its reference has no margin: log 2 for DPO, 1/2 for KTO; the
# advantages of a group, whose answers are of one length, and its first divergence add up to 0.
CASES = {
    "SFT": ({"padding_free": True, "max_length": None}, {"text": ANSWERS}, None),
    "DPO": ({}, PREFERENCES, math.log(2)),
    "KTO": ({}, JUDGED, 0.5),
    "GRPO": (SAMPLED, {"prompt": PROMPTS}, 0.0),
    "RLOO": (SAMPLED, {"prompt": PROMPTS}, 0.0),
}


SIZES = {
    "mamba": {"state_size": 4},
    "mamba2": {"state_size": 4, "num_heads": 4, "head_dim": 16, "n_groups": 1},
    "granitemoehybrid": {
        "mamba_d_state": 4, "mamba_n_heads": 4, "mamba_d_head": 16, "num_attention_heads": 4, "num_key_value_heads": 2,
        "shared_intermediate_size": 32,
    },
}  # fmt: skip
RUNS = [("mamba", name, lora) for name in CASES for lora in (False, True)]
RUNS += [(kind, name, True) for kind in ("mamba2", "granitemoehybrid") for name in ("SFT", "DPO", "GRPO")]


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Saved models: trl loads its references by name, as the stock class."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in SIZES}
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": len(tokenizer), "initializer_range": 0.05}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    for kind, folder in folders.items():
        family = get_family(kind)
        family.model_class(family.config_class(**sizes, **ids, **SIZES[kind])).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    register()
    yield folders
    unregister()


@pytest.mark.parametrize(("kind", "name", "lora"), RUNS)
def test_a_trainer_takes_its_first_steps(kind: str, name: str, lora: bool, folders, tokenizer, tmp_path: Path):
    settings, data, first_loss = CASES[name]
    arguments = getattr(trl, f"{name}Config")(
        output_dir=str(tmp_path), max_steps=2, report_to=[], use_cpu=True, bf16=False, logging_steps=1,
        save_strategy="no", per_device_train_batch_size=2, learning_rate=1e-2, disable_tqdm=True, **settings,
    )  # fmt: skip
    model = get_family(kind).model_class.from_pretrained(folders[kind])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rewards = {"reward_funcs": lambda completions, **_: [float(i) for i in range(len(completions))]}
    trainer = getattr(trl, f"{name}Trainer")(
        model, args=arguments, train_dataset=Dataset.from_dict(data), processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=2) if lora else None, **(rewards if settings is SAMPLED else {}),
    )  # fmt: skip
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    if first_loss is not None:
        assert losses[0] == pytest.approx(first_loss, abs=1e-3)
    moved = {n for n, p in model.named_parameters() if n in before and not torch.equal(p, before[n])}
    assert not moved if lora else len(moved) > len(before) // 2
    adapters = [p for n, p in model.named_parameters() if "lora_B" in n]
    assert not lora or adapters
    assert all(p.abs().sum() > 0 for p in adapters)
