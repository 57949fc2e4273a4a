"""Mamba-2's own promises: the recurrence of the paper, limits of the step, initial values, both formats, refusals."""

import json
import math
from pathlib import Path

import papers
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from small import GROUPS

from hf_mamba import Mamba2Config, Mamba2ForCausalLM, MambaForCausalLM
from hf_mamba.interop.convert import convert
from hf_mamba.models.mamba2.modeling_mamba2 import Mamba2Mixer
from hf_mamba.models.mamba2.original import config_from_original, config_to_original

FIELDS = {
    **{"hidden_size": 24, "num_heads": 6, "head_dim": 8, "n_groups": GROUPS, "state_size": 5, "num_hidden_layers": 2},
    **{"vocab_size": 61, "pad_token_id": 0, "tie_word_embeddings": True},
}
IDS = torch.arange(2 * 19).view(2, 19) * 7 % 61


def build(dtype: torch.dtype = torch.float64, **config: object) -> Mamba2ForCausalLM:
    """A model in eval mode, every weight moved off its initial value."""
    torch.manual_seed(0)
    model = Mamba2ForCausalLM(Mamba2Config(**(FIELDS | config))).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def weights_of(model: Mamba2ForCausalLM) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}


@given(
    shape=st.sampled_from([(1, 1), (4, 1), (4, 2), (3, 3), (6, 2)]),
    head_dim=st.sampled_from([2, 4]),
    states=st.integers(1, 5),
    kernel=st.integers(2, 5),
    length=st.integers(1, 9),
    limit=st.sampled_from([(0.0, math.inf), (0.01, 0.05)]),
)
@settings(max_examples=8)
def test_it_is_the_recurrence_of_the_paper(shape, head_dim, states, kernel, length, limit):
    heads, groups = shape
    model = build(
        num_heads=heads, n_groups=groups, head_dim=head_dim, hidden_size=heads * head_dim, expand=1,
        state_size=states, conv_kernel=kernel, time_step_limit=limit, num_hidden_layers=1,
    )  # fmt: skip
    weights = weights_of(model)
    ids = IDS[0, :length]
    expected = papers.mamba2(weights, model.config, ids[None])[0]
    found = model(ids[None]).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    with torch.no_grad():
        cache = model(ids[None, :0], use_cache=True).cache_params
        steps = [model(token.view(1, 1), cache_params=cache).logits[0] for token in ids]
    torch.testing.assert_close(torch.cat(steps), expected, rtol=1e-10, atol=1e-11)
    noise = torch.randn(found.shape, dtype=found.dtype, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad((found * noise).sum(), list(model.parameters()))
    for name, mine, theirs in zip(
        weights, gradients, torch.autograd.grad((expected * noise).sum(), list(weights.values())), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10, msg=name)


@torch.no_grad()
def test_a_limited_step_is_limited_in_decoding_too():
    """Stock transformers limits Δ in the prompt alone: its next token is another function than its prompt's."""
    model = build(torch.float32, time_step_limit=(0.0, 0.02))
    whole = model(IDS).logits
    cache = model(IDS[:, :-1], use_cache=True).cache_params
    torch.testing.assert_close(model(IDS[:, -1:], cache_params=cache).logits[:, 0], whole[:, -1])
    stock = transformers.Mamba2ForCausalLM(model.config).eval()
    stock.load_state_dict(model.state_dict())
    torch.testing.assert_close(stock(IDS).logits, whole, rtol=1e-4, atol=1e-4)
    theirs = stock(IDS[:, :-1], use_cache=True).cache_params
    assert (stock(IDS[:, -1:], cache_params=theirs).logits[:, 0] - whole[:, -1]).abs().max() > 1e-3


@torch.no_grad()
def test_fresh_initialisation_is_the_originals():
    """mamba_ssm's mamba2.py and mixer_seq_simple.py."""
    torch.manual_seed(0)
    config = Mamba2Config(
        hidden_size=512, head_dim=2, num_heads="auto", num_hidden_layers=4, vocab_size=400, n_groups=1
    )
    model = Mamba2ForCausalLM(config)
    mixer = model.backbone.layers[1].mixer
    for weight, bound in (
        (mixer.in_proj.weight, 512**-0.5),
        (mixer.out_proj.weight, 1024**-0.5 / math.sqrt(4)),
        (mixer.conv1d.weight, 4**-0.5),
        (mixer.conv1d.bias, 4**-0.5),
    ):
        assert weight.abs().max() <= bound
        assert weight.std() == pytest.approx(bound * 3**-0.5, rel=0.05)
    rates, dt = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert 1 <= rates.min() < 1.5 < 15.5 < rates.max() <= 16
    assert rates.mean() == pytest.approx(8.5, rel=0.08)
    assert 1e-3 * (1 - 1e-4) <= dt.min() < dt.max() <= 0.1 * (1 + 1e-4)
    assert dt.log().mean() == pytest.approx(math.log(1e-2), rel=0.05)
    assert torch.equal(mixer.D, torch.ones(512))
    assert torch.equal(mixer.norm.weight, torch.ones(1024))
    assert model.backbone.embeddings.weight.std() == pytest.approx(0.02, rel=0.02)
    alone = Mamba2Mixer(Mamba2Config(**FIELDS), 0)
    assert alone(torch.randn(2, 5, 24)).isfinite().all()


def write_original(model: Mamba2ForCausalLM, folder: Path, **changes: object) -> Path:
    """The model as mamba_ssm's `save_pretrained` writes it."""
    folder.mkdir()
    fields = config_to_original(model.config)
    fields["ssm_cfg"] |= changes.pop("ssm_cfg", {})
    (folder / "config.json").write_text(json.dumps(fields | changes))
    state = {name.replace("backbone.embeddings", "backbone.embedding"): t for name, t in model.state_dict().items()}
    torch.save(state, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize(
    "config",
    [{}, {"num_heads": 8, "head_dim": 6, "n_groups": 8, "tie_word_embeddings": False}],
    ids=["tied", "codestral"],
)
def test_both_formats_are_read_and_written_bit_for_bit(tmp_path: Path, config: dict):
    model = build(torch.float32, time_step_limit=(0.0, 0.5), **config)
    original = write_original(model, tmp_path / "original")
    loaded = Mamba2ForCausalLM.from_pretrained(original)
    assert loaded.config.n_groups == model.config.n_groups
    convert(original, tmp_path / "stock", "transformers", verify=True)
    convert(tmp_path / "stock", tmp_path / "back", "state-spaces")
    state = model.state_dict()
    for other in (loaded, Mamba2ForCausalLM.from_pretrained(tmp_path / "stock")):
        assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())
        assert torch.equal(other.eval()(IDS).logits, model(IDS).logits)
    assert set(load_file(tmp_path / "stock" / "model.safetensors")) == dict(model.named_parameters()).keys()
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written == json.loads(json.dumps(config_to_original(model.config)))
    one, other = (torch.load(tmp_path / name / "pytorch_model.bin") for name in ("original", "back"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(ValueError, match="Load it with Mamba2ForCausalLM"):
        MambaForCausalLM.from_pretrained(original)


def test_configurations_survive_the_other_format_and_stock_files(tmp_path: Path):
    config = Mamba2Config(**FIELDS, time_step_limit=[0.001, 0.1], use_bias=True, rescale_prenorm_residual=False)
    assert Mamba2Config(**config_from_original(config_to_original(config))).to_dict() == config.to_dict() | {
        name: getattr(Mamba2Config(), name) for name in ("pad_token_id",)
    }
    unlimited = Mamba2Config(**FIELDS)
    unlimited.save_pretrained(tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert "time_step_limit" not in written  # other programs cannot parse transformers' spelling of infinity
    assert written["num_heads"] == 6
    stock = transformers.Mamba2Config.from_pretrained(tmp_path / "ours")
    assert stock.time_step_limit == (0.0, math.inf)
    stock.save_pretrained(tmp_path / "stock")
    assert "__float__" in (tmp_path / "stock" / "config.json").read_text()
    assert Mamba2Config.from_pretrained(tmp_path / "stock").time_step_limit == (0.0, math.inf)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_intermediate": 64}, "d_intermediate is 64"),
        ({"attn_layer_idx": [1]}, "attn_layer_idx"),
        ({"rms_norm": False}, "rms_norm is false"),
        ({"d_model": 0}, "d_model is 0"),
        ({"bidirectional": True}, "bidirectional is not a field"),
        ({"ssm_cfg": {"d_ssm": 8}}, r"ssm_cfg\.d_ssm is 8"),
        ({"ssm_cfg": {"D_has_hdim": True}}, r"ssm_cfg\.D_has_hdim is True"),
        ({"ssm_cfg": {"norm_before_gate": True}}, r"ssm_cfg\.norm_before_gate is True"),
        ({"ssm_cfg": {"rmsnorm": False}}, r"ssm_cfg\.rmsnorm is False"),
        ({"ssm_cfg": {"dt_rank": 3}}, r"ssm_cfg\.dt_rank is not a field"),
    ],
    ids=str,
)
def test_originals_that_cannot_be_expressed_are_refused_by_name(tmp_path: Path, changes, message):
    folder = write_original(build(torch.float32), tmp_path / "o", **changes)
    with pytest.raises(ValueError, match=message):
        Mamba2ForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"d_model": 768, "n_layer": 24}, "state-spaces configuration: d_model .here: hidden_size., n_layer"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"state_size": 0}, "state_size is 0"),
        ({"num_heads": 5}, "num_heads 5 x head_dim 8 is 40, but hidden_size 24 x expand 2 is 48.* Write num_heads 6"),
        ({"head_dim": 7, "num_heads": "auto"}, "head_dim that divides 48"),
        ({"n_groups": 4}, "n_groups is 4, and 6 heads"),
        ({"n_groups": 0}, "n_groups is 0"),
        ({"time_step_limit": (0.1, 0.01)}, "time_step_limit is"),
        ({"hidden_act": "gated"}, "hidden_act is 'gated'"),
    ],
    ids=str,
)
def test_configurations_that_cannot_be_meant_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        Mamba2Config(**(FIELDS | config))
