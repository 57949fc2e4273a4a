"""The model card: what the model is, what it was trained on and how, and how to use it, from the run's own records."""

import html
import json
import math
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_mamba.family import Family, family_of
from hf_mamba.names import LOSS_CURVE, RUN_FILE
from hf_mamba.redaction import command_line, redact, without_paths, without_secrets
from hf_mamba.run.processes import typed_command

CARD_FILE = "README.md"
_PACKAGES = ("hf_mamba", "torch", "transformers", "accelerate", "deepspeed", "datasets", "tokenizers", "triton")
_MAX_EVALUATIONS = 12
_LARGEST_LOSS = 50.0  # nats; a perplexity above says nothing


def write_model_card(
    folder: Path,
    plan: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    command: Sequence[str] | None = None,
) -> Path:
    """Write README.md to a model's folder.

    Where files lie on this machine is left out of it.

    Args:
        folder: the folder with the model; its loss_curve.png is shown where there is one, and the data's fingerprint is
            read from the run.json beside or above it.
        plan: `Plan.to_dict()`; may be empty for a model of unknown origin.
        history: the lines of the run's log; see `read_history`.
        command: the launch command; by default as this process was started, empty to leave it out.

    Returns:
        The card's path.
    """
    plan = without_secrets(plan)
    family = family_of(plan.get("model_config") or {})
    name = _inline(f"{family.title} {plan.get('preset') or _size(plan)}")
    evaluations = [row for row in history if "eval_loss" in row]
    sections = [
        f"# {name}",
        _summary(plan, family, history),
        _usage(family),
        _training(plan, command),
        _curve(folder, evaluations),
        _data(folder),
        _versions(),
        _plan_section(plan),
    ]
    body = "\n\n".join(section for section in sections if section)
    front = _front_matter(name, family, plan, evaluations).to_yaml()
    card = ModelCard(f"---\n{front}\n---\n\n{without_paths(redact(body))}\n")
    card.save(folder / CARD_FILE)
    return folder / CARD_FILE


def _front_matter(
    name: str, family: Family, plan: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]]
) -> ModelCardData:
    """The metadata; what was not said or measured is left out."""
    said = plan.get("card") or {}
    results = _results(plan, evaluations[-1]) if evaluations else []
    return ModelCardData(
        license=said.get("license"),
        language=said.get("language") or None,
        datasets=said.get("datasets") or None,
        metrics=[result.metric_type for result in results] or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*family.tags, "hf_mamba"],
        model_name=name,
        eval_results=results or None,
    )


def _results(plan: Mapping[str, Any], row: Mapping[str, Any]) -> list[EvalResult]:
    """The last evaluation, as the model-index has it."""
    own = (plan.get("data") or {}).get("eval_sources")
    loss, bits = float(row["eval_loss"]), row.get("eval_bits_per_byte")
    measured = [("loss", "cross-entropy, nats per token", loss)]
    if loss < _LARGEST_LOSS:
        measured.append(("perplexity", "perplexity per token", math.exp(loss)))
    if isinstance(bits, float):
        measured.append(("bits_per_byte", "bits per byte of text", bits))
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out",
            dataset_name="data held apart for evaluation" if own else "held-out part of the training data",
            metric_type=kind,
            metric_name=metric,
            metric_value=round(value, 4),
        )
        for kind, metric, value in measured
        if math.isfinite(value)
    ]


def _size(plan: Mapping[str, Any]) -> str:
    total = (plan.get("parameters") or {}).get("estimated")
    if not total:
        return ""
    unit, letter = next(row for row in ((1e9, "B"), (1e6, "M"), (1e3, "K"), (0, "")) if total >= 0.9995 * row[0])
    return f"{total / (unit or 1):.3g}{letter}"


def _summary(plan: Mapping[str, Any], family: Family, history: Sequence[Mapping[str, Any]]) -> str:
    config = plan.get("model_config") or {}
    paper = f" ({family.paper})" if family.paper else ""
    lines = [f"A {family.title} language model{paper}, pretrained with hf_mamba."]
    if config.get("hidden_size"):
        lines.append(
            f"{config['num_hidden_layers']} layers of width {config['hidden_size']}, "
            f"vocabulary {config.get('vocab_size', 50280):,}"
            + (f", {plan['parameters']['estimated']:,} parameters." if _size(plan) else ".")
        )
    step = max((int(row["step"]) for row in history if "step" in row), default=0)
    if step and plan.get("tokens_per_step"):
        seen = step * plan["tokens_per_step"]
        lines.append(f"Trained for {step:,} of {plan.get('total_steps') or step:,} steps: {seen:,} tokens.")
    return " ".join(lines)


