"""`hf-mamba convert SRC DST.gguf --to gguf`: a model and its tokenizer as one file for llama.cpp.

A family says how its tensors and sizes are called there (`Family.gguf`). llama.cpp's own converter knows a tokenizer by
a checksum, and so none that was trained on own data; here it is known by how it splits texts.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_mamba.files import beside, fsync_path
from hf_mamba.formats.folder import Checkpoint

logger = logging.getLogger(__name__)

TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_LEAST_ROWS = 8  # llama.cpp's matrices of a vocabulary come in multiples

# How llama.cpp splits a text before BPE, by its name for it (src/llama-vocab.cpp): expressions, one after the other.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_NEWER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SPLITS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_NEWER % "{1,3}",),
    "qwen2": (_NEWER % "",),
}
PROBES = (
    "def f(x):\n    return x + 1234567  # it's DON'T\n\n\n\tend",
    " Two  spaces, 3.14e-5; naïve café — “quotes” 中文字符 😀!\r\n",
    "a_b-c/d\\e ...??? 12a34 we'll I'D\t\t x\u00a0y ½ ² Ⅷ 一二",
)


def write_gguf(checkpoint: Checkpoint, source: Path, file: Path, dtype: str) -> Path:
    """Write the file, whole or not at all.

    Args:
        checkpoint: with a vocabulary of a multiple of 8 rows.
        source: the folder that has the tokenizer.
        dtype: "f32", "f16" or "bf16" of the matrices; vectors, the convolution and A stay f32, as llama.cpp has them.

    Raises:
        ValueError: gguf is not installed, or llama.cpp has no way to say what this model or its tokenizer does.
    """
    try:
        import gguf
    except ImportError:
        raise ValueError("the package gguf is not installed: run pip install gguf.") from None
    config, family = checkpoint.config, checkpoint.family
    rules = family.gguf_rules
    if rules is None:
        raise ValueError(f"llama.cpp has no {family.title}; write --to transformers.")
    if config.vocab_size % _LEAST_ROWS:
        raise ValueError(
            f"vocab_size is {config.vocab_size}, no multiple of {_LEAST_ROWS}: add --pad_vocab_to {_LEAST_ROWS}."
        )
    metadata, vocabulary = rules.metadata(config), _vocabulary(source, config.vocab_size)
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == rules.architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    writer = gguf.GGUFWriter(None, rules.architecture)
    for key, value in metadata.items():
        getattr(writer, f"add_{key}")(value)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type({"f32": 0, "f16": 1, "bf16": 32}[dtype])
    for key, value in vocabulary.items():
        getattr(writer, f"add_{key}")(value)
    kinds = {torch.float16: gguf.GGMLQuantizationType.F16, torch.bfloat16: gguf.GGMLQuantizationType.BF16}
    for name in checkpoint.tensors.shapes:
        for part, tensor in rules.tensors(config, name, checkpoint.tensors.get(name)):
            new = names.get_name(part, try_suffixes=(".weight", ".bias"))
            if new is None:
                raise ValueError(f"llama.cpp has no place for {name}.")
            data = _stored(tensor, new, TYPES[dtype])
            writer.add_tensor(new, _numpy(data), raw_dtype=kinds.get(data.dtype))
    with beside(file) as building:
        whole = building / file.name
        writer.write_header_to_file(whole)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        fsync_path(whole)
        whole.rename(file)
    return file


def _stored(tensor: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """The tensor in the dtype that llama.cpp reads it in."""
    matrix = tensor.dim() == 2 and not name.endswith(("ssm_conv1d.weight", "ssm_a", "ssm_d", "norm.weight"))
    return tensor.to(dtype if matrix else torch.float32).contiguous()


def _numpy(tensor: Tensor) -> Any:
    return tensor.view(torch.uint8).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _vocabulary(source: Path, rows: int) -> dict[str, Any]:
    """What the file says of the tokenizer, by the names of the writer's methods."""
    from transformers import AutoTokenizer

    file = source / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{source} has no tokenizer.json: llama.cpp reads a model's text by it.")
    described = json.loads(file.read_text(encoding="utf-8"))
    model = described["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise ValueError(f"the tokenizer of {source} is no byte-level BPE, which is all that is written here.")
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    _check_normalizer(tokenizer, source)
    tokens, kinds = [f"[PAD{i}]" for i in range(rows)], [5] * rows  # unused
    for text, number in tokenizer.get_vocab().items():
        tokens[number], kinds[number] = text, 1  # normal
    for number, added in tokenizer.added_tokens_decoder.items():
        tokens[number], kinds[number] = added.content, 3 if added.special else 4  # control; written by a user
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    first = tokenizer("a").input_ids[0] == tokenizer.bos_token_id is not None
    out: dict[str, Any] = {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": split_of(tokenizer, source),
        "token_list": tokens,
        "token_types": kinds,
        "token_merges": merges,
        "add_bos_token": first,
        "add_eos_token": False,
    }
    for kind in ("bos", "eos", "pad", "unk"):
        if (number := getattr(tokenizer, f"{kind}_token_id")) is not None:
            out[f"{kind}_token_id"] = number
    if template := getattr(tokenizer, "chat_template", None):
        out["chat_template"] = template
    return out


def _check_normalizer(tokenizer: Any, source: Path) -> None:
    """llama.cpp tokenises a text as it stands.

    Raises:
        ValueError: the tokenizer changes ordinary text first.
    """
    normalizer = tokenizer.backend_tokenizer.normalizer
    if normalizer is None:
        return
    kind = type(normalizer).__name__
    if any(normalizer.normalize_str(text) != text for text in PROBES):
        raise ValueError(
            f"the tokenizer of {source} changes a text before it splits it ({kind}), and llama.cpp cannot: it would "
            "read other tokens. Write --to transformers."
        )
    logger.warning(
        "the tokenizer of %s normalises text first (%s), and llama.cpp does not: a text in another form of Unicode, "
        "such as an e and its accent as two characters, gets other tokens there",
        source,
        kind,
    )


def split_of(tokenizer: Any, source: Path) -> str:
    """llama.cpp's name for how this tokenizer splits texts before BPE, found by its behaviour.

    Raises:
        ValueError: none of those known here does it so.
    """
    from tokenizers import Regex, pre_tokenizers

    own = tokenizer.backend_tokenizer.pre_tokenizer
    for name, expressions in SPLITS.items():
        parts = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in expressions]
        theirs = pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        if own is not None and all(
            [piece for piece, _ in own.pre_tokenize_str(text)] == [piece for piece, _ in theirs.pre_tokenize_str(text)]
            for text in PROBES
        ):
            return name
    raise ValueError(
        f"the tokenizer of {source} splits texts in none of the ways that are known here ({', '.join(SPLITS)}): "
        "llama.cpp's own converter may know it."
    )
