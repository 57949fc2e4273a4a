"""The named sizes of Mamba-1 with their published training numbers."""

from typing import Any

from hf_mamba.family import Preset

_SCALING_LAWS = "Gu & Dao 2023, section 4.2.1 and table 12 (the Pile, 0.5M-token batches, five times GPT-3's rate)"


def _size(d: int, layers: int, **more: Any) -> dict[str, Any]:
    return {"hidden_size": d, "num_hidden_layers": layers, "vocab_size": 50280, **more}


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "tiny_mamba",
            {"hidden_size": 192, "num_hidden_layers": 4, "vocab_size": 4096},
            seq_len=256,
            micro_batch_size=8,
            gradient_accumulation_steps=1,
            max_tokens=614_400,
            learning_rate=4e-3,
            source="ours: a minute or two on two CPU cores",
            ranks=1,
        ),
        Preset(
            "minute_mamba",
            {"hidden_size": 192, "num_hidden_layers": 1, "vocab_size": 4096},
            seq_len=256,
            micro_batch_size=8,
            gradient_accumulation_steps=1,
            max_tokens=2**20,
            learning_rate=2e-2,
            source="ours: the least loss after a minute on two CPU cores",
            warmup_ratio=0.05,
            lr_scheduler_type="linear",
            optim="muon",
            ranks=1,
            logging_steps=25,
            evaluations=5,
            guides=False,
        ),
        Preset("130m_mamba", _size(768, 24), 2048, 8, 4, 4_800 * 2**19, 3e-3, _SCALING_LAWS),
        Preset("370m_mamba", _size(1024, 48), 2048, 8, 4, 13_500 * 2**19, 1.5e-3, _SCALING_LAWS),
        Preset("790m_mamba", _size(1536, 48), 2048, 8, 4, 29_000 * 2**19, 1.25e-3, _SCALING_LAWS),
        Preset("1.4b_mamba", _size(2048, 48), 2048, 4, 8, 50_000 * 2**19, 1e-3, _SCALING_LAWS),
        Preset(
            "2.8b_mamba",
            _size(2560, 64),
            2048,
            4,
            16,
            300_000_000_000,
            4.8e-4,
            "Gu & Dao 2023, section 4.2.2 and appendix E.2 (300B tokens of the Pile)",
        ),
        Preset(
            "7b_mamba",
            # 4864 × 45, every dimension a multiple of 8: 6,893,552,640 parameters
            {"hidden_size": 4864, "num_hidden_layers": 45, "vocab_size": 52904, "time_step_rank": 256},
            2048,
            4,
            8,
            140_000_000_000,
            6.4e-4,
            "rate, decay and schedule: Falcon-Mamba 7B (Zuo et al. 2024); 20 tokens a parameter (Hoffmann et al. 2022)",
            lr_scheduler_type="warmup_stable_decay",
        ),
    )
}
