"""FLOPs against torch's own counter, exactly; durations, recorded throughputs and MFU."""

import json
from datetime import UTC, datetime

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hf_mamba import MambaConfig, MambaForCausalLM, ops
from hf_mamba.family import count_parameters, get_family, get_preset
from hf_mamba.models.mamba.presets import PRESETS
from hf_mamba.models.mamba.table import Geometry, token_flops
from hf_mamba.models.mamba2.table import token_flops as token_flops_of_mamba2
from hf_mamba.preflight.cost import duration
from hf_mamba.preflight.cost.gpus import GPUS, find_gpu, peak_flops, utilisation
from hf_mamba.sizes import SSD_CHUNK

FAMILY, HYBRID = get_family("mamba"), get_family("granitemoehybrid")
GEOMETRY = Geometry.of(get_preset("130m_mamba").config)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MAMBA_CACHE", str(tmp_path))


@given(
    d=st.integers(2, 40),
    layers=st.integers(1, 3),
    N=st.integers(1, 12),
    R=st.integers(1, 9),
    V=st.integers(2, 90),
    batch=st.integers(1, 3),
    length=st.integers(2, 40),
    checkpointing=st.booleans(),
)
@settings(max_examples=8)
def test_products_equal_torchs_counter(d, layers, N, R, V, batch, length, checkpointing):
    """Forward and backward of the real model with its logits written out, so that the counter sees the head."""
    config = MambaConfig(
        hidden_size=d, num_hidden_layers=layers, state_size=N, time_step_rank=R, vocab_size=V, pad_token_id=0
    )
    model = MambaForCausalLM(config).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = torch.randint(0, V, (batch, length))
    with ops.backend("torch"), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, skip_logits=False).loss.backward()
    flops = token_flops(Geometry.of(config))
    predicted = 3 * (flops.gemm + flops.head) + (flops.gemm - flops.out_proj if checkpointing else 0)
    assert counter.get_total_flops() == predicted * batch * length


