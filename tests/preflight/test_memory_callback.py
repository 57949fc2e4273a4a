"""The callback in a real Trainer: speed in the log, memory after the first steps and at the end, the record."""

import torch
from transformers import Trainer, TrainerState, TrainingArguments

from hf_mamba import MambaConfig, MambaForCausalLM
from hf_mamba.family import family_of
from hf_mamba.models.mamba.table import Geometry
from hf_mamba.preflight import resolve
from hf_mamba.preflight.cost import duration
from hf_mamba.training.performance import Performance

CONFIG = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 40, "pad_token_id": 0}
STEPS, LENGTH, BATCH, ACCUMULATION = 6, 12, 2, 2


class Tokens(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(LENGTH) + index) % CONFIG["vocab_size"]
        return {"input_ids": ids, "labels": ids}


def planned(**more):
    values = {"model_config": CONFIG, "seq_len": LENGTH, "per_device_train_batch_size": BATCH, "max_steps": STEPS}
    values |= {"gradient_accumulation_steps": ACCUMULATION, "learning_rate": 1e-3, "resume": "never"}
    return resolve(values | more, world_size=1, device="cpu").require()


def test_what_no_formula_is_for_is_not_predicted(capsys):
    """Other optimizers: the measured memory alone is shown."""
    performance = Performance(planned(optim="adafactor"))
    assert performance.report is None
    performance._print_memory(TrainerState(is_world_process_zero=True), "after 3 steps")
    assert "Memory after 3 steps: not predicted" in capsys.readouterr().out


def test_speed_and_memory_of_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_MAMBA_CACHE", str(tmp_path / "cache"))
    performance = Performance(planned())
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=100,
    )
    Trainer(MambaForCausalLM(MambaConfig(**CONFIG)), arguments, train_dataset=Tokens(), callbacks=[performance]).train()
    assert performance.drain()["tokens_per_second"] > 0
    assert performance.drain() == {}, "nothing ran since"
    printed = capsys.readouterr().out
    assert "Time: 6 steps of 48 tokens" in printed
    assert "Duration: unknown" in printed
    assert "Memory after 3 steps: predicted" in printed
    assert "Memory at the end: predicted" in printed
    key = duration.run_key(family_of(CONFIG), Geometry.of(CONFIG), LENGTH, "fp32", False, performance.backend)
    assert duration.recorded(duration.device_name(), key) > 0
