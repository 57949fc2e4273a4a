"""`hf-mamba convert SRC DST --to {transformers,state-spaces,gguf}`: between checkpoint formats, bit for bit.

Tensors are read memory-mapped and written shard by shard, so that a process needs memory for about one shard (pages of
the mapped files aside, which the kernel takes back at will). The destination appears whole, by a rename, or not at all.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from hf_mamba.files import beside, publish_folder
from hf_mamba.formats.folder import Checkpoint, Tensors, open_checkpoint, read_weights
from hf_mamba.interop.gguf_file import write_gguf
from hf_mamba.interop.outgoing import TEXTS, TOKENIZER_FILES, files_of

FORMATS = ("transformers", "state-spaces")  # folders; gguf is a file
_BESIDE = (GENERATION_CONFIG_NAME, *TOKENIZER_FILES, *TEXTS)  # what belongs to a model beside its weights


def convert(
    source: str | Path,
    destination: str | Path,
    to: str,
    *,
    pad_vocab_to: int | None = None,
    max_shard_size: int = 5 * 10**9,
    dtype: str = "f32",
    verify: bool = False,
) -> Path:
    """Write the checkpoint in `source` to the new folder `destination`, or file for gguf, in another format.

    Args:
        source: a folder that `MambaForCausalLM.from_pretrained` takes: transformers', the original's, or a DeepSpeed
            ZeRO training folder (whose fp32 weights are put together).
        to: "transformers", "state-spaces" or "gguf".
        pad_vocab_to: round the vocabulary up to a multiple of this. llama.cpp needs 8, and 16 suits every consumer. New
            rows are the mean of the others: their logit is the mean logit, so no new token is ever the likeliest.
        max_shard_size: bytes of one file. The original format has one file only.
        dtype: of a gguf file's matrices: "f32", "f16" or "bf16".
        verify: load both afterwards and compare their logits, which must be equal bit for bit.

    Returns:
        the destination.

    Raises:
        ValueError: where the source cannot be read or the format cannot express it; nothing is left behind.
    """
    source, destination = Path(source), Path(destination)
    if to not in (*FORMATS, "gguf"):
        raise ValueError(f"the format {to!r} is unknown; write one of {', '.join(FORMATS)}, gguf.")
    if to == "gguf" and verify:
        raise ValueError("a gguf file is no model that loads here: leave --verify out.")
    if not source.exists():
        raise ValueError(f"{source} is not a folder. A repository of the Hub is fetched first: hf download {source}.")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination} exists already and is not empty; nothing was written. Give a new folder.")
    if pad_vocab_to is not None and pad_vocab_to < 1:
        raise ValueError(f"pad_vocab_to is {pad_vocab_to}; it must be at least 1.")
    checkpoint = _with_head_checked(open_checkpoint(source), source)
    if to == "state-spaces" and checkpoint.family.original is None:
        raise ValueError(f"a {checkpoint.family.title} has no original state-spaces format; write --to transformers.")
    if pad_vocab_to is not None:
        checkpoint = _padded(checkpoint, pad_vocab_to)
    destination.parent.mkdir(parents=True, exist_ok=True)
    if to == "gguf":
        return write_gguf(checkpoint, source, destination, dtype)
    with beside(destination) as building:
        if to == "transformers":
            _write_transformers(checkpoint, building, max_shard_size)
        else:
            _write_original(checkpoint, building, max_shard_size)
        _copy_beside(source, building)
        if verify:
            _verify(source, building, checkpoint)
        publish_folder(building, destination, replace=False)
    return destination


def _with_head_checked(checkpoint: Checkpoint, source: Path) -> Checkpoint:
    """Leave out the second copy of a tied head, which must be one."""
    tensors, head, embedding = checkpoint.tensors, checkpoint.family.head, checkpoint.family.embedding
    if not checkpoint.config.tie_word_embeddings or head not in tensors.shapes:
        return checkpoint
    if not torch.equal(tensors.get(head), tensors.get(embedding)):
        raise ValueError(
            f"{source} says that the head is tied, but {head} differs from {embedding}. If the head is its own, set "
            "tie_word_embeddings (original format: tie_embeddings) to false."
        )
    shapes = {name: shape for name, shape in tensors.shapes.items() if name != head}
    return replace(checkpoint, tensors=replace(tensors, shapes=shapes))


def _padded(checkpoint: Checkpoint, multiple: int) -> Checkpoint:
    config, tensors = checkpoint.config, checkpoint.tensors
    size = -(-config.vocab_size // multiple) * multiple
    new = size - config.vocab_size
    if new == 0:
        return checkpoint
    rows = {name for name in (checkpoint.family.embedding, checkpoint.family.head) if name in tensors.shapes}

    def get(name: str) -> Tensor:
        tensor = tensors.get(name)
        if name not in rows:
            return tensor
        mean = tensor.to(torch.float64).mean(0).to(tensor.dtype)
        return torch.cat([tensor, mean.expand(new, -1)])

    shapes = {name: (size, *shape[1:]) if name in rows else shape for name, shape in tensors.shapes.items()}
    config = type(config).from_dict(config.to_dict() | {"vocab_size": size})
    return replace(checkpoint, config=config, tensors=Tensors(shapes, tensors.dtypes, get, mapped=False))


def _shards(tensors: Tensors, limit: int) -> Iterator[list[str]]:
    """Names in their order, in groups of at most `limit` bytes (a larger tensor is alone)."""
    names: list[str] = []
    size = 0
    for name in tensors.shapes:
        if names and size + tensors.size(name) > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensors.size(name)
    if names:
        yield names


def _write_shards(tensors: Tensors, folder: Path, limit: int) -> list[Path]:
    groups = list(_shards(tensors, limit))
    weight_map: dict[str, str] = {}
    files = []
    for number, names in enumerate(groups, 1):
        file = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file({name: tensors.get(name).contiguous() for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        files.append(folder / file)
    if len(groups) > 1:
        total = sum(tensors.size(name) for name in tensors.shapes)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    return files


def _write_transformers(checkpoint: Checkpoint, folder: Path, limit: int) -> None:
    config = type(checkpoint.config).from_dict(checkpoint.config.to_dict())
    config.architectures = [checkpoint.family.model_class.__name__]
    config.dtype = checkpoint.tensors.dtypes[checkpoint.family.embedding]
    config.save_pretrained(folder)
    _write_shards(checkpoint.tensors, folder, limit)


def _write_original(checkpoint: Checkpoint, folder: Path, limit: int) -> None:
    config, tensors, family = checkpoint.config, checkpoint.tensors, checkpoint.family
    assert family.original is not None
    to_original = {ours: theirs for theirs, ours in family.original.names.items()}
    (folder / CONFIG_NAME).write_text(json.dumps(family.original.config_to(config), indent=2) + "\n")
    ids = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ids).save_pretrained(folder)  # the original configuration has no place for them
    with tempfile.TemporaryDirectory(dir=folder) as spill:
        if not tensors.mapped:  # torch.save wants all tensors at once: let them be pages of files, not memory
            tensors = read_weights(_write_shards(tensors, Path(spill), limit), family)
        state = {to_original.get(name, name): tensors.get(name) for name in tensors.shapes}
        if config.tie_word_embeddings:  # the original's loader wants the head in the file, too
            state[family.head] = state[to_original.get(family.embedding, family.embedding)]
        torch.save(state, folder / WEIGHTS_NAME)


def _copy_beside(source: Path, folder: Path) -> None:
    for name, file in files_of(source, _BESIDE).items() if source.is_dir() else ():
        shutil.copyfile(file, folder / name)


@torch.no_grad()
def _verify(source: Path, folder: Path, checkpoint: Checkpoint) -> None:
    tokens = torch.randint(0, checkpoint.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
    logits = []
    for place in (source, folder):
        model = checkpoint.family.model_class.from_pretrained(place, dtype=torch.float32)
        tokens = tokens.clamp(max=model.config.vocab_size - 1)
        logits.append(model(tokens, use_cache=False).logits)
        del model
    known = logits[0].shape[-1]
    if not logits[0].isfinite().all():
        raise ValueError(
            f"the logits of {source} itself are not finite and cannot be compared; nothing was kept. Its "
            "weights are damaged: to convert them all the same, leave --verify out."
        )
    if not torch.equal(logits[0], logits[1][..., :known]):
        worst = (logits[0] - logits[1][..., :known]).abs().max().item()
        raise ValueError(f"the logits of the converted model differ by up to {worst:g}; it was not kept.")
