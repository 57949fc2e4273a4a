"""FSDP as accelerate has it in the started process: held against the plan, and the residual stream kept in fp32."""

from typing import Any

from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

from hf_mamba.findings import PlanError, Problem
from hf_mamba.plan import FsdpPlan

_WRAPPINGS = {
    "transformer_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "size_based_auto_wrap_policy": "SIZE_BASED_WRAP",
}


def read_plugin(plugin: Any) -> FsdpPlan:
    """What accelerate's FullyShardedDataParallelPlugin does, in the words of a plan."""
    second = plugin.fsdp_version == 2
    strategy = None if second else plugin.sharding_strategy.name.lstrip("_")
    policy = getattr(plugin.auto_wrap_policy, "func", plugin.auto_wrap_policy)  # of a partial
    wrapping = _WRAPPINGS.get(getattr(policy, "__name__", ""), "NO_WRAP")
    return FsdpPlan(
        version=plugin.fsdp_version,
        sharding=strategy or ("FULL_SHARD" if plugin.reshard_after_forward else "SHARD_GRAD_OP"),
        offload=isinstance(plugin.cpu_offload, CPUOffloadPolicy) if second else plugin.cpu_offload.offload_params,
        wrapping=wrapping,
        wrapped=list(plugin.transformer_cls_names_to_wrap or []) if wrapping == "TRANSFORMER_BASED_WRAP" else [],
        min_num_params=plugin.min_num_params or 0,
        state_dict_type=plugin.state_dict_type.name,
        activation_checkpointing=bool(plugin.activation_checkpointing),
    )


def check_sharding(accelerator: Any, planned: FsdpPlan | None) -> FsdpPlan | None:
    """What accelerate shards in this process; None where it shards nothing.

    Raises:
        PlanError: (a ValueError) where that is not what was planned.
    """
    sharded = accelerator.distributed_type == "FSDP"
    found = read_plugin(accelerator.state.fsdp_plugin) if sharded else None
    if found is None or planned is None:
        differs = [] if found == planned else [f"FSDP {'on' if found else 'off'}"]
    else:
        unused = {} if found.wrapping == "SIZE_BASED_WRAP" else {"min_num_params": planned.min_num_params}
        own, wanted = vars(found.replace(**unused)), vars(planned)
        differs = [f"{name} {own[name]}, planned {value}" for name, value in wanted.items() if own[name] != value]
    if differs:
        why = "accelerate shards in another way than planned."
        problem = Problem("fsdp", "; ".join(differs), why, "Report this run.", id="accelerate-shards-otherwise")
        raise PlanError((problem,))
    return found


def keep_residual(plugin: Any) -> None:
    """Leave what goes into and out of a block in its own precision; accelerate's policy casts it to the weights'.

    The residual stream is fp32 then, as under DeepSpeed and autocast. Call it before the model is prepared.
    """
    policy = plugin.mixed_precision_policy
    if plugin.fsdp_version == 2 and policy is not None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=policy.param_dtype, reduce_dtype=policy.reduce_dtype, cast_forward_inputs=False
        )
