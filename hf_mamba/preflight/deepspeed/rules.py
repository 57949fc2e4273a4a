"""DeepSpeed settings that are each valid and do not go together: what the engine refuses later, or ignores."""

from __future__ import annotations

from importlib.util import find_spec

from hf_mamba.preflight.kinds import show
from hf_mamba.preflight.optimizers import MUON
from hf_mamba.preflight.rules import ZERO, Rule, Run, ds, zero

_CPU_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adagrad")  # accelerate maps these to DeepSpeed's own
HALF_NAMES = {"fp32": ("fp32", "float32"), "bf16": ("bf16", "bfloat16"), "fp16": ("fp16", "float16", "half")}


def _scatters(run: Run) -> bool:
    """Whether gradients are averaged by reduce-scatter, which takes no scaling (zero/stage*.py)."""
    return run.stage >= 2 and bool(run.zero("reduce_scatter", True))


def _with_divisors(number: int) -> str:
    """A number of GPUs with what divides it: "12 GPUs: 2, 3, 4, 6 and 12 divide them"."""
    divisors = [str(n) for n in range(2, number + 1) if number % n == 0]
    listed = " and ".join(filter(None, (", ".join(divisors[:-1]), *divisors[-1:])))
    return f"{number} GPUs: {listed} {'divides' if len(divisors) == 1 else 'divide'} them" if divisors else "1 GPU"


def _needs_path(what: str) -> Rule:
    return Rule(
        f"nvme-path-of-{what}",
        f"{ZERO}.offload_{what}.nvme_path",
        lambda r: r.offloads(what) == "nvme" and not r.zero(f"offload_{what}.nvme_path"),
        "Offloading to NVMe needs a folder on the drive.",
        'Write "nvme_path": "/the/drive".',
        example=zero(3, **{f"offload_{what}": {"device": "nvme"}}),
        mended=zero(3, **{f"offload_{what}": {"device": "nvme", "nvme_path": "/tmp"}}),
    )


def _quantizes(name: str) -> Rule:
    return Rule(
        name.replace("_", "-") + "-needs-stage-3",
        f"{ZERO}.{name}",
        lambda r: r.zero(name) and (r.stage != 3 or r.world.device == "cpu"),
        "ZeRO++ quantization works at stage 3 on GPUs only.",
        "Remove it.",
        example=zero(2, **{name: True}) | {"device": "gpu"},
        mended=zero(3, **{name: True}) | {"device": "gpu"},
    )


def _half_masters(dtype: str) -> Rule:
    return Rule(
        f"{dtype}-masters",
        f"{dtype}.{dtype}_master_weights_and_grads",
        lambda r: (
            r.key(f"{dtype}.{dtype}_master_weights_and_grads")
            and (r.dtype != dtype or r.stage == 0 or (dtype == "fp16" and r.offloads("optimizer") == "none"))
        ),
        f"It keeps the master weights in {dtype}: for a {dtype} run at stage 1 to 3"
        + (" with an offloaded optimizer." if dtype == "fp16" else "."),
        "Remove it.",
        example=ds(**{dtype: {"enabled": False, f"{dtype}_master_weights_and_grads": True}}),
        mended=ds(**{dtype: {"enabled": False}}),
    )


# Monitors of DeepSpeed's own, and the package that each needs.
MONITORS = (("tensorboard", "tensorboard"), ("wandb", "wandb"), ("comet", "comet_ml"))


def _monitor(name: str, package: str) -> Rule:
    return Rule(
        f"{name}-not-installed",
        f"{name}.enabled",
        lambda r: r.key(f"{name}.enabled") and not r.elsewhere and find_spec(package) is None,
        f"The package {package} is not installed.",
        f"pip install {package}, or use --report_to.",
        example=ds(**{name: {"enabled": True}}),
        mended=ds(**{name: {"enabled": False}}),
    )


