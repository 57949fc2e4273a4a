"""The model against stock transformers, and its own promises on loading, precision and losses."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from small import word
from transformers import DynamicCache
from transformers.models.granitemoehybrid import modeling_granitemoehybrid
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2
from transformers.utils import find_labels

from hf_mamba import MambaConfig, MambaForCausalLM
from hf_mamba.family import Family
from hf_mamba.models.common.linear import LMHead


class _Doubled:
    """The torch module, but for its float32, which is float64: stock code then runs wholly in float64."""

    float32 = torch.float64

    def __getattr__(self, name: str):
        return getattr(torch, name)


@pytest.fixture
def stock_in_float64(monkeypatch: pytest.MonkeyPatch):
    """Stock transformers casts to fp32 along the way, whatever the model's dtype; here it casts to float64."""
    for module in (modeling_mamba, modeling_mamba2, modeling_granitemoehybrid):
        monkeypatch.setattr(module, "torch", _Doubled())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def stock_class(family: Family):
    return getattr(transformers, family.model_class.__name__)


IDS = torch.arange(2 * 19).view(2, 19) * 7 % 61


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"tie_word_embeddings": False},
        {"use_bias": True},
        {"use_conv_bias": False},
        {"hidden_act": "gelu"},
        {"residual_in_fp32": False},
        {"conv_kernel": 3, "state_size": 16, "hidden_size": 32, "expand": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)], ids=str)
