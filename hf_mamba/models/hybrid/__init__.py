"""Hybrids of Mamba-2 and attention, `model_type` "granitemoehybrid", dense: formulas, model and sizes."""

from hf_mamba.family import Family
from hf_mamba.models.hybrid.memory import HybridBlockMemory
from hf_mamba.models.hybrid.presets import PRESETS
from hf_mamba.models.hybrid.table import Geometry, table, token_flops
from hf_mamba.models.mamba2.memory import BACKENDS

_MODELING = "hf_mamba.models.hybrid.modeling_granitemoehybrid"

FAMILY = Family(
    model_type="granitemoehybrid",
    title="Mamba-2 hybrid",
    config="hf_mamba.models.hybrid.configuration_granitemoehybrid:GraniteMoeHybridConfig",
    base=f"{_MODELING}:GraniteMoeHybridModel",
    model=f"{_MODELING}:GraniteMoeHybridForCausalLM",
    classifier=f"{_MODELING}:GraniteMoeHybridForSequenceClassification",
    gguf="hf_mamba.models.hybrid.gguf:GGUF",
    geometry=Geometry.of,
    table=table,
    token_flops=token_flops,
    block=HybridBlockMemory,
    backends=BACKENDS,
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    state_sizes=(
        "num_hidden_layers",
        "layer_types",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_size",
        "mamba_n_heads",
        "mamba_d_head",
        "mamba_n_groups",
        "mamba_d_conv",
        "mamba_d_state",
    ),
    auto_sizes=("mamba_n_heads", "mamba_d_head"),
    operation=lambda g: ("ssd", {"states": g.mamba_d_state, "width": g.mamba_d_head, "rated": True}),
    presets=PRESETS,
    lora_targets=(
        *("in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj"),
        *("input_linear", "output_linear"),
    ),
    blocks=("GraniteMoeHybridDecoderLayer",),
    paper="Dao & Gu, 2024; the layers of Granite 4",
    tags=("granitemoehybrid", "mamba2", "hybrid", "state-space-model"),
)