def _full_eval(dtype: str) -> Rule:
    return Rule(  # transformers/integrations/deepspeed.py compares the block with (dtype or dtype_full_eval)
        f"{dtype}-evaluation-under-deepspeed",
        f"{dtype}_full_eval",
        lambda r: r.settings.get(f"{dtype}_full_eval") and r.dtype != dtype,
        f"Under DeepSpeed the evaluation runs in the run's precision, which is not {dtype}.",
        f"Remove it, or use --{dtype} true.",
        example=ds() | {f"{dtype}_full_eval": True, dtype: False},
        mended=ds() | {f"{dtype}_full_eval": True, dtype: True, "device": "gpu"},
    )


# What DeepSpeed's engine, its ZeRO optimizers or accelerate refuse or ignore, read in the files named.
DEEPSPEED_RULES: tuple[Rule, ...] = (
    Rule(
        "optimizer-offload-needs-a-stage",
        f"{ZERO}.offload_optimizer",
        lambda r: r.offloads("optimizer") != "none" and r.stage == 0,
        "Nothing is partitioned at stage 0, and nothing is offloaded.",
        'Write "stage": 1, 2 or 3, or remove offload_optimizer.',
        example=zero(0, offload_optimizer={"device": "cpu"}),
        mended=zero(1, offload_optimizer={"device": "cpu"}),
    ),
    *(_needs_path(name) for name in ("optimizer", "param")),
    Rule(  # zero/stage_1_and_2.py offloads to the CPU whatever the device is called
        "nvme-needs-stage-3",
        f"{ZERO}.offload_optimizer.device",
        lambda r: r.offloads("optimizer") == "nvme" and r.stage in (1, 2),
        "NVMe offload is part of stage 3; stages 1 and 2 would use the CPU's memory instead.",
        'Write "stage": 3, or "device": "cpu".',
        example=zero(2, offload_optimizer={"device": "nvme", "nvme_path": "/tmp"}),
        mended=zero(2, offload_optimizer={"device": "cpu"}),
    ),
    Rule(  # accelerate/utils/deepspeed.py, map_pytorch_optim_to_deepspeed
        "offload-replaces-the-optimizer",
        "optim",
        lambda r: (
            r.offloads("optimizer") != "none"
            and r.key("zero_force_ds_cpu_optimizer", True)
            and r.settings.get("optim") not in (*_CPU_OPTIMIZERS, MUON)
        ),
        "With an offloaded optimizer, accelerate replaces it by DeepSpeed's CPU Adam without a word.",
        "Use --optim adamw_torch, or remove offload_optimizer.",
        example=zero(2, offload_optimizer={"device": "cpu"}) | {"optim": "adafactor"},
        mended=zero(2, offload_optimizer={"device": "cpu"}) | {"optim": "adamw_torch"},
    ),
    Rule(  # runtime/zero/stage_1_and_2.py and stage3.py flatten a group's tensors and cut the whole anywhere
        "muon-needs-whole-matrices",
        "optim",
        lambda r: r.settings.get("optim") == MUON,
        "DeepSpeed hands an optimizer flat pieces of the weights, and Muon orthogonalises whole matrices.",
        "Write --deepspeed none: plain data parallelism, or accelerate's FSDP2; or use --optim adamw_torch_fused.",
        example=zero(2) | {"optim": MUON},
        mended={"optim": MUON},
    ),
    Rule(  # zero/stage3.py: partial offload
        "partial-offload-needs-stage-3",
        f"{ZERO}.offload_optimizer.ratio",
        lambda r: r.zero("offload_optimizer.ratio", 1.0) < 1.0 and r.stage != 3,
        "A part of the optimizer is offloaded at stage 3 only.",
        'Write "stage": 3, or remove ratio.',
        example=zero(2, offload_optimizer={"device": "cpu", "ratio": 0.5}),
        mended=zero(3, offload_optimizer={"device": "cpu", "ratio": 0.5}),
    ),
    Rule(
        "super-offload-needs-stage-3",
        f"{ZERO}.offload_optimizer.super_offload",
        lambda r: r.zero("offload_optimizer.super_offload", False) and r.stage != 3,
        "It works at stage 3 only.",
        'Write "stage": 3, or remove super_offload.',
        example=zero(2, offload_optimizer={"device": "cpu", "super_offload": True}),
        mended=zero(3, offload_optimizer={"device": "cpu", "super_offload": True}),
    ),
    Rule(  # zero/stage_1_and_2.py: nccl_start_alignment_factor
        "bucket-must-be-even",
        f"{ZERO}.allgather_bucket_size",
        lambda r: r.stage in (1, 2) and r.zero("allgather_bucket_size", 0) % 2,
        "Stages 1 and 2 start every bucket at an even element.",
        "Write an even number.",
        example=zero(2, allgather_bucket_size=3),
        mended=zero(2, allgather_bucket_size=4),
    ),
    Rule(
        "zenflow-needs-its-own-optimizer",
        f"{ZERO}.zenflow",
        lambda r: r.zero("zenflow") is not None,
        "ZenFlow needs an optimizer that DeepSpeed creates; Trainer creates its own.",
        "Remove the block.",
        example=zero(2, zenflow={}),
        mended=zero(2),
    ),
    Rule(  # zero/config.py, zero/stage_1_and_2.py, engine.py
        "clipping-needs-the-norm",
        f"{ZERO}.compute_grad_norm",
        lambda r: (
            r.zero("compute_grad_norm") is False
            and (r.stage not in (1, 2) or r.key("gradient_clipping", 1.0) > 0 or r.offloads("optimizer") != "none")
        ),
        "Without a norm there is no clipping; it is for stages 1 and 2 without offload.",
        "Remove it, or use --max_grad_norm 0 at stage 1 or 2.",
        example=zero(2, compute_grad_norm=False),
        mended=zero(2, compute_grad_norm=False) | {"max_grad_norm": 0.0},
    ),
    Rule(  # training/guard.py
        "spikes-need-the-norm",
        "spike_sigma",
        lambda r: (
            r.settings.get("spike_sigma")
            and (r.zero("compute_grad_norm") is False or (r.stage == 0 and r.dtype == "fp32"))
        ),
        "DeepSpeed does not tell the gradient's norm at stage 0 in fp32, or without compute_grad_norm.",
        "Leave out --deepspeed or compute_grad_norm, use stage 1, or --bf16.",
        example=zero(0) | {"spike_sigma": 6.0, "bf16": False},
        mended=zero(1) | {"spike_sigma": 6.0},
    ),
    Rule(
        "pipelined-loading-needs-stage-3",
        f"{ZERO}.pipeline_loading_checkpoint",
        lambda r: r.zero("pipeline_loading_checkpoint") and r.stage != 3,
        "Only stage 3 loads checkpoints in turn.",
        "Remove it.",
        example=zero(2, pipeline_loading_checkpoint=True),
        mended=zero(3, pipeline_loading_checkpoint=True),
    ),
    Rule(
        "hpz-needs-stage-3",
        f"{ZERO}.zero_hpz_partition_size",
        lambda r: r.zero("zero_hpz_partition_size", 1) > 1 and r.stage != 3,
        "hpZ keeps a second copy of stage 3's shards; at another stage there are none.",
        'Write "stage": 3, or remove it.',
        example=zero(2, zero_hpz_partition_size=2),
        mended=zero(3, zero_hpz_partition_size=2),
        found=lambda r: f"{r.zero('zero_hpz_partition_size')} at stage {r.stage}",
    ),
    Rule(
        "hpz-does-not-divide",
        f"{ZERO}.zero_hpz_partition_size",
        lambda r: (
            r.zero("zero_hpz_partition_size", 1) > 1
            and r.stage == 3
            and (r.world.processes or 0) % r.zero("zero_hpz_partition_size", 1)
        ),
        "hpZ shards over groups of so many GPUs, which must divide their number.",
        "Write a divisor of the number of GPUs, or remove it.",
        example=zero(3, zero_hpz_partition_size=3),
        mended=zero(3, zero_hpz_partition_size=2),
        found=lambda r: f"{r.zero('zero_hpz_partition_size')} on {_with_divisors(r.world.processes or 1)}",
    ),
    *(
        _quantizes(name)
        for name in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
    ),
    *(_half_masters(name) for name in ("bf16", "fp16")),
    Rule(
        "bf16-states-need-bf16-masters",
        "bf16.bf16_optimizer_states",
        lambda r: r.key("bf16.bf16_optimizer_states") and not r.key("bf16.bf16_master_weights_and_grads"),
        "It needs bf16_master_weights_and_grads.",
        "Remove it.",
        example=ds(bf16={"enabled": True, "bf16_optimizer_states": True}),
        mended=ds(bf16={"enabled": True, "bf16_optimizer_states": True, "bf16_master_weights_and_grads": True}),
    ),
    Rule(
        "gradients-are-summed",
        "gradient_allreduce_op",
        lambda r: r.key("gradient_allreduce_op") == "sum",
        "Trainer's loss is already a mean over all ranks: a sum would multiply the gradient by the world size "
        "(stage 3 and DeepCompile refuse it).",
        'Remove it, or write "mean".',
        example=ds(gradient_allreduce_op="sum"),
        mended=ds(gradient_allreduce_op="mean"),
    ),
    Rule(
        "predivide-factor-below-scatter",
        "gradient_predivide_factor",
        lambda r: r.key("gradient_predivide_factor", 1.0) != 1.0 and _scatters(r),
        "Stages 2 and 3 with reduce_scatter take no other factor than 1.",
        "Remove it.",
        example=zero(2) | {"deepspeed": {**zero(2)["deepspeed"], "gradient_predivide_factor": 2.0}},
        mended=ds(gradient_predivide_factor=2.0),
    ),
    Rule(
        "prescale-below-scatter",
        "prescale_gradients",
        lambda r: r.key("prescale_gradients") and _scatters(r),
        "At stages 2 and 3 DeepSpeed cannot scale gradients beforehand where it scatters them.",
        'Remove it, or write "reduce_scatter": false.',
        example={"deepspeed": {**zero(2)["deepspeed"], "prescale_gradients": True}},
        mended=ds(prescale_gradients=True),
    ),
    Rule(
        "engine-must-accumulate",
        "managed_gradient_accumulation",
        lambda r: r.key("managed_gradient_accumulation") is False,
        "Trainer leaves the accumulation to the engine: every micro-step would be an optimizer step.",
        "Remove it.",
        example=ds(managed_gradient_accumulation=False),
        mended=ds(managed_gradient_accumulation=True),
    ),
    Rule(
        "param-dtype-is-not-the-runs",
        "data_types.param_dtype",
        lambda r: r.key("data_types.param_dtype") not in (None, *HALF_NAMES[r.dtype]),
        "The weights are in the run's precision, whatever this key says.",
        "Remove it; --bf16 or --fp16 decides.",
        example=ds(data_types={"param_dtype": "bf16"}) | {"bf16": False},
        mended=ds(data_types={"param_dtype": "fp32"}) | {"bf16": False},
        found=lambda r: f"{show(r.key('data_types.param_dtype'))} in a run in {r.dtype}",
    ),
    Rule(
        "stage-0-accumulates-in-the-runs-precision",
        "data_types.grad_accum_dtype",
        lambda r: r.stage == 0 and r.key("data_types.grad_accum_dtype") not in (None, *HALF_NAMES[r.dtype]),
        "Stage 0 accumulates in the run's precision only.",
        'Write "stage": 1, or remove it.',
        example={"deepspeed": {**zero(0)["deepspeed"], "data_types": {"grad_accum_dtype": "bf16"}}, "bf16": False},
        mended=ds(data_types={"grad_accum_dtype": "bf16"}),
    ),
    Rule(
        "autocast-adds-nothing",
        "torch_autocast.enabled",
        lambda r: r.key("torch_autocast.enabled") and r.dtype != "fp32",
        "The weights would be cast to half precision all the same, and autocast would add nothing.",
        'Remove the block, or use --bf16 false with "bf16": {"enabled": "auto"}.',
        example=ds(torch_autocast={"enabled": True}, bf16={"enabled": True}),
        mended=ds(torch_autocast={"enabled": True}) | {"bf16": False},
    ),
    Rule(
        "deepcompile-needs-torch-compile",
        "compile.deepcompile",
        lambda r: r.key("compile.deepcompile") and not r.settings.get("torch_compile"),
        "DeepCompile acts in engine.compile(), which Trainer calls with --torch_compile true only.",
        "Add --torch_compile true, or remove the block.",
        example=ds(compile={"deepcompile": True}),
        mended=ds(compile={"deepcompile": True}) | {"torch_compile": True},
    ),
    Rule(
        "universal-needs-a-checkpoint",
        "checkpoint.load_universal",
        lambda r: r.key("checkpoint.load_universal") and not r.resumes,
        "There is no universal checkpoint to load: no --resume FOLDER is given.",
        "Remove it, or give --resume FOLDER.",
        example=ds(checkpoint={"load_universal": True}),
        mended=ds(checkpoint={"load_universal": False}),
    ),
    Rule(  # model_checkpointing/utils.py reads CROSS_SIZE, which the `deepspeed` launcher alone sets
        "fast-writer-needs-its-launcher",
        "checkpoint.writer",
        lambda r: r.key("checkpoint.writer") is not None,
        "The fast writer works under the `deepspeed` launcher only: under accelerate the start fails.",
        "Remove the block.",
        example=ds(checkpoint={"writer": {"type": "fast"}}),
        mended=ds(checkpoint={}),
    ),
    Rule(
        "gds-needs-a-gpu",
        "aio.use_gds",
        lambda r: r.key("aio.use_gds") and r.world.device == "cpu",
        "GPUDirect Storage needs a GPU.",
        "Remove it.",
        example=ds(aio={"use_gds": True}),
        mended=ds(aio={"use_gds": False}),
    ),
    *(_monitor(*names) for names in MONITORS),
    *(_full_eval(name) for name in ("bf16", "fp16")),
    Rule(
        "cpu-flag-switches-deepspeed-off",
        "deepspeed",
        lambda r: r.launcher.use_cpu,
        "ACCELERATE_USE_CPU (accelerate launch --cpu) silently switches DeepSpeed off.",
        "Launch without --cpu, and use --use_cpu true.",
        example=ds() | {"environ": {"ACCELERATE_USE_CPU": "true"}},
        mended=ds() | {"use_cpu": True},
    ),
    Rule(
        "fsdp-and-deepspeed",
        "deepspeed",
        lambda r: r.launcher.fsdp is not None or r.settings.get("fsdp"),
        "FSDP and DeepSpeed shard the same weights.",
        "Keep one of them.",
        example=ds() | {"environ": {"ACCELERATE_USE_FSDP": "true"}},
        mended=ds(),
    ),
    Rule(  # trainer.py
        "best-model-needs-full-checkpoints",
        "load_best_model_at_end",
        lambda r: r.settings.get("load_best_model_at_end") and r.settings.get("save_only_model"),
        "DeepSpeed loads the best model from a full checkpoint, which save_only_model does not write.",
        "Remove one of them.",
        example=ds()
        | {"load_best_model_at_end": True, "save_only_model": True, "eval_strategy": "steps", "save_strategy": "steps"},
        mended=ds() | {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"},
    ),
)
