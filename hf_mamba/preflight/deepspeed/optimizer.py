"""The `optimizer` block of a DeepSpeed file: taken over as arguments, so that the model's decay groups are kept.

DeepSpeed would build the optimizer from the block and flatten the groups into one; norms and biases would decay.
Offloaded, the run uses DeepSpeedCPUAdam all the same: accelerate puts it in the place of AdamW.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from annotated_types import Ge, Lt

from hf_mamba.findings import Findings
from hf_mamba.preflight.deepspeed.inert import is_off, leave_out
from hf_mamba.preflight.deepspeed.taking import check_block, number, take
from hf_mamba.preflight.kinds import Amount, near, show
from hf_mamba.preflight.optimizers import ADAMW
from hf_mamba.preflight.settings import Settings

# DeepSpeed's and torch's names that Trainer has: name -> (--optim, what goes into --optim_args)
SAME: dict[str, tuple[str, tuple[str, ...]]] = {
    "sgd": ("sgd", ("momentum", "dampening", "nesterov")),
    "adagrad": ("adagrad", ("lr_decay", "eps")),
    "rmsprop": ("rmsprop", ("momentum", "alpha", "eps", "centered")),
}
NEAREST = {
    "lamb": "adamw_torch",
    "onebitadam": "adamw_torch",
    "onebitlamb": "adamw_torch",
    "zerooneadam": "adamw_torch",
    "lion": "lion_32bit, which needs bitsandbytes",
    "muadam": "adamw_torch",
    "muadamw": "adamw_torch",
    "musgd": "sgd",
    "muon": "adamw_torch",
    "adamax": "adamw_torch",
    "nadam": "adamw_torch",
    "radam": "adamw_torch",
    "adafactor": "adafactor",
    "asgd": "sgd",
}
GONE = ("onebitadam", "onebitlamb", "zerooneadam")  # from DeepSpeed: its engine looks for them in torch.optim
# parameters of DeepSpeed's Adam that choose between ways of computing the same update, and the values that do so
_SAME_UPDATE: dict[str, tuple[Any, ...]] = {
    "torch_adam": (True, False),
    "adam_w_mode": (True,),
    "bias_correction": (True,),
    "amsgrad": (False,),
    "set_grad_none": (True, False),
    "fp32_optimizer_states": (True,),
    "foreach": (True, False),
    "fused": (True, False),
}
_BETA = Annotated[float, Ge(0), Lt(1)]
_NUMBERS = {"lr": ("learning_rate", Amount), "weight_decay": ("weight_decay", Amount)}


def take_optimizer(config: dict[str, Any], name: str, settings: Settings, out: Findings) -> None:
    """Take the block out of `config`: its numbers become arguments, and one note says which."""
    block = config.pop("optimizer", None)
    if block is None or (is_off(block) and not (isinstance(block, Mapping) and "type" in block)):
        if block is not None:
            leave_out(out, "optimizer", "it is empty")
        return
    kind = block.get("type") if isinstance(block, Mapping) else None
    params = block.get("params", {}) if isinstance(block, Mapping) else {}
    lower = str(kind).lower()
    if not isinstance(kind, str) or lower not in ("adam", "adamw", *SAME) or not isinstance(params, Mapping):
        _refuse(kind, params, out)
        return
    check_block("optimizer", block, out)
    wanted, own = SAME.get(lower, (ADAMW[1], ()))
    if settings.given("optim") and settings.get("optim") not in (ADAMW if wanted in ADAMW else (wanted,)):
        out.problem(
            "optimizer.type",
            f"{kind} in {name} and optim={settings.get('optim')} ({settings.source('optim')})",
            "Two optimizers are written; Trainer would take the file's without a word.",
            f"Remove the optimizer block from {name}, or --optim.",
            id="two-optimizers",
        )
    elif own:
        settings.adopt("optim", wanted, f"optimizer in {name}")
    learning_rate = settings.preset.learning_rate if settings.preset else None
    taken = _take_numbers(params, name, lower in ("adam", "adamw"), settings, out)
    taken += _take_options(params, name, kind, own, settings, out)
    rate = settings.get("learning_rate")
    says = "; ".join(taken) or "none of its numbers differs from the run's"
    note = f"The {kind} block of {name} becomes arguments, with this model's decay groups: {says}."
    if learning_rate and rate and not 1 / 3 <= rate / learning_rate <= 3 and not settings.is_flag("learning_rate"):
        note += f" The preset's learning rate is {learning_rate:g}."
    out.note(note)


def _refuse(kind: Any, params: Any, out: Findings) -> None:
    if not isinstance(params, Mapping):
        out.problem("optimizer.params", show(params), "It is no block.", "Write a block {...}.", id="params-no-block")
    elif isinstance(kind, str) and kind.lower() in NEAREST:
        fix = f"Remove the block, and use --optim {NEAREST[kind.lower()]}."
        why = "Trainer has no such optimizer."
        if kind.lower() in GONE:
            why = "DeepSpeed has removed its 1-bit optimizers, and would fail as it starts."
        out.problem("optimizer.type", show(kind), why, fix, id="optimizer-without-equal")
    else:
        guess = near(str(kind), ["AdamW", "Adam", "SGD", "Adagrad", "RMSprop", "Lion", "Lamb"])
        fix = f'Did you mean "{guess}"?' if guess else 'Write "type": "AdamW", or remove the block.'
        out.problem("optimizer.type", show(kind), "DeepSpeed has no such optimizer.", fix, id="unknown-optimizer")


def _take_numbers(params: Mapping[str, Any], name: str, adam: bool, settings: Settings, out: Findings) -> list[str]:
    """Take the rate, the decay, betas and eps; returns what has changed, for the note."""
    taken = []
    numbers = {**_NUMBERS, **({"eps": ("adam_epsilon", Amount)} if adam else {})}
    for key, (argument, kind) in numbers.items():
        path = f"optimizer.params.{key}"
        if params.get(key) in (None, "auto") or (value := number(kind, params[key], path, out)) is None:
            continue
        if take(settings, argument, float(value), path, name, out):
            taken.append(f"{argument} {value:g}")
    betas = params.get("betas")
    if adam and betas not in (None, "auto"):
        path = "optimizer.params.betas"
        if not isinstance(betas, list | tuple) or len(betas) != 2:
            fix = "Write two numbers, [0.9, 0.95]."
            out.problem(path, show(betas), "It is no pair of numbers.", fix, id="value-of-the-wrong-kind")
            return taken
        for argument, beta in zip(("adam_beta1", "adam_beta2"), betas, strict=True):
            value = number(_BETA, beta, path, out)
            if value is not None and take(settings, argument, float(value), path, name, out):
                taken.append(f"{argument} {value:g}")
    return taken


def _take_options(
    params: Mapping[str, Any], name: str, kind: str, own: tuple[str, ...], settings: Settings, out: Findings
) -> list[str]:
    """What else the block says: options of Trainer's own optimizer, ways of computing, or what cannot be done."""
    adam, options = not own, []
    known = {"lr", "weight_decay", *(("betas", "eps") if adam else ())}
    for key, value in params.items():
        path = f"optimizer.params.{key}"
        if key in known or value == "auto":
            continue
        if key in own:
            options.append(f"{key}={str(value).lower() if isinstance(value, bool) else value}")
        elif adam and key == "adam_w_mode" and value is False:
            _without_decoupling(params, kind, settings, out)
        elif key in _SAME_UPDATE and (value in _SAME_UPDATE[key]):
            leave_out(out, path, "the update is the same")
        elif key in _SAME_UPDATE:
            fix = f"Remove it, or write {show(_SAME_UPDATE[key][0])}."
            out.problem(path, show(value), "Trainer's optimizer does not do this.", fix, id="optimizer-option")
        else:
            guess = near(key, [*known, *_SAME_UPDATE, *own])
            fix = f'Did you mean "{guess}"?' if guess else "Remove it."
            out.problem(path, show(value), f"{kind} has no such parameter.", fix, id="unknown-parameter")
    if options:
        take(settings, "optim_args", ",".join(options), "optimizer.params", name, out)
    return [f"optim {settings.get('optim')}", *options] if own else []


def _without_decoupling(params: Mapping[str, Any], kind: str, settings: Settings, out: Findings) -> None:
    """`adam_w_mode: false` is Adam with L2: another update as soon as something decays. "AdamW" overrides it."""
    path = "optimizer.params.adam_w_mode"
    if kind.lower() == "adamw" or "weight_decay" not in params or not settings.get("weight_decay"):
        leave_out(out, path, "without decay, or under the name AdamW, it changes nothing")
    else:
        why = f"Adam with L2 regularisation: the decay of {settings.get('weight_decay')} would be part of the gradient."
        fix = 'Remove it for AdamW, or write "weight_decay": 0.'
        out.problem(path, "false", why, fix, id="adam-with-l2")
