"""Mamba-2 (Dao & Gu 2024), `model_type` "mamba2": its mixer, formulas, sizes and original format."""

from hf_mamba.family import Family
from hf_mamba.models.mamba2.memory import BACKENDS, Mamba2BlockMemory
from hf_mamba.models.mamba2.original import ORIGINAL
from hf_mamba.models.mamba2.presets import PRESETS
from hf_mamba.models.mamba2.table import Geometry, table, token_flops

FAMILY = Family(
    model_type="mamba2",
    title="Mamba-2",
    config="hf_mamba.models.mamba2.configuration_mamba2:Mamba2Config",
    base="hf_mamba.models.mamba2.modeling_mamba2:Mamba2Model",
    model="hf_mamba.models.mamba2.modeling_mamba2:Mamba2ForCausalLM",
    classifier="hf_mamba.models.mamba2.modeling_mamba2:Mamba2ForSequenceClassification",
    gguf="hf_mamba.models.mamba2.gguf:GGUF",
    geometry=Geometry.of,
    table=table,
    token_flops=token_flops,
    block=Mamba2BlockMemory,
    backends=BACKENDS,
    embedding="backbone.embeddings.weight",
    head="lm_head.weight",
    state_sizes=("num_hidden_layers", "num_heads", "head_dim", "n_groups", "conv_kernel", "state_size"),
    auto_sizes=("num_heads",),
    operation=lambda g: ("ssd", {"states": g.state_size, "width": g.head_dim, "rated": True}),
    presets=PRESETS,
    original=ORIGINAL,
    lora_targets=("in_proj", "out_proj"),
    blocks=("Mamba2Block",),
    paper="Dao & Gu, 2024",
    tags=("mamba2", "state-space-model"),
)
