"""What other programs read of a hybrid's files: transformers alone, llama.cpp by its converter's rules, vLLM."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from checkpoints import WORDS, make_tokenizer
from safetensors.torch import load_file, save_file

from hf_mamba import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM
from hf_mamba.preflight import resolve
from hf_mamba.training.build import build_model

IDS = torch.arange(2 * 17).view(2, 17) * 5 % 61
KINDS = ["mamba", "attention", "mamba"]


@pytest.fixture(scope="module")
def model() -> GraniteMoeHybridForCausalLM:
    torch.manual_seed(0)
    config = GraniteMoeHybridConfig(
        hidden_size=24, num_hidden_layers=3, vocab_size=64, layer_types=KINDS, num_attention_heads=3,
        num_key_value_heads=1, shared_intermediate_size=20, mamba_n_heads=6, mamba_d_head=8, mamba_d_state=5,
        tie_word_embeddings=True, embedding_multiplier=3.0, residual_multiplier=0.7, logits_scaling=1.5,
    )  # fmt: skip
    built = GraniteMoeHybridForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return built


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported")
    model.save_pretrained(path)
    return path


_ALONE = """
import sys, torch
sys.modules["hf_mamba"] = None  # an import of this package fails
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
assert type(model).__module__.startswith("transformers."), type(model)
ids = load_file(folder + "/ids.safetensors")["ids"]
with torch.no_grad():
    logits = model(ids).logits
    written = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
