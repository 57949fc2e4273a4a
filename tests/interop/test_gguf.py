"""GGUF files: read back by gguf's own reader, computed by plain operations, tokens by what the file says."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_hybrid_readers import _llama_cpp as hybrid
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_mamba.cli import main
from hf_mamba.data.sources import parse_sources
from hf_mamba.data.tokenizer import train_tokenizer
from hf_mamba.family import get_family
from hf_mamba.interop.gguf_file import SPLITS, split_of

pytestmark = pytest.mark.skipif(find_spec("gguf") is None, reason="gguf is not installed (pip install .[test])")
TEXTS = ["def f(x): return x + 1 # it's", "  two  spaces\n\n\tand 12345 café 中文 😀<|endoftext|>more"]
SIZES: dict[str, dict[str, Any]] = {
    "mamba": {"hidden_size": 24, "state_size": 5},
    "mamba2": {"hidden_size": 24, "state_size": 5, "num_heads": 6, "head_dim": 8, "n_groups": 2},
    "granitemoehybrid": {
        "hidden_size": 24, "layer_types": ["mamba", "attention"], "num_attention_heads": 3, "num_key_value_heads": 1,
        "shared_intermediate_size": 20, "mamba_n_heads": 6, "mamba_d_head": 8, "mamba_d_state": 5,
        "tie_word_embeddings": True, "embedding_multiplier": 3.0, "residual_multiplier": 0.7, "logits_scaling": 1.5,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """A tokenizer as a run trains it on its own data."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text("\n\n".join(TEXTS * 20 + ["def g(y):\n    return [y, 'café'] * 12345\n"] * 20))
    return train_tokenizer(parse_sources([str(folder / "a.txt")]), 320, cache_dir=folder)


