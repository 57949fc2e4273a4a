"""FSDP as accelerate has it in the started process: held against the plan, and the residual stream kept in fp32."""

from typing import Any

from torch.distributed.fsdp import MixedPrecisionPolicy


def keep_residual(plugin: Any) -> None:
    """Leave what goes into and out of a block in its own precision; accelerate's policy casts it to the weights'.

    The residual stream is fp32 then, as under DeepSpeed and autocast. Call it before the model is prepared.
    """
    policy = plugin.mixed_precision_policy
    if plugin.fsdp_version == 2 and policy is not None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=policy.param_dtype, reduce_dtype=policy.reduce_dtype, cast_forward_inputs=False
        )