@pytest.mark.parametrize("length", [40, SSD_CHUNK + 9])
@pytest.mark.parametrize("share", [1, 2])
def test_products_of_a_hybrid_equal_torchs_counter(length, share):
    """Its attention, too, which grows with the length: torch counts every pair, the formula those that are seen.

    The products of ssd, an operator of its own, are held in tests/ops/test_ssd.py.
    """
    model = HYBRID.model_class(
        HYBRID.config_class(
            hidden_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4 // share, vocab_size=50,
            shared_intermediate_size=28, mamba_n_heads=6, mamba_d_head=8, mamba_d_state=5, mamba_n_groups=2,
            layer_types=["mamba", "attention", "attention"],
        )
    )  # fmt: skip
    ids = torch.randint(0, 50, (2, length))
    with ops.backend("torch"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.train()(input_ids=ids, labels=ids, skip_logits=False).loss.backward()
    g = HYBRID.geometry(model.config)
    flops, mixer = HYBRID.token_flops(g, length), token_flops_of_mamba2(g.mamba, length)
    gated = 3 * 4 * g.shared_intermediate_size  # silu and its product in each layer: no matrix products
    attention = flops.attention * 2 * length // (length + 1)
    products = flops.projections + attention + flops.mlp - gated + flops.head + mixer.gemm // 3
    assert counter.get_total_flops() == 2 * 3 * length * products
    assert flops.forward == products - attention + flops.attention + gated + (mixer.ssd + mixer.conv) // 3


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_flops_are_about_six_a_parameter(name):
    """Kaplan et al. 2020: 6 N a token; the scan adds a little, the embedding counts once as the head."""
    geometry = Geometry.of(get_preset(name).config)
    parameters = sum(count_parameters(vars(geometry)).values())
    assert token_flops(geometry).training == pytest.approx(6 * parameters, rel=0.12)


def test_recomputation_is_a_forward_of_the_blocks():
    flops = token_flops(GEOMETRY)
    assert flops.executed(True) - flops.training == flops.gemm - flops.out_proj + flops.scan + flops.conv
    assert flops.executed(False) == flops.training


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA L40S", "L40S"),
        ("Tesla V100-SXM2-16GB", "V100 SXM2"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla K80", None),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA H200", "H200 SXM"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla V100S-PCIE-32GB", "V100S"),
        ("Tesla V100-PCIE-16GB", "V100 PCIe"),
        ("NVIDIA A100-PCIE-40GB", "A100"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40", None),
        ("NVIDIA RTX A4000", None),
        ("CPU x86_64, 2 threads", None),
    ],
)
def test_a_gpu_is_known_by_its_drivers_name_or_not_at_all(reported, name):
    found = find_gpu(reported)
    assert (found and found.name) == name


def test_peaks_have_a_source_and_unknown_stays_unknown():
    assert all(gpu.source and (gpu.bf16 is None or gpu.bf16 > gpu.fp32) for gpu in GPUS)
    assert peak_flops("Tesla V100-SXM2-16GB", "bf16") is None
    assert peak_flops("an unknown device", "bf16") is None
    assert utilisation(token_flops(GEOMETRY).training, 1e5, 1, "an unknown device", "bf16") is None
    # 312e12 FLOP/s over 130M's operations would be an MFU of one
    rate = 312e12 / token_flops(GEOMETRY).training
    assert utilisation(token_flops(GEOMETRY).training, 4 * rate, 4, "NVIDIA A100-SXM4-80GB", "bf16") == pytest.approx(1)


def ask(**more):
    numbers = {"seq_len": 2048, "world_size": 4, "tokens_per_step": 2**19, "total_tokens": 10**9}
    return duration.forecast(FAMILY, GEOMETRY, **(numbers | more))


def test_the_duration_follows_from_a_stated_throughput():
    found = ask(tokens_per_second=100_000.0)
    assert (found.steps, found.seconds) == (1908, 10_000.0)
    assert found.gpu_hours == pytest.approx(4 * 10_000 / 3600)
    assert found.end(datetime(2026, 1, 1, tzinfo=UTC)).isoformat() == "2026-01-01T02:46:40+00:00"
    assert "2.8 hours" in "\n".join(found.lines())
    json.dumps(found.to_dict())


def test_without_a_throughput_nothing_is_guessed():
    found = ask(device="NVIDIA H100 PCIe")
    assert found.tokens_per_second is found.gpu_hours is found.mfu is found.end() is None
    assert "unknown" in found.lines()[-1]


def test_a_recorded_throughput_serves_the_same_device_and_model_only():
    key = duration.run_key(FAMILY, GEOMETRY, 2048, "bf16", False, "triton")
    duration.record("NVIDIA A100-SXM4-80GB", key, 50_000.0)
    found = ask(device="A100")
    assert found.tokens_per_second == 200_000.0
    assert "recorded" in found.source
    assert found.mfu == pytest.approx(token_flops(GEOMETRY).training * 50_000 / 312e12)
    assert ask(device="NVIDIA H100 PCIe").tokens_per_second is None
    assert ask(device="A100", seq_len=1024).tokens_per_second is None
    other = ask(device="A100", backend="torch")
    assert (other.tokens_per_second, "with the torch backend" in other.source) == (None, True)
    duration.cache_file().write_text("not JSON")
    assert ask(device="A100").tokens_per_second is None


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_a_throughput_that_is_none_is_refused(rate):
    with pytest.raises(ValueError, match="tokens_per_second"):
        ask(tokens_per_second=rate)


def test_the_command_uses_what_a_run_recorded(capsys):
    from hf_mamba.cli import main

    flags = ["memory", "--preset", "tiny_mamba", "--seq_len", "32", "--micro_batch_size", "1", "--dtype", "fp32"]
    tiny = FAMILY.geometry(get_preset("tiny_mamba").config)
    duration.record(duration.device_name(), duration.run_key(FAMILY, tiny, 32, "fp32", False, "cpu"), 1000.0)
    assert main([*flags, "--device", duration.device_name(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["time"]
    assert found["seconds"] == pytest.approx(found["total_tokens"] / 1000)
    assert main([*flags, "--device", duration.device_name()]) == 0
    text = capsys.readouterr().out
    assert f"recorded on {duration.device_name()}" in text
    assert "started now, it ends around" in text
    assert main([*flags, "--device", "an abacus"]) == 0
    text = capsys.readouterr().out
    assert "Duration: unknown (nothing was recorded on an abacus for this model" in text
    assert main([*flags, "--device", "an abacus", "--tokens_per_second", "50"]) == 0
    assert "MFU unknown" in capsys.readouterr().out
    assert "(Chinchilla)" in text
    assert "the released Mamba models saw 300.0B tokens" in text