def _usage(family: Family) -> str:
    """How to load the model: by transformers alone where it knows the model_type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    stock = family.model_type in CONFIG_MAPPING_NAMES
    ours, register = ("", "") if stock else ("import hf_mamba\n", "hf_mamba.register()\n")
    code = (
        f"{ours}from transformers import AutoModelForCausalLM, AutoTokenizer\n\n{register}"
        'repo = "the name of this repository, or a folder"\n'
        "tokenizer = AutoTokenizer.from_pretrained(repo)\nmodel = AutoModelForCausalLM.from_pretrained(repo)\n"
        'inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))\n"
    )
    if not stock:
        return f"## Use\n\ntransformers alone has no {family.title}.\n\n```python\n{code}```"
    return (
        f"## Use\n\nThe files are stock: no package but transformers is needed.\n\n```python\n{code}```\n\n"
        "`import hf_mamba; hf_mamba.register()` before it gives the same model with fast kernels, packing and padding."
    )


def _training(plan: Mapping[str, Any], command: Sequence[str] | None) -> str:
    rows = [
        ("preset", plan.get("preset")),
        ("tokens", plan.get("total_tokens")),
        ("steps", plan.get("total_steps")),
        ("tokens a step", plan.get("tokens_per_step")),
        ("sequence length", plan.get("seq_len")),
        ("sequences a step", plan.get("global_batch_size")),
        ("warm-up steps", plan.get("warmup_steps")),
        ("z-loss", plan.get("z_loss") or None),
        ("precision", plan.get("dtype")),
    ]
    arguments = plan.get("training_arguments") or {}
    rows += [(key.replace("_", " "), arguments.get(key)) for key in ("learning_rate", "weight_decay", "max_grad_norm")]
    launch = command_line(typed_command() if command is None else command)
    table = _table(("", ""), [(key, value) for key, value in rows if value is not None])
    return f"## Training\n\n{table}" + (f"\n\nLaunched with\n\n{_fenced(launch)}" if launch else "")


def _curve(folder: Path, evaluations: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    if (folder / LOSS_CURVE).is_file():
        parts.append(f"![Training and evaluation loss]({LOSS_CURVE})")
    if evaluations:
        kept = list(evaluations)
        if len(kept) > _MAX_EVALUATIONS:  # the first, the last, and an even choice between
            last = len(kept) - 1
            kept = [kept[round(i * last / (_MAX_EVALUATIONS - 1))] for i in range(_MAX_EVALUATIONS)]
        rows = [
            (row.get("step", ""), f"{row['eval_loss']:.4f}", _perplexity(row["eval_loss"]), _bits(row)) for row in kept
        ]
        parts.append(_table(("step", "evaluation loss", "perplexity", "bits per byte"), rows))
    return "## Evaluation\n\n" + "\n\n".join(parts) if parts else ""


def _bits(row: Mapping[str, Any]) -> str:
    bits = row.get("eval_bits_per_byte")
    return f"{bits:.4f}" if isinstance(bits, float) else "–"


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.2f}" if loss < _LARGEST_LOSS else "–"


def _data(folder: Path) -> str:
    for file in (folder / RUN_FILE, folder.parent / RUN_FILE):
        if file.is_file():
            data = without_secrets(json.loads(file.read_text()).get("data"))
            return f"## Data\n\nFingerprint of the token stream:\n\n{_fenced(json.dumps(data, indent=2), 'json')}"
    return ""


def _versions() -> str:
    rows = [("Python", platform.python_version())]
    for package in _PACKAGES:
        try:
            rows.append((package, version(package)))
        except PackageNotFoundError:
            continue
    return f"## Versions\n\n{_table(('package', 'version'), rows)}"


def _plan_section(plan: Mapping[str, Any]) -> str:
    if not plan:
        return ""
    text = json.dumps(plan, indent=2, default=str)
    return f"## Plan\n\n<details><summary>every number of the run</summary>\n\n{_fenced(text, 'json')}\n\n</details>"


def _fenced(text: str, language: str = "") -> str:
    """A block of code that nothing inside can close."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _table(head: tuple[str, ...], rows: Sequence[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return _inline(text).replace("|", "\\|")


def _inline(text: str) -> str:
    """On one line, and without HTML of its own."""
    return html.escape(" ".join(text.split()), quote=False)
