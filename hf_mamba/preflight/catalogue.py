"""One page for every problem and migration: what it finds, why, what to write, and an example of both.

Rules (combinations.py, deepspeed/rules.py) and legacy keys (deepspeed/migrations.py) are rows of their own, which carry
all of it. What the code finds while it reads and decides stands in RAISED: an id, one sentence and, where the arguments
of a run alone show it, an example that meets it and one that is mended.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from hf_mamba.preflight.combinations import RULES
from hf_mamba.preflight.deepspeed.migrations import MIGRATIONS, REFUSED
from hf_mamba.preflight.kinds import near
from hf_mamba.preflight.rules import ds, zero

Example = Mapping[str, Any] | None


class Page(NamedTuple):
    """What is known about one id. The examples are arguments of `resolve`, as in `Rule`."""

    id: str
    what: str
    fix: str = ""
    example: Example = None
    mended: Example = None


def _scheduler(kind: str = "WarmupDecayLR", **params: Any) -> dict[str, Any]:
    return ds(scheduler={"type": kind, "params": params})


def _adam(kind: str = "AdamW", **params: Any) -> dict[str, Any]:
    return ds(optimizer={"type": kind, "params": params})


RAISED: tuple[Page, ...] = (
    # arguments
    Page("command-line-unreadable", "The command line is not one that argparse can read."),
    Page("unknown-flag", "There is no flag of that name."),
    Page("unknown-argument", "A key of the YAML file is no argument of a run."),
    Page("argument-of-the-wrong-kind", "An argument's value is of another kind.", "", {"seq_len": -1}, {"seq_len": 64}),
    Page(
        "refused-by-its-reader",
        "An argument's value is one that transformers, torch or the file system refuses.",
        "",
        {"optim": "adamw_torhc"},
        {"optim": "adamw_torch"},
    ),
    Page(
        "field-not-served",
        "A field of TrainingArguments asks for what a run here cannot do.",
        "",
        {"data_seed": 7},
        {"seed": 7},
    ),
    Page("refused-by-transformers", "A value is refused when TrainingArguments and what reads them are built."),
    Page("deepspeed-not-installed", "The run uses DeepSpeed, which is not installed on the machine that runs it."),
    Page("two-names-two-values", "An argument and its other name are both written, with different values."),
    Page("config-unreadable", "The file that --config names cannot be read, or is not YAML."),
    Page("config-is-a-deepspeed-file", "The file that --config names is a DeepSpeed file: give it with --deepspeed."),
    Page("config-without-keys", "The file that --config names holds no keys."),
    Page("config-key-twice", "A key stands twice in the YAML file, which keeps the last."),
    Page("more-problems", "Only the first fifty problems are listed."),
    Page("unknown-preset", "There is no preset of that name.", "", {"preset": "130m"}, {"preset": "130m_mamba"}),
    # model
    Page("model-config-missing", "The folder that --model_name_or_path names has no config.json."),
    Page("model-config-unreadable", "The model's config.json cannot be read."),
    Page("model-config-is-no-block", "The model's config.json is not a block {...}."),
    Page("model-in-original-format", "The model has the original keys (d_model, n_layer): convert it first."),
    Page("model-of-another-kind", "The model's model_type is not one of this package."),
    Page("model-size-of-the-wrong-kind", "A size in the model's config.json is no whole number."),
    Page(
        "model-sizes-disagree",
        "Sizes in the model's configuration contradict each other.",
        "",
        {"model_config": {"model_type": "mamba2", "hidden_size": 64, "num_heads": 3}},
        {"model_config": {"model_type": "mamba2", "hidden_size": 64, "num_heads": 2, "n_groups": 1}},
    ),
    Page("parameters-uncountable", "The model's configuration does not give a number of parameters."),
    Page("parameters-differ", "The model as built has other parameters than were estimated."),
    # data
    Page("dataset-list-unreadable", "--dataset is no list of names and weights."),
    Page("dataset-missing", "A data set is not there.", "", {"dataset": ["/no/such.jsonl"]}, {"dataset": ["embedded"]}),
    Page("streams-cannot-be-mixed", "Streams have no known size by which they could be mixed."),
    Page(
        "end-token-of-a-trained-tokenizer",
        "--eos_token is for a tokenizer that is named.",
        "",
        {"eos_token": "</s>"},
        {},
    ),
    Page("tokenizer-unusable", "The named tokenizer is not there, or lacks the token of --eos_token."),
    Page("tokenizer-unloadable", "The named tokenizer cannot be loaded on the machine that runs."),
    Page("vocabulary-smaller-than-tokenizer", "The model has fewer rows than the tokenizer has tokens."),
    Page("dataset-unreadable", "A data set's first records cannot be read, or are ids of another tokenizer."),
    Page("weights-unusable", "The weights of --model_name_or_path are not there, or are not of its configuration."),
    Page("no-end-token", "The tokenizer does not say which token ends a document, and has none of the usual names."),
    Page(
        "two-evaluation-sets",
        "--eval_dataset and --eval_fraction both say what is evaluated on.",
        "",
        {"eval_dataset": ["embedded"], "eval_fraction": 0.1},
        {"eval_dataset": ["embedded"]},
    ),
    Page("streaming-needs-a-tokenizer", "A tokenizer can be trained only on data that are read before the run."),
    Page("streaming-takes-no-workers", "A stream is read in order, by one thread of each process."),
    Page("stream-of-another-world", "Each process reads its own share of a stream: their number must stay the same."),
    # machine
    Page("gpu-memory-unreadable", "--gpu_memory is no size.", "", {"gpu_memory": "80"}, {"gpu_memory": "80GB"}),
    Page(
        "does-not-fit",
        "The run does not fit into the device's memory.",
        "",
        {"preset": "7b_mamba", "gpu_memory": "16GB", "device": "gpu"},
        {"preset": "130m_mamba", "gpu_memory": "80GB", "device": "gpu"},
    ),
    Page("disk-too-small", "The disk has less room than the run will write: tokens, checkpoints and the model."),
    Page("temporary-folder-too-long", "TMPDIR leaves no room for the sockets of the loader's workers."),
    Page(
        "compiler-missing", "DeepSpeed compiles extensions as a run starts, and ninja or the C++ compiler is not there."
    ),
    Page("extensions-folder-unusable", "DeepSpeed's extensions cannot be kept in their folder, or not loaded from it."),
    Page("backend-cannot-serve", "HF_MAMBA_BACKEND names a backend that cannot serve this run."),
    Page(
        "environment-not-a-count",
        "A variable of the launcher is no whole number.",
        "",
        {"environ": {"WORLD_SIZE": "x"}},
    ),
    Page("environment-not-a-number", "A variable of accelerate is no number."),
    Page("accelerate-config-unreadable", "accelerate's own file cannot be read."),
    Page("accelerate-config-without-keys", "accelerate's own file holds no keys."),
    Page("accelerate-refuses-the-file", "accelerate itself refuses its file: a key or a value that it does not know."),
    Page("accelerate-config-without-a-world", "accelerate's own file says no number of processes."),
    Page(
        "accelerate-shards-otherwise", "accelerate's FSDP in the started process is not the plan's: please report it."
    ),
    Page(
        "fsdp-refused",
        "accelerate's FSDP plugin refuses a value.",
        "",
        {"device": "gpu", "environ": {"ACCELERATE_USE_FSDP": "true", "FSDP_AUTO_WRAP_POLICY": "LAYERS"}},
        {"device": "gpu", "environ": {"ACCELERATE_USE_FSDP": "true", "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}},
    ),
    Page("compute-environment-unknown", "accelerate's own file is for a service that is not known here."),
    Page("rendezvous-missing", "Several machines need an address at which they find each other."),
    Page("rendezvous-not-a-number", "A machine's rank or a port is no number."),
    Page("machine-rank-too-large", "A machine's rank is not below the number of machines."),
    Page("no-such-script", "The script that --script names is not there."),
    Page("nodes-without-gpus", "--num_nodes needs --num_gpus."),
    Page(
        "world-size-contradicts",
        "The launcher has started another number of processes than --num_gpus and --num_nodes say.",
        "",
        {"num_gpus": 2, "environ": {"WORLD_SIZE": "4"}, "world_size": None},
        {"num_gpus": 4, "environ": {"WORLD_SIZE": "4"}, "world_size": None},
    ),
    Page("model-parallel", "The model has no tensor or sequence parallelism.", "", ds(sequence_parallel_size=2), ds()),
    Page("world-does-not-divide", "The processes are no multiple of the model-parallel size."),
    # batch and steps
    Page(
        "batch-does-not-divide",
        "The GPUs cannot share the global batch evenly.",
        "",
        {"global_batch_size": 7},
        {"global_batch_size": 8},
    ),
    Page(
        "batch-product-differs",
        "Global batch = micro-batch x accumulation x GPUs does not hold.",
        "",
        ds(train_batch_size=12, train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=1),
        ds(train_batch_size=4, train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=1),
    ),
    Page(
        "batch-written-twice",
        "A batch number is written in two places, with different values.",
        "",
        ds(train_micro_batch_size_per_gpu=2) | {"per_device_train_batch_size": 4},
        ds(train_micro_batch_size_per_gpu="auto") | {"per_device_train_batch_size": 4},
    ),
    Page(
        "batch-tokens-do-not-divide",
        "--global_batch_tokens is no whole number of sequences.",
        "",
        {"global_batch_tokens": 300, "seq_len": 256},
        {"global_batch_tokens": 512, "seq_len": 256},
    ),
    Page("no-steps", "A run of no steps trains nothing.", "", {"max_steps": 0}, {"max_steps": 1}),
    Page("vocabulary-too-small", "--vocab_size is less than the rows that a model and its tokenizer need."),
    Page("two-models", "Two of model_config, --model_name_or_path and --config_name are written."),
    Page("model-without-weights", "--model_name_or_path names a folder that holds a configuration and no weights."),
    Page("overrides-beside-weights", "--config_overrides would change the sizes that the weights have."),
    Page(
        "unknown-field",
        "--config_overrides names a field that the model's configuration does not have.",
        "",
        {"config_overrides": "hiden_size=64"},
        {"config_overrides": "hidden_size=64"},
    ),
    Page(
        "field-of-the-wrong-kind",
        "--config_overrides gives a field a value of another kind.",
        "",
        {"config_overrides": "use_bias=1"},
        {"config_overrides": "use_bias=true"},
    ),
    Page(
        "overrides-unreadable",
        "--config_overrides is no list of name=value.",
        "",
        {"config_overrides": "hidden_size:64"},
        {"config_overrides": "hidden_size=64"},
    ),
    Page("run-without-end", "Neither --max_steps nor --max_tokens is known."),
    Page("epochs-have-no-length", "A stream is read as it goes: an epoch has no length that is known beforehand."),
    Page(
        "epochs-not-measured",
        "With --num_train_epochs the steps are known once the data are tokenised, which the recipe does first.",
        "",
        {"max_steps": -1, "num_train_epochs": 2},
        {"max_steps": 2},
    ),
    Page("two-budgets", "--max_steps and --max_tokens differ."),
    Page("budget-below-one-step", "--max_tokens is less than one step takes."),
    Page(
        "warmup-written-twice", "The warm-up is written in two ways.", "", {"warmup_steps": 2, "warmup_ratio": 0.1}, {}
    ),
    Page("warmup-never-ends", "The warm-up is as long as the run.", "", {"warmup_steps": 10}, {"warmup_steps": 2}),
    Page(
        "schedule-without-floor",
        "The schedule has no floor, and --min_lr is written.",
        "",
        {"min_lr": 1e-5, "lr_scheduler_type": "linear"},
        {"min_lr": 1e-5, "lr_scheduler_type": "cosine_with_min_lr"},
    ),
    Page("schedule-without-decay-phase", "Only warmup_stable_decay has --decay_ratio."),
    Page("floor-above-peak", "--min_lr is above --learning_rate."),
    # precision
    Page("two-precisions", "bf16 and fp16 are both asked for.", "", {"bf16": True, "fp16": True}, {"bf16": True}),
    Page(
        "precision-contradicts",
        "A flag and the DeepSpeed file say different things about a precision.",
        "",
        ds(bf16={"enabled": True}) | {"bf16": False},
        ds(bf16={"enabled": "auto"}) | {"bf16": False},
    ),
    Page("fp16-on-a-cpu", "fp16 does not train on a CPU.", "", {"fp16": True}, {"bf16": True}),
    # reports
    Page("unknown-tracker", "There is no such tracker.", "", {"report_to": "tensorbord"}, {"report_to": "none"}),
    Page("tracker-not-installed", "The package of a tracker is not installed."),
    Page("tracker-not-logged-in", "Nobody is logged in to wandb."),
    # the run's folder and checkpoints
    Page("output-dir-not-usable", "--output_dir is another run's, or cannot be written."),
    Page("resume-never-over-checkpoints", "--resume never would write over the run's own checkpoints."),
    Page("branch-over-another-run", "--resume names another run's checkpoint, and --output_dir holds a third run."),
    Page("run-goes-on-elsewhere", "--resume names a run's folder, and --output_dir another one."),
    Page("run-without-arguments", "--resume names the folder of a run whose plan.json does not keep its arguments."),
    Page("changed-at-resume", "A setting of the update is another one than the checkpoint's: the new one holds."),
    Page("checkpoint-of-another-optimizer", "Another optimizer wrote the checkpoint, and its state has another form."),
    Page(
        "schedule-of-the-losses-changed",
        "The rate of reduce_lr_on_plateau and greedy follows the losses, so that it cannot be changed at a resume.",
    ),
    Page("checkpoint-not-of-trainer", "The folder to resume from is no checkpoint of Trainer."),
    Page("checkpoint-damaged", "The checkpoint is not whole."),
    Page("checkpoint-of-another-run", "The checkpoint is another run's: another seed, batch, row length or data."),
    Page("checkpoint-of-another-model", "The checkpoint is of a model with other sizes."),
    Page(
        "checkpoint-of-another-engine",
        "The checkpoint was written with DeepSpeed or FSDP and the run is without, or the reverse.",
    ),
    Page("checkpoint-of-another-stage", "The optimizer's state has another form at ZeRO stage 0 than at 1 to 3."),
    Page("checkpoint-of-another-precision", "The optimizer's state was written in another precision."),
    # the DeepSpeed file
    Page("two-deepspeed-files", "--deepspeed and accelerate's --deepspeed_config_file name different files."),
    Page(
        "deepspeed-none-under-its-launcher",
        "--deepspeed none, under a launcher that starts DeepSpeed.",
        "",
        {"deepspeed": "none", "environ": {"ACCELERATE_USE_DEEPSPEED": "true"}},
        {"deepspeed": "none"},
    ),
    Page("deepspeed-is-no-path", "--deepspeed is neither a path nor a block.", "", {"deepspeed": 7}, ds()),
    Page("file-unreadable", "The file cannot be read.", "", {"deepspeed": "/no/such.json"}, ds()),
    Page("file-of-another-kind", "The file is empty, a Git LFS pointer or a web page."),
    Page("file-not-json", "The text is neither JSON nor hjson nor YAML.", "", {"deepspeed": '{"a": '}, ds()),
    Page("file-is-no-block", "The configuration is no block {...}."),
    Page("file-is-empty", "The configuration holds nothing.", "", {"deepspeed": "{}"}, zero(0)),
    Page("file-too-deep", "The configuration is nested too deeply, or holds too many values."),
    Page(
        "no-deepspeed-file",
        "Not one key of the file is DeepSpeed's.",
        "",
        {"deepspeed": {"learning_rate": 1e-3, "output_dir": "x"}},
        ds(),
    ),
    Page(
        "duplicate-key",
        "A key stands twice in a block; DeepSpeed refuses it.",
        "",
        {"deepspeed": '{"zero_optimization": {"stage": 1, "stage": 2}}'},
        zero(2),
    ),
    Page("key-is-no-text", "A key is no text.", "", {"deepspeed": {"zero_optimization": {1: 2}}}, ds()),
    Page("key-with-dots", "A key is a path with dots.", "", {"deepspeed": {"zero_optimization.stage": 1}}, zero(1)),
    Page("key-with-blanks", "A key is empty, or begins or ends in a blank.", "", ds(**{"bf16 ": {}}), ds()),
    Page("number-not-finite", "A number is NaN or infinite.", "", ds(gradient_clipping=float("inf")), ds()),
    Page(
        "misspelt-key",
        "A key looks like another one of its block.",
        "",
        ds(gradient_cliping=1),
        ds(gradient_clipping=1),
    ),
    Page("unknown-key", "DeepSpeed refuses a key that it does not know.", "", zero(1, colour="red"), zero(1)),
    Page("too-many-unknown-keys", "More than fifty keys are not DeepSpeed's."),
    Page("value-of-the-wrong-kind", "A value is of another kind.", "", zero(2, overlap_comm="often"), zero(2)),
    Page(
        "text-read-as-a-value",
        "A number, true or false in quotation marks is read as what it says.",
        "",
        ds(gradient_clipping="1.0"),
        ds(gradient_clipping=1.0),
    ),
    Page(
        "auto-is-default",
        'An "auto" that nobody fills is left to DeepSpeed.',
        "",
        zero(2, overlap_comm="auto"),
        zero(2),
    ),
    Page(
        "loss-scale-floor", "DeepSpeed refuses a loss scale's floor below 1.", "", ds(fp16={"min_loss_scale": 0}), ds()
    ),
    Page(
        "clipping-written-twice",
        "The clipping norm is written in two places, with different values.",
        "",
        ds(gradient_clipping=5.0) | {"max_grad_norm": 1.0},
        ds(gradient_clipping="auto") | {"max_grad_norm": 1.0},
    ),
    Page("launcher-disagrees-with-file", "A flag of accelerate launch contradicts the DeepSpeed file, and is ignored."),
    Page("legacy-key-contradicts", "A key and its old name have different values."),
    Page("legacy-block-missing", "A legacy key belongs into a block that is no block."),
    Page("legacy-switch-of-another-kind", "A deprecated switch is neither true nor false."),
    Page(
        "run-argument-in-deepspeed-file",
        "A DeepSpeed file holds an argument of the run with another value than the run's: nobody would read it.",
        "",
        ds(learning_rate=1e-5),
        ds() | {"learning_rate": 1e-5},
    ),
    Page("deepspeed-refuses-the-file", "The installed DeepSpeed refuses the resolved file: please report it."),
    Page(
        "deepspeed-reads-other-numbers", "The installed DeepSpeed reads other numbers than planned: please report it."
    ),
    # its optimizer and scheduler blocks
    Page(
        "params-no-block",
        "The params of an optimizer or a scheduler are no block.",
        "",
        ds(optimizer={"type": "Adam", "params": 7}),
    ),
    Page(
        "unknown-parameter", "An optimizer or a schedule has no such parameter.", "", _adam(wieght_decay=0.1), _adam()
    ),
    Page(
        "argument-written-twice",
        "A number of a block contradicts a flag.",
        "",
        _adam(lr=1e-3) | {"learning_rate": 2e-3},
        _adam(lr="auto") | {"learning_rate": 2e-3},
    ),
    Page("two-optimizers", "An optimizer block contradicts --optim.", "", _adam() | {"optim": "adafactor"}, _adam()),
    Page("optimizer-without-equal", "Trainer has no such optimizer.", "", _adam("Lamb"), {"optim": "adamw_torch"}),
    Page("unknown-optimizer", "DeepSpeed has no such optimizer.", "", _adam("AdmW"), _adam("AdamW")),
    Page("optimizer-option", "Trainer's optimizer has no such option.", "", _adam(amsgrad=True), _adam(amsgrad=False)),
    Page(
        "adam-with-l2",
        "adam_w_mode: false makes the decay a part of the gradient.",
        "",
        _adam("Adam", adam_w_mode=False, weight_decay=0.1),
        _adam("Adam", weight_decay=0.1),
    ),
    Page(
        "unknown-scheduler",
        "No schedule here has this shape.",
        "",
        _scheduler("OneCycle"),
        _scheduler("WarmupCosineLR"),
    ),
    Page(
        "schedule-written-twice",
        "A scheduler block and a flag both say what the schedule is.",
        "",
        _scheduler() | {"lr_scheduler_type": "cosine"},
        {"lr_scheduler_type": "cosine"},
    ),
    Page(
        "schedule-of-another-length",
        "A schedule's steps contradict a flag, and Trainer refuses them.",
        "",
        _scheduler(total_num_steps=20) | {"max_steps": 30},
        _scheduler(total_num_steps="auto") | {"max_steps": 30},
    ),
)


def pages() -> dict[str, Page]:
    """Every page by its id."""
    rows = [Page(rule.id, f"{rule.key}: {rule.why}", rule.fix, rule.example, rule.mended) for rule in RULES]
    rows += [
        Page(row.id, f"{row.old}: {row.why}.", f"Write {row.new}." if row.new else "Remove it.") for row in MIGRATIONS
    ]
    rows += [Page(f"refused-{key.replace('_', '-')}", f"{key}: {why}", fix) for key, (why, fix) in REFUSED.items()]
    return {page.id: page for page in (*rows, *RAISED)}


def _shown(example: Example) -> str:
    """An example as a person writes it: the DeepSpeed file as JSON, the rest as flags and variables."""
    words = []
    for name, value in (example or {}).items():
        if name == "deepspeed":
            words.append(f"--deepspeed {value if isinstance(value, str | int) else json.dumps(value, default=repr)}")
        elif name == "environ":
            words = [f"{key}={text}" for key, text in value.items()] + words
        elif name not in ("device", "world_size"):
            text = (
                " ".join(value) if isinstance(value, list) else json.dumps(value) if isinstance(value, dict) else value
            )
            words.append(f"--{name} {text}")
    return " ".join(words) or "(nothing)"


def describe(id: str) -> str:
    """The page of one id as text.

    Raises:
        ValueError: there is no such id.
    """
    known = pages()
    if id not in known:
        guess = near(id, known)
        raise ValueError(
            f"there is no rule {id!r}; " + (f"did you mean {guess}?" if guess else "see `hf-mamba rules`.")
        )
    page = known[id]
    lines = [page.id, "", page.what, *([page.fix] if page.fix else [])]
    if page.example is not None:
        lines += ["", f"  refused: {_shown(page.example)}"]
        lines += [f"  mended:  {_shown(page.mended)}"] if page.mended is not None else []
    return "\n".join(lines)
