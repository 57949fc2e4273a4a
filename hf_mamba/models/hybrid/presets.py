"""The named sizes of hybrids."""

from typing import Any

from hf_mamba.family import Preset

_GRANITE = (
    "size: ibm-granite/granite-4.0-h-{}; its training numbers are not published: rate, batch and budget are those of "
    "Mamba's scaling laws at this size (Gu & Dao 2023, table 12)"
)
_VOCABULARY = 100_352  # granite-4.0's, a multiple of 8 and of 128


def _size(
    d: int, layers: int, attention: tuple[int, ...], heads: tuple[int, int], mlp: int, head: int
) -> dict[str, Any]:
    """Fields of a model whose attention layers are these, with `head` as the width of its Mamba-2 heads."""
    return {
        "model_type": "granitemoehybrid",
        "hidden_size": d,
        "num_hidden_layers": layers,
        "layer_types": ["attention" if i in attention else "mamba" for i in range(layers)],
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "shared_intermediate_size": mlp,
        "mamba_n_heads": "auto",
        "mamba_d_head": head,
        "mamba_d_state": 128,
        "vocab_size": _VOCABULARY,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "tiny_hybrid",
            _size(192, 4, (2,), (6, 2), 384, 32) | {"mamba_d_state": 64, "vocab_size": 4096},
            seq_len=256,
            micro_batch_size=8,
            gradient_accumulation_steps=1,
            max_tokens=614_400,
            learning_rate=4e-3,
            source="ours: a minute or two on two CPU cores",
            ranks=1,
        ),
        Preset(
            "350m_hybrid",
            _size(768, 32, (10, 13, 17, 27), (12, 4), 2048, 32),
            2048,
            8,
            4,
            13_500 * 2**19,
            1.5e-3,
            _GRANITE.format("350m"),
        ),
        Preset(
            "1b_hybrid",
            _size(1536, 40, (5, 15, 25, 35), (12, 4), 4096, 64),
            2048,
            4,
            8,
            50_000 * 2**19,
            1e-3,
            _GRANITE.format("1b"),
        ),
        Preset(
            "7b_hybrid",
            # readers such as vLLM serve no longer a context than a file says, though nothing here has positions
            _size(4096, 32, (4, 12, 20, 28), (32, 8), 9216, 64) | {"max_position_embeddings": 4096},
            4096,
            1,
            16,
            140_000_000_000,
            3e-4,
            "size: ours, one attention layer in eight as in Jamba; rate: Bamba-9B's; budget: 20 tokens a parameter",
        ),
    )
}
