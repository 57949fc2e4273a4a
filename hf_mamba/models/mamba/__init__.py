"""Mamba-1 (Gu & Dao 2023), `model_type` "mamba": its mixer, formulas, sizes and original format."""

from hf_mamba.family import Family
from hf_mamba.models.mamba.memory import BACKENDS, MambaBlockMemory
from hf_mamba.models.mamba.original import ORIGINAL
from hf_mamba.models.mamba.presets import PRESETS
from hf_mamba.models.mamba.table import Geometry, table, token_flops

FAMILY = Family(
    model_type="mamba",
    title="Mamba",
    config="hf_mamba.models.mamba.configuration_mamba:MambaConfig",
    base="hf_mamba.models.mamba.modeling_mamba:MambaModel",
    model="hf_mamba.models.mamba.modeling_mamba:MambaForCausalLM",
    classifier="hf_mamba.models.mamba.modeling_mamba:MambaForSequenceClassification",
    gguf="hf_mamba.models.mamba.gguf:GGUF",
    geometry=Geometry.of,
    table=table,
    token_flops=token_flops,
    block=MambaBlockMemory,
    backends=BACKENDS,
    embedding="backbone.embeddings.weight",
    head="lm_head.weight",
    state_sizes=("num_hidden_layers", "intermediate_size", "conv_kernel", "state_size"),
    auto_sizes=("time_step_rank",),
    operation=lambda g: ("selective_scan", {"states": g.state_size}),
    presets=PRESETS,
    original=ORIGINAL,
    lora_targets=("in_proj", "x_proj", "out_proj"),
    blocks=("MambaBlock",),
    paper="Gu & Dao, 2023",
    tags=("mamba", "state-space-model"),
)
