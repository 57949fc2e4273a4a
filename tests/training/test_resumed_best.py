"""What Trainer says and remembers at a resume: tensors that are missing, the best checkpoint of a folder that moved."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import TrainerState, TrainingArguments

from hf_mamba import MambaConfig, MambaForCausalLM
from hf_mamba.private.trainer import OpenTrainer
from hf_mamba.training.trainer import MambaTrainer


@pytest.mark.parametrize(("tied", "left_out", "said"), [(True, "", ""), (False, "lm_head.weight", "lm_head.weight")])
def test_a_tied_head_is_not_missed_and_an_untied_one_is(
    tied: bool, left_out: str, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, tie_word_embeddings=tied)
    model = MambaForCausalLM(config)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in weights) is not tied
    weights.pop(left_out, None)
    trainer = OpenTrainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING, "transformers.trainer"):
        trainer._issue_warnings_after_load(model.load_state_dict(weights, strict=False))
        assert (said in caplog.text) if said else not caplog.text
        weights.pop("backbone.layers.0.mixer.D")
        trainer._issue_warnings_after_load(model.load_state_dict(weights, strict=False))
    assert "backbone.layers.0.mixer.D" in caplog.text


@pytest.mark.parametrize("removed", [False, True])
def test_a_folder_that_was_moved_finds_its_best_checkpoint(removed: bool, tmp_path: Path) -> None:
    """`load_best_model_at_end` and the rotation both go by the name in trainer_state.json."""
    before, now = tmp_path / "before", tmp_path / "now"
    (before / "checkpoint-4").mkdir(parents=True)
    state = TrainerState(best_global_step=4, best_model_checkpoint=str(before / "checkpoint-4"))
    state.save_to_json(str(before / "checkpoint-4" / "trainer_state.json"))
    before.rename(now)
    state = TrainerState.load_from_json(str(now / "checkpoint-4" / "trainer_state.json"))
    if removed:
        (now / "checkpoint-4" / "trainer_state.json").unlink()
        (now / "checkpoint-4").rmdir()
    trainer: Any = SimpleNamespace(run=SimpleNamespace(folder=now), state=state)
    MambaTrainer.find_best(trainer)
    assert state.best_model_checkpoint == str((before if removed else now) / "checkpoint-4")
