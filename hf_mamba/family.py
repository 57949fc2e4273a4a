"""The contract of a model family, and the table of families.

A family is a folder under models/ whose `__init__` holds a `FAMILY`, and a row in FAMILIES. Everything outside models/
asks the family instead of knowing a model. Nothing here imports a model: rows are import strings, resolved when asked;
a family's formulas are torch-free, and its classes are import strings, too.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from hf_mamba.models.common.cost import Backend, Block, TokenFlops

# model_type -> where its FAMILY is
FAMILIES: dict[str, str] = {
    "mamba": "hf_mamba.models.mamba:FAMILY",
    "mamba2": "hf_mamba.models.mamba2:FAMILY",
    "granitemoehybrid": "hf_mamba.models.hybrid:FAMILY",
}

# model_types that look loadable and are not, with the reason
_OTHERS: dict[str, str] = {
    "falcon_mamba": "Falcon-Mamba normalises Δ, B and C with a weightless RMSNorm before the scan, which a Mamba-1 "
    "block does not do: its weights would load and give other numbers. Use transformers' FalconMambaForCausalLM.",
}


class Geometry(Protocol):
    """The sizes of a model that every family has; a family's own has more. Frozen, hashable, without None."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def tie_word_embeddings(self) -> bool: ...


@dataclass(frozen=True)
class Parameter:
    """One row of a family's table: a tensor as `named_parameters()` yields it.

    Attributes:
        name: the transformers name. shape: its sizes.
        component: what it is counted as, such as "embeddings"; all layers share their components' names.
        layer: -1 for the embeddings, then the block's number, the number of blocks for the final norm and the head.
        decays: whether weight decay touches it.
        fp32: whether it stays in fp32 in a model of a lower precision.
        matrices: the rows of each matrix that it stacks, which Muon orthogonalises; () where AdamW updates it.
    """

    name: str
    shape: tuple[int, ...]
    component: str
    layer: int
    decays: bool
    fp32: bool = False
    matrices: tuple[int, ...] = ()

    @functools.cached_property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Preset:
    """A named size: configuration fields, the batch it is trained with, and the published optimisation numbers.

    Attributes:
        config: configuration fields that differ from the defaults; with `model_type`, where that is not "mamba".
        seq_len: tokens per row.
        micro_batch_size, gradient_accumulation_steps: rows per device and micro-step; micro-steps per update.
        max_tokens: the training budget; steps follow from the batch of the actual world.
        learning_rate: the peak; min_lr: the floor of the schedule.
        warmup_ratio: share of the steps with a linear warm-up.
        source: where the training numbers come from.
        ranks: data-parallel ones with which the batch is the one that the rate is for.
        optim: what the rate is for, by the name of --optim.
        logging_steps: steps between two lines of the log.
        evaluations: how often the held-out data are looked at, the end included.
        guides: whether models of their own size take their numbers from it.
    """

    name: str
    config: dict[str, Any]
    seq_len: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    max_tokens: int
    learning_rate: float
    source: str
    min_lr: float = 1e-5
    warmup_ratio: float = 0.1
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0
    lr_scheduler_type: str = "cosine_with_min_lr"
    ranks: int = 8
    optim: str = "adamw_torch_fused"
    logging_steps: int = 10
    evaluations: int = 1
    guides: bool = True

    @property
    def rows(self) -> int:
        """The global batch that the rate is for."""
        return self.micro_batch_size * self.gradient_accumulation_steps * self.ranks


@dataclass(frozen=True)
class Original:
    """The checkpoint format of a family's authors, where it differs from transformers'.

    Attributes:
        recognises: whether a parsed config.json is one of this format.
        config_from: (fields, where) -> the family's fields; a ValueError names all that cannot be expressed.
        config_to: a configuration -> the format's fields; a ValueError likewise.
        names: original name -> transformers name, of the tensors whose names differ.
    """

    recognises: Callable[[Mapping[str, Any]], bool]
    config_from: Callable[[Mapping[str, Any], str], dict[str, Any]]
    config_to: Callable[[Any], dict[str, Any]]
    names: Mapping[str, str]


