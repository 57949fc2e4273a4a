"""The named sizes of Mamba-2 with their published training numbers."""

from typing import Any

from hf_mamba.family import Preset

_SCALING_LAWS = (
    "sizes: state-spaces/mamba2-*; numbers: Mamba's scaling laws, which Dao & Gu 2024 keep (Gu & Dao 2023, table 12: "
    "the Pile, 0.5M-token batches, five times GPT-3's rate)"
)


def _size(d: int, layers: int, vocabulary: int = 50288) -> dict[str, Any]:
    return {
        "model_type": "mamba2",
        "hidden_size": d,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "num_heads": "auto",
        "n_groups": 1,
        "tie_word_embeddings": True,
    }


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "tiny_mamba2",
            _size(192, 4, 4096) | {"head_dim": 32, "state_size": 64},
            seq_len=256,
            micro_batch_size=8,
            gradient_accumulation_steps=1,
            max_tokens=614_400,
            learning_rate=4e-3,
            source="ours: a minute or two on two CPU cores",
            ranks=1,
        ),
        Preset("130m_mamba2", _size(768, 24), 2048, 8, 4, 4_800 * 2**19, 3e-3, _SCALING_LAWS),
        Preset("370m_mamba2", _size(1024, 48), 2048, 8, 4, 13_500 * 2**19, 1.5e-3, _SCALING_LAWS),
        Preset("780m_mamba2", _size(1536, 48), 2048, 8, 4, 29_000 * 2**19, 1.25e-3, _SCALING_LAWS),
        Preset("1.3b_mamba2", _size(2048, 48), 2048, 4, 8, 50_000 * 2**19, 1e-3, _SCALING_LAWS),
        Preset(
            "2.7b_mamba2",
            _size(2560, 64),
            2048,
            4,
            16,
            300_000_000_000,
            4.8e-4,
            "size: state-spaces/mamba2-2.7b; numbers: Gu & Dao 2023, appendix E.2 (300B tokens of the Pile)",
        ),
    )
}
