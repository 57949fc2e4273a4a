"""A family of the tests, and the example of CONTRIBUTING: a gated RNN whose layers are narrow and wide in turn.

    h_t = f_t h_{t-1} + (1 - f_t) c_t        f = sigmoid(forget(x)), c = candidate(x), y = back(h)

It is the minimal GRU of Feng et al. 2024 ("Were RNNs All We Needed?"). The row of FAMILIES that makes it known is
`"toy": "toy:FAMILY"`.
"""

from hf_mamba.family import Family, Preset
from hf_mamba.models.common.cost import Backend
from toy.formulas import Geometry, ToyBlockMemory, table, token_flops

FAMILY = Family(
    model_type="toy",
    title="Toy",
    config="toy.modeling:ToyConfig",
    base="toy.modeling:ToyModel",
    model="toy.modeling:ToyForCausalLM",
    geometry=Geometry.of,
    table=table,
    token_flops=token_flops,
    block=ToyBlockMemory,
    backends={"torch": Backend()},
    embedding="body.tokens.weight",
    head="readout.weight",
    state_sizes=("hidden_size", "num_hidden_layers"),
    presets={
        "tiny_toy": Preset(
            "tiny_toy",
            {"model_type": "toy", "hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 320},
            seq_len=48,
            micro_batch_size=8,
            gradient_accumulation_steps=1,
            max_tokens=20 * 8 * 48,
            learning_rate=4e-3,
            source="ours: seconds on a CPU",
        )
    },
    lora_targets=("forget", "candidate", "back"),
    blocks=("ToyBlock",),
    tags=("recurrent",),
)