@dataclass(frozen=True)
class Gguf:
    """What llama.cpp calls a family's parts, where it has the family.

    Attributes:
        architecture: its name there.
        metadata: a configuration -> values by the names of gguf's GGUFWriter.add_*; a ValueError says what has no name.
        tensors: (configuration, our name, the tensor) -> [(a name that gguf's map knows, the tensor)].
    """

    architecture: str
    metadata: Callable[[Any], dict[str, Any]]
    tensors: Callable[[Any, str, Any], list[tuple[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the rest of the package may ask of a kind of model.

    Attributes:
        model_type: transformers' name of it. title: its name in prose, such as "Mamba".
        config, base, model: import strings "module:name" of the configuration, the bare model and the language model.
        geometry: a configuration (mapping of its fields, or object) -> its sizes, defaults filled in.
        table: sizes -> every parameter in the order of `named_parameters()`, a tied head left out.
        token_flops: (sizes, tokens of a row) -> the operations of one token.
        block: (sizes, layer) -> what that layer saves, and needs for a moment, in forward and backward.
        backends: ways of computing the operation -> what each saves and needs; a device's first one is its default.
        embedding, head: names of the embedding's and of an untied head's tensor.
        state_sizes: the sizes that a carried state depends on.
        auto_sizes: the sizes that a configuration may leave to be computed, by "auto".
        operation: sizes -> (name in hf_mamba.ops, what the choice of a backend depends on); None for plain torch.
        presets: the named sizes.
        original: its authors' own checkpoint format, where there is one.
        lora_targets: the layers that LoRA adapts by default.
        blocks: the classes of its layers, which FSDP gathers one by one.
        gguf: import string of its Gguf, where llama.cpp has the family.
        classifier: import string of the sequence classifier, where there is one.
        paper, tags: for the model card.
    """

    model_type: str
    title: str
    config: str
    base: str
    model: str
    geometry: Callable[[Any], Any]
    table: Callable[[Any], tuple[Parameter, ...]]
    token_flops: Callable[[Any, int], TokenFlops]
    block: Callable[[Any, int], Block]
    backends: Mapping[str, Backend]
    embedding: str
    head: str
    state_sizes: tuple[str, ...]
    auto_sizes: tuple[str, ...] = ()
    operation: Callable[[Any], tuple[str, dict[str, Any]]] | None = None
    presets: Mapping[str, Preset] = field(default_factory=dict)
    original: Original | None = None
    lora_targets: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    gguf: str = ""
    classifier: str = ""
    paper: str = ""
    tags: tuple[str, ...] = ()

    @property
    def config_class(self) -> Any:
        return _load(self.config)

    @property
    def base_class(self) -> Any:
        return _load(self.base)

    @property
    def model_class(self) -> Any:
        return _load(self.model)

    @property
    def classifier_class(self) -> Any:
        """The sequence classifier, or None."""
        return _load(self.classifier) if self.classifier else None

    @property
    def gguf_rules(self) -> Gguf | None:
        return _load(self.gguf) if self.gguf else None

    @property
    def prefix(self) -> str:
        """What the backbone's tensors begin with, such as "backbone."; a bare model is saved without it."""
        return self.embedding.split(".")[0] + "."

    def backends_on(self, device: str) -> tuple[str, ...]:
        """The backends that run on "cpu" or "cuda", the default one first."""
        return tuple(name for name, backend in self.backends.items() if device in backend.devices)

    def parameters(self, config: Any) -> tuple[Parameter, ...]:
        """The table of a configuration."""
        return self.table(self.geometry(config))


def _load(where: str) -> Any:
    module, _, name = where.partition(":")
    return getattr(import_module(module), name)


def get_family(model_type: str) -> Family:
    """The family of that model_type.

    Raises:
        ValueError: where there is none, with the reason.
    """
    if model_type in FAMILIES:
        return _load(FAMILIES[model_type])
    raise ValueError(f"model_type is {model_type!r}, which hf_mamba cannot load. {why_not(model_type)}")


def why_not(model_type: Any) -> str:
    """Why there is no family of that model_type, as a sentence."""
    known = " or ".join(repr(name) for name in FAMILIES)
    return _OTHERS.get(str(model_type), f"It loads model_type {known}.")


def family_of(config: Any) -> Family:
    """The family of a configuration, a mapping or an object; "mamba" where no model_type is written."""
    read = config.get if isinstance(config, Mapping) else functools.partial(getattr, config)
    return get_family(read("model_type", None) or "mamba")


def family_of_original(config: Mapping[str, Any]) -> Family | None:
    """The family whose authors' own format a parsed config.json is in, or None."""
    for family in map(get_family, FAMILIES):
        if family.original is not None and family.original.recognises(config):
            return family
    return None


def count_parameters(config: Any) -> dict[str, int]:
    """Parameters by component, over all layers, tied weights once; their sum is `num_parameters()` of the model.

    Args:
        config: a mapping of configuration fields, or a configuration.
    """
    counts: dict[str, int] = {}
    for row in family_of(config).parameters(config):
        counts[row.component] = counts.get(row.component, 0) + row.size
    return counts


def recipe_for(config: Mapping[str, Any]) -> Preset:
    """The training numbers of a model of its own size, after its family's presets; `source` says so in words.

    The peak rate lies on the line between the presets around it (both axes logarithmic), the budget is 20 tokens a
    parameter (Hoffmann et al. 2022), and rows and batch are those of the preset nearest in size.
    """
    family = family_of(config)
    presets = [preset for preset in (family.presets or all_presets()).values() if preset.guides]
    sizes = sorted(((sum(count_parameters(p.config).values()), p) for p in presets), key=lambda pair: pair[0])
    count = sum(count_parameters(config).values())
    distances = [abs(math.log(size) - math.log(count)) for size, _ in sizes]
    near = sizes[distances.index(min(distances))][1]
    rate = _between([(size, preset.learning_rate) for size, preset in sizes], count)
    source = f"for {_rounded(count)} parameters, after {family.title}'s presets ({near.name} is the nearest)"
    batch = near.seq_len, near.micro_batch_size, near.gradient_accumulation_steps
    tokens = max(20 * count, min(p.max_tokens for p in all_presets().values()))
    return Preset("", dict(config), *batch, tokens, float(f"{rate:.2g}"), source, ranks=near.ranks)


def _between(points: list[tuple[int, float]], at: int) -> float:
    """The value at `at` on the line through points in the order of x, both axes logarithmic; beyond them, the ends'."""
    if at <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if at <= x1:
            share = (math.log(at) - math.log(x0)) / (math.log(x1) - math.log(x0))
            return y0 * (y1 / y0) ** share
    return points[-1][1]


def _rounded(count: int) -> str:
    if count >= 10**15:
        return f"about 10^{len(str(count)) - 1}"
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.1f}{name}"
    return str(count)


def all_presets() -> dict[str, Preset]:
    """The named sizes of all families."""
    return {name: preset for model_type in FAMILIES for name, preset in get_family(model_type).presets.items()}


def get_preset(name: str) -> Preset:
    """The preset of that name; a ValueError with the nearest names otherwise."""
    presets = all_presets()
    if name in presets:
        return presets[name]
    near = difflib.get_close_matches(name, presets, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the presets are {', '.join(presets)}."
    raise ValueError(f"there is no preset {name!r}: {hint}")