def test_logits_and_loss_equal_stock_in_both_directions(
    family, make, tmp_path: Path, request, config, dtype, tolerance
):
    if "hidden_act" in config and family.model_type == "granitemoehybrid":
        pytest.skip("vLLM and llama.cpp read silu alone in this format: another activation is refused")
    if dtype == torch.float64:
        request.getfixturevalue("stock_in_float64")
    ours = make(dtype, **config)
    ours.save_pretrained(tmp_path / "ours")
    stock = stock_class(family).from_pretrained(tmp_path / "ours", dtype=dtype).eval()
    stock.save_pretrained(tmp_path / "stock")
    back = family.model_class.from_pretrained(tmp_path / "stock", dtype=dtype).eval()
    with torch.no_grad():
        expected = stock(IDS, labels=IDS, output_hidden_states=True)
        for model in (ours, back):
            found = model(IDS, labels=IDS, output_hidden_states=True)
            torch.testing.assert_close(found.logits.to(dtype), expected.logits.to(dtype), atol=tolerance, rtol=0)
            torch.testing.assert_close(found.loss.to(dtype), expected.loss.to(dtype), atol=tolerance, rtol=0)
            # stock lists the blocks' outputs in the same order; only the last two may carry another dtype
            for a, b in zip(found.hidden_states, expected.hidden_states, strict=True):
                torch.testing.assert_close(a.to(dtype), b.to(dtype), atol=10 * tolerance, rtol=0)
    for (name, a), (_, b) in zip(ours.named_parameters(), back.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_files_are_stock_and_explicit(family, make, tmp_path: Path):
    make(torch.float32).save_pretrained(tmp_path)
    stock_config = stock_class(family).config_class
    stock = stock_class(family)(stock_config.from_pretrained(tmp_path))
    expected = set(stock.state_dict()) - {"lm_head.weight"}
    assert set(load_file(tmp_path / "model.safetensors")) == expected
    config = stock_config.get_config_dict(tmp_path)[0]
    assert config["model_type"] == family.model_type
    assert config["architectures"] == [family.model_class.__name__]
    wanted = (
        "hidden_size state_size conv_kernel use_bias use_conv_bias hidden_act layer_norm_epsilon num_hidden_layers "
        "vocab_size tie_word_embeddings "
    ) + {
        "mamba": "intermediate_size time_step_rank",
        "mamba2": "num_heads head_dim n_groups",
        "granitemoehybrid": "mamba_n_heads mamba_d_head mamba_n_groups layer_types num_key_value_heads",
    }[family.model_type]
    assert not [key for key in wanted.split() if word(family, key) not in config]


@torch.no_grad()
def test_fresh_initialisation_is_the_papers():
    torch.manual_seed(0)
    config = MambaConfig(hidden_size=128, num_hidden_layers=4, vocab_size=1000)
    model = MambaForCausalLM(config)
    mixer = model.base_model.layers[1].mixer
    uniform_std = 3**-0.5  # of U(-1, 1)
    for weight, bound in (
        (mixer.in_proj.weight, 128**-0.5),
        (mixer.x_proj.weight, 256**-0.5),
        (mixer.out_proj.weight, 256**-0.5 / math.sqrt(4)),
        (mixer.conv1d.weight, 4**-0.5),
        (mixer.conv1d.bias, 4**-0.5),
        (mixer.dt_proj.weight, 8**-0.5),
    ):
        assert weight.abs().max() <= bound
        assert weight.std() == pytest.approx(bound * uniform_std, rel=0.08)
    assert model.base_model.embeddings.weight.std() == pytest.approx(0.02, rel=0.02)
    assert torch.equal(mixer.A_log, torch.arange(1.0, 17).log().expand(256, -1))
    assert torch.equal(mixer.D, torch.ones(256))
    dt = F.softplus(mixer.dt_proj.bias)
    assert dt.min() >= 1e-3 * (1 - 1e-4)
    assert dt.max() <= 0.1 * (1 + 1e-4)
    assert dt.log().mean() == pytest.approx(math.log(1e-2), rel=0.05)
    ids = torch.randint(0, 1000, (4, 64))
    assert model(ids, labels=ids).loss.item() == pytest.approx(math.log(1000), abs=0.1)


def test_the_same_seed_gives_the_same_weights_whichever_way_it_is_built(family, make):
    config = make().config
    torch.manual_seed(3)
    direct = family.model_class(config)
    torch.manual_seed(3)
    through_config = family.model_class._from_config(config)
    for (name, a), (_, b) in zip(direct.named_parameters(), through_config.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("rescale", [True, False])
def test_loading_never_changes_a_weight(family, make, tmp_path: Path, rescale: bool):
    model = make(torch.float32, num_hidden_layers=3)
    model.config.rescale_prenorm_residual = rescale
    for turn in range(3):
        model.save_pretrained(tmp_path / str(turn))
        loaded = family.model_class.from_pretrained(tmp_path / str(turn), rescale_prenorm_residual=rescale)
        stock = stock_class(family).from_pretrained(tmp_path / str(turn))
        for name, expected in model.named_parameters():
            assert torch.equal(expected, loaded.get_parameter(name)), name
            assert torch.equal(expected, stock.get_parameter(name)), name
        model = loaded


@pytest.mark.parametrize("how", ["from_pretrained", "from_config"])
def test_bf16_keeps_the_sensitive_parameters_and_arithmetic_in_fp32(family, make, tmp_path: Path, how: str):
    exact = make(torch.float32, num_hidden_layers=3)
    exact.save_pretrained(tmp_path)
    if how == "from_pretrained":
        low = family.model_class.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    else:
        low = family.model_class._from_config(exact.config, dtype=torch.bfloat16).eval()
        low.load_state_dict(exact.state_dict())
    kept = {name for name, p in low.named_parameters() if p.dtype == torch.float32}
    own = ("A_log", "D", "dt_proj.bias", "dt_bias")
    assert kept == {name for name, _ in low.named_parameters() if name.endswith(own)}
    with torch.no_grad():
        hidden = low.base_model(IDS, output_hidden_states=True).hidden_states
        assert hidden[1].dtype == torch.float32  # the residual; of the last, see test_beside_stock.py
        out = low(IDS, labels=IDS)
        assert out.loss.dtype == torch.float32
        # three layers of bf16 rounding; the whole arithmetic in bf16 is an order of magnitude off
        torch.testing.assert_close(out.logits, exact(IDS).logits, atol=0.1, rtol=0.05)


def test_bf16_models_survive_a_save(family, make, tmp_path: Path):
    make(torch.float32).save_pretrained(tmp_path / "a")
    low = family.model_class.from_pretrained(tmp_path / "a", dtype=torch.bfloat16).eval()
    low.save_pretrained(tmp_path / "b")
    again = family.model_class.from_pretrained(tmp_path / "b", dtype=torch.bfloat16).eval()
    for (name, a), (_, b) in zip(low.named_parameters(), again.named_parameters(), strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name
    stock_class(family).from_pretrained(tmp_path / "b")(IDS)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_items", [None, 11, torch.tensor(7)])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_chunked_and_plain_losses_agree_with_gradients(make, tied: bool, num_items, z_loss: float):
    model = make(tie_word_embeddings=tied)
    labels = IDS.clone()
    labels[0, 3:6] = -100
    results = []
    for skip in (False, True):
        model.zero_grad()
        out = model(
            IDS, labels=labels, num_items_in_batch=num_items, z_loss=z_loss, skip_logits=skip, return_token_losses=True
        )
        assert (out.logits is None) == skip
        out.loss.backward()
        results.append((out.loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}))
    logits = model(IDS).logits[:, :-1]
    counted = (labels[:, 1:] != -100).sum()
    losses = F.cross_entropy(logits.mT.double(), labels[:, 1:], reduction="none")
    torch.testing.assert_close(out.token_losses[:, :-1].double(), losses.detach(), atol=1e-6, rtol=1e-6)
    total = losses.sum() + z_loss * logits.double().logsumexp(-1).square()[labels[:, 1:] != -100].sum()
    torch.testing.assert_close(results[0][0].double(), (total / (counted if num_items is None else num_items)).detach())
    torch.testing.assert_close(results[1][0].double(), results[0][0].double(), atol=1e-6, rtol=1e-6)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_accumulation_adds_up(make):
    model = make().train()
    for z_loss in (0.0, 0.1):
        whole = model(IDS, labels=IDS, z_loss=z_loss)
        options = {"num_items_in_batch": 2 * (IDS.shape[1] - 1), "z_loss": z_loss}
        parts = sum(model(row[None], labels=row[None], **options).loss for row in IDS)
        torch.testing.assert_close(parts, whole.loss)
        inputs = list(model.parameters())
        gradients = (torch.autograd.grad(loss, inputs) for loss in (parts, whole.loss))
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)


def test_logits_to_keep(model):
    full = model(IDS).logits
    torch.testing.assert_close(model(IDS, logits_to_keep=3).logits, full[:, -3:])
    torch.testing.assert_close(model(IDS, logits_to_keep=torch.tensor([1, 4])).logits, full[:, [1, 4]])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(make, reentrant: bool):
    model = make().train()
    seq_idx = (torch.arange(19) // 6).expand(2, -1).int()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(IDS, labels=IDS, seq_idx=seq_idx).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
    with pytest.raises(ValueError, match="advance the state twice"):
        model(IDS, cache_params=DynamicCache(config=model.config))


def test_gradients_match_finite_differences(family, make, fewest: int):
    model = make(hidden_size=8, num_hidden_layers=fewest, vocab_size=13, state_size=3)
    ids = torch.arange(6)[None] * 5 % 13
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1]], dtype=torch.int32)
    parameters = dict(model.named_parameters())
    names = list(parameters)

    def loss(*values: torch.Tensor) -> torch.Tensor:
        state = dict(zip(names, values, strict=True)) | {"lm_head.weight": values[names.index(family.embedding)]}
        logits = torch.func.functional_call(model, state, (ids,), {"seq_idx": seq_idx}).logits
        return F.cross_entropy(logits[0, :-1], ids[0, 1:])

    values = tuple(p.detach().clone().requires_grad_() for p in parameters.values())
    assert torch.autograd.gradcheck(loss, values, fast_mode=True)