save_file({"logits": logits.contiguous(), "written": written}, folder + "/found.safetensors")
"""


@torch.no_grad()
def test_transformers_without_this_package(model, folder: Path):
    save_file({"ids": IDS}, folder / "ids.safetensors")
    command = [sys.executable, "-c", _ALONE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(folder / "found.safetensors")
    torch.testing.assert_close(found["logits"], model(IDS).logits, atol=1e-4, rtol=0)
    ours = model.generate(IDS, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(found["written"], ours)


# ---- llama.cpp: conversion/granite.py (GraniteHybridModel), mamba.py (Mamba2Model), src/models/granite-hybrid.cpp


def _permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """As LlamaModel.permute, which the converter does to q and k, positions or not."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _converted(config: dict, name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """A tensor of our file as the converter hands it on: (transformers' name, or a part's; the tensor)."""
    if "shared_mlp.input_linear" in name:
        width = config["shared_intermediate_size"]
        assert tensor.shape[0] == 2 * width
        stem = name.split("shared_mlp")[0]
        halves = zip(("gate_proj", "up_proj"), tensor.split(width), strict=True)
        return [(f"{stem}mlp.{part}.weight", half) for part, half in halves]
    name = name.replace("shared_mlp.output_linear", "mlp.down_proj")
    if name.endswith("q_proj.weight"):
        tensor = _permuted(tensor, config["num_attention_heads"])
    elif name.endswith("k_proj.weight"):
        tensor = _permuted(tensor, config["num_key_value_heads"])
    elif name.endswith(".dt_bias"):
        name = name.removesuffix("dt_bias") + "dt_proj.bias"
    elif name.endswith(".A_log"):
        tensor = -torch.exp(tensor)
    elif name.endswith("mamba.norm.weight"):
        tensor = tensor.view(config["mamba_n_groups"], -1)
    return [(name, tensor.squeeze(1) if "conv1d.weight" in name else tensor)]


def _llama_cpp(t: dict[str, torch.Tensor], config: dict, ids: torch.Tensor) -> torch.Tensor:
    """Logits (L, V) of one row, of GGUF tensors alone."""
    eps, scale = config["rms_norm_eps"], config["residual_multiplier"]
    H, K = config["num_attention_heads"], config["num_key_value_heads"]
    M, N, G = config["mamba_n_heads"], config["mamba_d_state"], config["mamba_n_groups"]

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight

    def attention(i: int, x: torch.Tensor) -> torch.Tensor:
        q, k, v = ((x @ t[f"blk.{i}.attn_{n}.weight"].T).view(len(x), -1, x.shape[1] // H) for n in "qkv")
        k, v = (m.repeat_interleave(H // K, 1) for m in (k, v))
        scores = torch.einsum("qhp,khp->hqk", q, k) * config["attention_multiplier"]
        scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
        mixed = torch.einsum("hqk,khp->qhp", scores.softmax(-1), v).flatten(1)
        return mixed @ t[f"blk.{i}.attn_output.weight"].T

    def mamba(i: int, x: torch.Tensor) -> torch.Tensor:
        b = f"blk.{i}.ssm_"
        E = 2 * x.shape[1]
        z, u, dt = (x @ t[b + "in.weight"].T).split([E, E + 2 * G * N, M], -1)
        u = F.conv1d(F.pad(u.T, (3, 0)), t[b + "conv1d.weight"][:, None], t[b + "conv1d.bias"], groups=len(u.T)).T
        xs, B, C = F.silu(u).split([E, G * N, G * N], -1)
        xs, dt = xs.view(len(x), M, -1), F.softplus(dt + t[b + "dt.bias"])
        state, out = x.new_zeros(M, E // M, N), []
        for step in range(len(x)):
            a = torch.exp(dt[step] * t[b + "a"].flatten())[:, None, None]
            state = a * state + (dt[step][:, None] * xs[step])[..., None] * B[step]
            out.append(((state @ C[step]) + t[b + "d"].view(-1, 1) * xs[step]).flatten())
        y = (torch.stack(out) * F.silu(z)).view(len(x), G, -1)
        return norm(y, t[b + "norm.weight"]).flatten(1) @ t[b + "out.weight"].T

    x = t["token_embd.weight"][ids] * config["embedding_multiplier"]
    for i, kind in enumerate(config["layer_types"]):
        mix = attention if kind == "attention" else mamba
        x = x + scale * mix(i, norm(x, t[f"blk.{i}.attn_norm.weight"]))
        h = norm(x, t[f"blk.{i}.ffn_norm.weight"])
        gate, up = (h @ t[f"blk.{i}.ffn_{part}.weight"].T for part in ("gate", "up"))
        x = x + scale * ((F.silu(gate) * up) @ t[f"blk.{i}.ffn_down.weight"].T)
    return norm(x, t["output_norm.weight"]) @ t["token_embd.weight"].T / config["logits_scaling"]


@pytest.mark.skipif(find_spec("gguf") is None, reason="gguf is not installed (pip install .[test])")
@torch.no_grad()
def test_llama_cpp_by_gguf(model, folder: Path, tmp_path: Path):
    import gguf

    config = json.loads((folder / "config.json").read_text())
    assert [i for i, kind in enumerate(config["layer_types"]) if kind == "attention"] == [1], "get_attn_layers"
    assert not config["num_experts_per_tok"], "else it is written as expert_used_count, and the loader fails"
    assert config["intermediate_size"] == config["shared_intermediate_size"], "feed_forward_length"
    assert config["hidden_act"] == "silu"
    assert config["vocab_size"] % 8 == 0
    assert config["mamba_expand"] * config["hidden_size"] % config["mamba_d_head"] == 0
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GRANITE_HYBRID, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "granitehybrid")
    writer.add_head_count_kv([config["num_key_value_heads"] * (kind == "attention") for kind in config["layer_types"]])
    written = 0
    for name, tensor in load_file(folder / "model.safetensors").items():
        for part, converted in _converted(config, name, tensor):
            new = names.get_name(part, try_suffixes=(".weight", ".bias"))
            assert new is not None, part
            writer.add_tensor(new, converted.contiguous().numpy())
            written += 1
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = {
        tensor.name: torch.tensor(tensor.data).view(*reversed(tensor.shape.tolist()))
        for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors
    }
    assert len(read) == written
    for row, expected in zip(IDS, model(IDS).logits, strict=True):
        torch.testing.assert_close(_llama_cpp(read, config, row), expected, atol=1e-4, rtol=0)


# ---- vLLM: vllm/model_executor/models/granitemoehybrid.py


def test_vllms_contract(folder: Path):
    """The fields that it reads, the kinds that it knows, and a parameter of the right shape for every tensor."""
    config = json.loads((folder / "config.json").read_text())
    for field in ("mamba_d_state", "mamba_d_conv", "mamba_expand", "mamba_conv_bias", "mamba_proj_bias",
                  "mamba_n_groups", "mamba_n_heads", "mamba_d_head", "rms_norm_eps", "hidden_act", "num_local_experts",
                  "shared_intermediate_size", "residual_multiplier", "embedding_multiplier", "attention_multiplier",
                  "logits_scaling", "num_attention_heads", "num_key_value_heads", "attention_bias",
                  "position_embedding_type", "layer_types", "tie_word_embeddings", "vocab_size"):  # fmt: skip
        assert field in config, field
    assert set(config["layer_types"]) <= {"attention", "mamba"}
    assert config["position_embedding_type"] != "rope"
    d, E, F_, W, H = 24, 48, 20, 48 + 2 * 5, 6
    expected: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (64, d), "model.norm.weight": (d,)}
    for i, kind in enumerate(KINDS):
        own: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,),
            "shared_mlp.input_linear.weight": (2 * F_, d), "shared_mlp.output_linear.weight": (d, F_),
        }  # fmt: skip
        if kind == "attention":
            shapes = {"q_proj": (d, d), "k_proj": (8, d), "v_proj": (8, d), "o_proj": (d, d)}
            own |= {f"self_attn.{name}.weight": shape for name, shape in shapes.items()}
        else:
            parts: dict[str, tuple[int, ...]] = {
                "in_proj.weight": (E + W + H, d), "conv1d.weight": (W, 1, 4), "conv1d.bias": (W,), "norm.weight": (E,),
                "out_proj.weight": (d, E), "A_log": (H,), "D": (H,), "dt_bias": (H,),
            }  # fmt: skip
            own |= {f"mamba.{name}": shape for name, shape in parts.items()}
        expected |= {f"model.layers.{i}.{name}": shape for name, shape in own.items()}
    found = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    assert found == expected


@pytest.mark.parametrize(("seq_len", "said"), [(256, 2048), (4096, 4096)])
def test_a_file_says_the_trained_length_where_it_is_longer(seq_len: int, said: int):
    """vLLM serves no longer context than `max_position_embeddings`, which nothing in the model depends on."""
    values = {"preset": "tiny_hybrid", "seq_len": seq_len, "max_steps": 1, "resume": "never"}
    plan = resolve(values, world_size=1, device="cpu").require()
    built = build_model(plan, make_tokenizer(WORDS))
    assert built.config.max_position_embeddings == said