@pytest.fixture(scope="module", params=SIZES)
def folder(request, tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    family = get_family(request.param)
    config = family.config_class(num_hidden_layers=2, vocab_size=320, **SIZES[request.param])
    model = family.model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def convolved(u: torch.Tensor, t: dict[str, torch.Tensor], b: str) -> torch.Tensor:
    weight, bias = t[b + "conv1d.weight"], t[b + "conv1d.bias"]
    return F.silu(F.conv1d(F.pad(u.T, (3, 0)), weight[:, None], bias, groups=len(weight)).T)


def mamba(t: dict[str, torch.Tensor], config: Any, x: torch.Tensor, b: str) -> torch.Tensor:
    N, R = config.state_size, config.time_step_rank
    u, z = (x @ t[b + "in.weight"].T).chunk(2, -1)
    u = convolved(u, t, b)
    low, B, C = (u @ t[b + "x.weight"].T).split([R, N, N], -1)
    dt = F.softplus(low @ t[b + "dt.weight"].T + t[b + "dt.bias"])
    state, out = torch.zeros(u.shape[1], N), []
    for i in range(len(x)):
        state = torch.exp(dt[i][:, None] * t[b + "a"]) * state + (dt[i] * u[i])[:, None] * B[i]
        out.append(state @ C[i] + t[b + "d"] * u[i])
    return (torch.stack(out) * F.silu(z)) @ t[b + "out.weight"].T


def mamba2(t: dict[str, torch.Tensor], config: Any, x: torch.Tensor, b: str) -> torch.Tensor:
    N, G, M, P = config.state_size, config.n_groups, config.num_heads, config.head_dim
    E = M * P
    z, u, dt = (x @ t[b + "in.weight"].T).split([E, E + 2 * G * N, M], -1)
    xs, B, C = convolved(u, t, b).split([E, G * N, G * N], -1)
    dt, xs = F.softplus(dt + t[b + "dt.bias"]), xs.view(len(x), M, P)
    B, C = (m.view(len(x), G, N).repeat_interleave(M // G, 1) for m in (B, C))
    state, out = torch.zeros(M, P, N), []
    for i in range(len(x)):
        decay = torch.exp(dt[i] * t[b + "a"].flatten())[:, None, None]
        state = decay * state + (dt[i][:, None] * xs[i])[..., None] * B[i][:, None]
        out.append(((state @ C[i][..., None])[..., 0] + t[b + "d"].view(-1, 1) * xs[i]).flatten())
    y = (torch.stack(out) * F.silu(z)).view(len(x), G, -1)
    return norm(y, t[b + "norm.weight"], config.layer_norm_epsilon).flatten(1) @ t[b + "out.weight"].T


def logits(t: dict[str, torch.Tensor], config: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of one row (L,), by the file's tensors alone."""
    if config.model_type == "granitemoehybrid":
        return hybrid(t, json.loads(config.to_json_string()), ids)
    mix = mamba2 if config.model_type == "mamba2" else mamba
    x = t["token_embd.weight"][ids]
    for i in range(config.num_hidden_layers):
        x = x + mix(t, config, norm(x, t[f"blk.{i}.attn_norm.weight"], config.layer_norm_epsilon), f"blk.{i}.ssm_")
    x = norm(x, t["output_norm.weight"], config.layer_norm_epsilon)
    return x @ t.get("output.weight", t["token_embd.weight"]).T


def read(file: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    import gguf

    reader, tensors = gguf.GGUFReader(file), {}
    for tensor in reader.tensors:
        data = gguf.dequantize(tensor.data, tensor.tensor_type)
        tensors[tensor.name] = torch.tensor(data).view(*reversed(tensor.shape.tolist()))
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


@pytest.mark.parametrize(("dtype", "tolerance"), [("f32", 1e-4), ("f16", 2e-2), ("bf16", 1e-1)])
@torch.no_grad()
def test_logits_are_the_models(folder: Path, tmp_path: Path, dtype: str, tolerance: float):
    import gguf

    file = tmp_path / "model.gguf"
    assert main(["convert", str(folder), str(file), "--to", "gguf", "--dtype", dtype]) == 0
    fields, tensors = read(file)
    family = get_family(json.loads((folder / "config.json").read_text())["model_type"])
    model = family.model_class.from_pretrained(folder).eval()
    ids = torch.arange(17) * 5 % 300
    torch.testing.assert_close(logits(tensors, model.config, ids), model(ids[None]).logits[0], atol=tolerance, rtol=0)
    kinds = {tensor.name: tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(file).tensors}
    assert {kinds["token_embd.weight"], kinds["blk.0.ssm_in.weight"]} == {dtype}
    assert {kinds["output_norm.weight"], kinds["blk.0.ssm_a"], kinds["blk.0.ssm_conv1d.weight"]} == {"f32"}
    arch = fields["general.architecture"]
    assert (fields[f"{arch}.block_count"], fields[f"{arch}.vocab_size"]) == (2, 320)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_token_ids_are_the_tokenizers(folder: Path, tokenizer, tmp_path: Path):
    """By a BPE that is built of nothing but the file's lists, and llama.cpp's expression for its split's name."""
    assert main(["convert", str(folder), str(tmp_path / "model.gguf"), "--to", "gguf"]) == 0
    fields, _ = read(tmp_path / "model.gguf")
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    built = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens) if kinds[i] != 5}, merges))
    (expression,) = SPLITS["gpt-2"]
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(expression), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    built.add_special_tokens([AddedToken(tokens[i], normalized=False) for i, kind in enumerate(kinds) if kind == 3])
    for text in TEXTS:
        assert built.encode(text).ids == tokenizer(text).input_ids
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.add_bos_token"] is False


def test_a_split_is_known_by_what_it_does():
    for name, expressions in SPLITS.items():
        parts = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in expressions]
        own = Tokenizer(models.BPE())
        own.pre_tokenizer = pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(False, use_regex=False)])
        assert split_of(PreTrainedTokenizerFast(tokenizer_object=own), Path("here")) == name
    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="splits texts in none of the ways"):
        split_of(PreTrainedTokenizerFast(tokenizer_object=own), Path("here"))


def test_a_normalizer_is_said_and_one_that_changes_ordinary_text_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    shutil.copytree(folder, source := tmp_path / "source")
    file = source / "tokenizer.json"
    for name in ("NFC", "Lowercase"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": {"type": name}}))
        code = main(["convert", str(source), str(tmp_path / f"{name}.gguf"), "--to", "gguf"])
        assert code == (2 if name == "Lowercase" else 0)
    assert "normalises text first (NFC), and llama.cpp does not" in caplog.text
    assert "changes a text before it splits it (Lowercase)" in capsys.readouterr().err


def test_what_llama_cpp_cannot_say_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    family = get_family("mamba")
    odd = tmp_path / "odd"
    family.model_class(
        family.config_class(hidden_size=8, expand=3, num_hidden_layers=1, vocab_size=320)
    ).save_pretrained(odd)
    AutoTokenizer.from_pretrained(folder).save_pretrained(odd)
    assert main(["convert", str(odd), str(tmp_path / "a.gguf"), "--to", "gguf"]) == 2
    assert "twice hidden_size" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.gguf*"))
