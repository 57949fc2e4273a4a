"""The activation formulas against the bytes that autograd keeps: equal, not near."""

import os
import subprocess
import sys
from itertools import accumulate

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_mamba import MambaConfig, MambaForCausalLM, ops
from hf_mamba.cli import main
from hf_mamba.family import get_family, get_preset
from hf_mamba.models.common.cost import Shape, loss_forward, saved_by_batch, saved_by_head, total
from hf_mamba.models.mamba.memory import BACKENDS, saved
from hf_mamba.models.mamba.table import Geometry
from hf_mamba.preflight.cost.memory import job_of, saved_by_layers, show


def build(dtype: torch.dtype, **config: object) -> MambaForCausalLM:
    model = MambaForCausalLM(MambaConfig(**config)).train()
    return model.to(dtype) if dtype != torch.float32 else model


def batch_of(model: MambaForCausalLM, batch: int, length: int, packed: bool) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, model.config.vocab_size, (batch, length))
    out = {"input_ids": ids, "labels": ids.clone()}
    if packed:
        out["position_ids"] = (torch.arange(length) % max(1, length // 2)).expand(batch, -1).contiguous()
    return out


def kept_by_hooks(model: MambaForCausalLM, inputs: dict[str, torch.Tensor]) -> int:
    """Bytes of the distinct storages that autograd saves, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.nbytes():
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(**inputs).loss
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


def kept_by_allocator(model: MambaForCausalLM, inputs: dict[str, torch.Tensor]) -> int:
    """Bytes that a forward leaves allocated, by the allocator's own account, without the loss itself."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss = model(**inputs).loss
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return sum(e.nbytes() for e in events) - loss.nbytes


def shape_of(model: MambaForCausalLM, dtype: torch.dtype, batch: int, length: int, packed: bool) -> Shape:
    residual = 4 if model.config.residual_in_fp32 else dtype.itemsize
    return Shape(Geometry.of(model.config), batch, length, dtype.itemsize, residual, packed)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@given(
    d=st.integers(1, 40),
    layers=st.integers(1, 3),
    N=st.integers(1, 20),
    k=st.integers(2, 5),
    R=st.integers(1, 9),
    V=st.integers(2, 90),
    expand=st.integers(1, 3),
    batch=st.integers(1, 4),
    length=st.integers(2, 140),
    packed=st.booleans(),
    bf16=st.booleans(),
    residual_in_fp32=st.booleans(),
    tied=st.booleans(),
)
@example(8, 2, 4, 4, 2, 30, 2, 1, 32, False, False, True, True)
@example(8, 2, 4, 4, 2, 30, 2, 2, 33, True, True, True, False)
@settings(max_examples=20)
def test_saved_bytes_equal_autograds(
    backend, d, layers, N, k, R, V, expand, batch, length, packed, bf16, residual_in_fp32, tied
):
    if ops.available_backends()[backend] != "available":
        pytest.skip(ops.available_backends()[backend])
    dtype = torch.bfloat16 if bf16 else torch.float32
    model = build(
        dtype,
        hidden_size=d,
        num_hidden_layers=layers,
        state_size=min(N, 16) if backend == "cpu" else N,
        conv_kernel=k,
        time_step_rank=R,
        vocab_size=V,
        expand=expand,
        residual_in_fp32=residual_in_fp32,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )
    with ops.backend(backend):
        kept = kept_by_hooks(model, batch_of(model, batch, length, packed))
    assert kept == total(saved(shape_of(model, dtype, batch, length, packed), BACKENDS[backend]))


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("tied", [False, True])
def test_saved_bytes_under_autocast(backend, tied):
    """A 16-bit run without DeepSpeed: fp32 weights, whose casts autograd keeps."""
    if ops.available_backends()[backend] != "available":
        pytest.skip(ops.available_backends()[backend])
    model = build(
        torch.float32, hidden_size=24, num_hidden_layers=3, vocab_size=70, pad_token_id=0, tie_word_embeddings=tied
    )
    shape = Shape(Geometry.of(model.config), 2, 45, 2, packed=True, autocast=True)
    with ops.backend(backend), torch.autocast("cpu", torch.bfloat16):
        kept = kept_by_hooks(model, batch_of(model, 2, 45, True))
    assert kept == total(saved(shape, BACKENDS[backend]))


SIZES = {
    "mamba2": {"num_heads": 6, "head_dim": 8, "state_size": 5, "n_groups": 2},
    "granitemoehybrid": {  # a layer of Mamba-2 and one of attention
        "num_attention_heads": 4, "num_key_value_heads": 2, "shared_intermediate_size": 20, "mamba_n_heads": 6,
        "mamba_d_head": 8, "mamba_d_state": 5, "mamba_n_groups": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize(
    "own",
    [
        {"model_type": "mamba2"},
        {"model_type": "mamba2", "time_step_limit": (0.01, 0.1)},
        {"model_type": "mamba2", "n_groups": 1, "residual_in_fp32": False},
        {"model_type": "granitemoehybrid"},
        {"model_type": "granitemoehybrid", "num_key_value_heads": 4, "residual_in_fp32": False},
        {"model_type": "granitemoehybrid", "residual_multiplier": 0.3, "logits_scaling": 2.0},
    ],
    ids=lambda own: " ".join(f"{name}={value}" for name, value in own.items()),
)
def test_saved_bytes_of_other_families(own, precision, backend):
    """Over a chunk's length, packed, tied."""
    if ops.available_backends()[backend] != "available":
        pytest.skip(ops.available_backends()[backend])
    family = get_family(own["model_type"])
    fields = {
        "vocab_size": 70,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    }
    config = family.config_class(**(fields | SIZES[family.model_type] | own))
    dtype, autocast = (torch.bfloat16 if precision == "bf16" else torch.float32), precision == "autocast"
    model = family.model_class(config).train().to(dtype)
    width = 2 if autocast else dtype.itemsize
    residual = 4 if config.residual_in_fp32 else dtype.itemsize
    shape = Shape(family.geometry(config), 2, 140, width, residual, packed=True, autocast=autocast)
    with ops.backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        kept = kept_by_hooks(model, batch_of(model, 2, 140, True))
    blocks = [family.block(shape.model, i).saved(shape, family.backends[backend]) for i in range(2)]
    assert kept == total(saved_by_batch(shape), *blocks, saved_by_head(shape))


def test_what_a_hybrid_saves_is_shown_by_kind_of_layer(capsys):
    config, sizes = get_preset("350m_hybrid").config, {"seq_len": 512, "world_size": 1, "dtype": "bf16"}
    job = job_of(config, **sizes)
    found = saved_by_layers(job, 4)
    assert list(found) == ["mamba", "mlp", "attention"]
    shape = Shape(job.model, 4, 512, 2, 4, True, "cuda", True)
    blocks = [job.family.block(job.model, i) for i in range(job.model.num_hidden_layers)]
    saved = [block.saved(shape, job.family.backends[job.backend]) for block in blocks]
    assert sum(found.values()) == total(*saved)
    one = saved_by_layers(job_of(config | {"layer_types": [*["mamba"] * (len(blocks) - 1), "attention"]}, **sizes), 4)
    attention = config["layer_types"].count("attention")
    assert one["mlp"] == found["mlp"], "each layer has one"
    assert found["attention"] == attention * one["attention"]
    assert found["mamba"] * (len(blocks) - 1) == one["mamba"] * (len(blocks) - attention)
    assert main(["memory", "--preset", "350m_hybrid", "--micro_batch_size", "4", "--seq_len", "512"]) == 0
    assert f"without checkpointing: mamba {show(found['mamba'])}, mlp" in capsys.readouterr().out
    assert list(saved_by_layers(job_of(get_preset("130m_mamba").config, **sizes), 1)) == ["layers"]


def test_a_hybrids_attention_on_a_gpu_is_linear_in_16_bits_and_quadratic_behind_a_mask():
    """Packed rows in fp32 have a mask of every pair: 4 x 3,000 x 3,000 x 4 bytes of it in each such layer."""
    family = get_family("granitemoehybrid")
    config = get_preset("350m_hybrid").config
    attention = family.block(family.geometry(config), config["layer_types"].index("attention"))

    def kept(length: int, width: int, packed: bool) -> int:
        shape = Shape(family.geometry(config), 4, length, width, packed=packed, device="cuda")
        return total(attention.saved(shape, family.backends["triton"]))

    for width, packed in ((2, True), (2, False), (4, False)):
        assert kept(3000, width, packed) == 3 * kept(1000, width, packed)
    assert kept(3000, 4, True) - kept(3000, 4, False) == 4 * 3000 * 3000 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("batch", "length"), [(1, 64), (3, 50)])
def test_saved_bytes_equal_the_allocators(checkpointing, packed, dtype, batch, length):
    """Also sees what is kept without being saved by autograd: a checkpoint's inputs and random state."""
    model = build(dtype, hidden_size=24, num_hidden_layers=3, vocab_size=70, pad_token_id=0)
    if checkpointing:
        model.gradient_checkpointing_enable()
    inputs = batch_of(model, batch, length, packed)
    with ops.backend("torch"):
        model(**inputs)
        kept = kept_by_allocator(model, inputs)
    given_already = inputs["input_ids"].nbytes
    predicted = saved(shape_of(model, dtype, batch, length, packed), BACKENDS["torch"], checkpointing)
    assert kept + given_already == total(predicted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "d", "V"),
    [(400, 16, 900), (700, 16, 900), (90, 300, 9000), pytest.param(600, 2100, 9000, marks=pytest.mark.slow)],
)
def test_the_largest_moment_of_the_loss(dtype, tokens, d, V):
    """One chunk of rows and two, logits that dominate and a head that does: within 1% of the allocator's peak."""
    hidden, weight = (torch.randn(n, d, dtype=dtype).requires_grad_() for n in (tokens, V))
    labels = torch.randint(0, V, (tokens,))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        ops.linear_cross_entropy(hidden, weight, labels)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    peak = max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    geometry = Geometry.of({"hidden_size": d, "num_hidden_layers": 1, "vocab_size": V})
    shape = Shape(geometry, 1, tokens, dtype.itemsize)
    around = shape.narrow(dtype.itemsize) + 16 * tokens  # the normed hidden states and the labels
    predicted = loss_forward(shape) - around + saved_by_head(shape)["loss"]
    assert predicted == pytest.approx(peak, rel=0.01)


INTERPRETED = """
import torch, triton
from hf_mamba import ops
from tests.preflight.test_memory_activations import *
for packed in (False, True):
    model = build(torch.float32, hidden_size=16, num_hidden_layers=2, vocab_size=40, pad_token_id=0)
    with ops.backend("triton"):
        kept = kept_by_hooks(model, batch_of(model, 2, 70, packed))
    predicted = total(saved(shape_of(model, torch.float32, 2, 70, packed), BACKENDS["triton"]))
    assert kept == predicted, (kept, predicted)
"""


def test_triton_saved_bytes():
    """The same with the Triton kernels, in Triton's interpreter."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