def test_resized_embeddings_keep_the_chunked_head(make):
    for tied in (True, False):
        model = make(tie_word_embeddings=tied)
        before = model(IDS).logits
        model.resize_token_embeddings(70)
        assert isinstance(model.lm_head, LMHead)
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
        torch.testing.assert_close(model(IDS).logits[..., :61], before)
        assert model.train()(IDS, labels=IDS).unread is not None


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 19, 24)}, "exactly one of"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 3)}, "attention_mask has shape"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 1, 19, 19)}, "attention_mask has shape"),
        ({"input_ids": IDS, "seq_idx": torch.zeros(1, 19)}, "seq_idx has shape"),
        ({"input_ids": IDS, "position_ids": torch.zeros(3, 19)}, "position_ids has shape"),
        ({"input_ids": IDS, "cu_seq_lens_q": torch.tensor([0, 5, 19])}, "from 0 to 38"),
        ({"input_ids": IDS, "labels": IDS, "logits_to_keep": 1}, r"\(2, 19\), but \(2, 1\) positions have logits"),
        ({"input_ids": IDS, "skip_logits": True}, "skip_logits without labels"),
        ({"input_ids": IDS, "z_loss": 0.1}, "z_loss need labels"),
        ({"input_ids": IDS, "past_key_values": [1]}, "prefix tuning cannot work"),
        ({"input_ids": IDS, "return_token_losses": True}, "return_token_losses .* need labels"),
    ],
)
def test_what_cannot_be_served_raises(model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        model(**kwargs)


def test_attentions_are_given_where_layers_attend_and_refused_where_none_does(family, model):
    if family.model_type == "granitemoehybrid":
        assert [tuple(weights.shape) for weights in model(IDS, output_attentions=True).attentions] == [(2, 4, 19, 19)]
    else:
        with pytest.raises(ValueError, match="has no attentions"):
            model(IDS, output_attentions=True)


def test_trainer_finds_exactly_our_labels(family):
    """Trainer evaluates no loss when an argument that is named like a label is missing from the batch."""
    assert find_labels(family.model_class) == ["labels"]


def test_backbone_alone_and_tuples(family, make):
    model = make()
    backbone = family.base_class(model.config).double().eval()
    backbone.load_state_dict(model.base_model.state_dict())
    torch.testing.assert_close(backbone(IDS).last_hidden_state, model.base_model(IDS).last_hidden_state)
    logits, _ = model(IDS, return_dict=False)
    torch.testing.assert_close(logits, model(IDS).logits)
    embeds = model.get_input_embeddings()(IDS)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, logits)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"d_model": 768, "n_layer": 24}, "state-spaces configuration: d_model .here: hidden_size., n_layer"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"intermediate_size": -1}, "intermediate_size is -1"),
        ({"time_step_rank": "half"}, "time_step_rank is 'half'"),
    ],
)
def test_configurations_that_cannot_be_meant_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        MambaConfig(**config)


def test_intermediate_size_wins_over_expand():
    config = MambaConfig(hidden_size=16, expand=16, intermediate_size=40)
    assert config.intermediate_size == 40
    assert MambaConfig.from_dict(config.to_dict()).intermediate_size == 40
