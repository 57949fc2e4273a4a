"""What llama.cpp asks of every model whose blocks are a state space alone."""

from typing import Any


def state_space_metadata(config: Any, g: Any, inner: int, named: str, time_step_rank: int) -> dict[str, Any]:
    """The values by the names of gguf's GGUFWriter.add_* (llama.cpp's conversion/mamba.py).

    Args:
        g: the geometry of `config`.
        inner: the width of the state space, which the configuration says as `named`.

    Raises:
        ValueError: llama.cpp has no way to say what this model does.
    """
    if inner != 2 * g.hidden_size:
        raise ValueError(f"{named} is {inner}: llama.cpp takes twice hidden_size alone.")
    if config.use_bias:
        raise ValueError("use_bias is true: llama.cpp has no bias of in_proj and out_proj.")
    return {
        "context_length": 2**20,
        "embedding_length": g.hidden_size,
        "feed_forward_length": 0,
        "head_count": 0,
        "block_count": g.num_hidden_layers,
        "ssm_conv_kernel": g.conv_kernel,
        "ssm_inner_size": inner,
        "ssm_state_size": g.state_size,
        "ssm_time_step_rank": time_step_rank,
        "layer_norm_rms_eps": config.layer_norm_epsilon,
    }
