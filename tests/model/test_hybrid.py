"""What a hybrid alone must do, beside the behaviours that every family shares: transformers' own, and a recurrence."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from small import GROUPS
from transformers import DynamicCache, StaticCache
from transformers.models.granitemoehybrid import modeling_granitemoehybrid as stock_module

from hf_mamba import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM, load_cache, save_cache
from hf_mamba.models.common import attention

SMALL = {
    "hidden_size": 24, "num_hidden_layers": 4, "vocab_size": 61, "num_attention_heads": 6, "num_key_value_heads": 2,
    "shared_intermediate_size": 20, "mamba_n_heads": 6, "mamba_d_head": 8, "mamba_d_state": 5, "mamba_n_groups": GROUPS,
    "layer_types": ["mamba", "attention", "attention", "mamba"], "pad_token_id": 0,
}  # fmt: skip
MULTIPLIERS = {
    "embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.7, "logits_scaling": 1.5,
}  # fmt: skip
IDS = torch.arange(2 * 19).view(2, 19) * 7 % 60 + 1


def build(dtype: torch.dtype = torch.float64, **own: object) -> GraniteMoeHybridForCausalLM:
    """A model of which every weight has left its initial value."""
    torch.manual_seed(0)
    model = GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(**SMALL | MULTIPLIERS | own)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def model() -> GraniteMoeHybridForCausalLM:
    return build()


class _Doubled:
    """The torch module, but for its float32, which is float64."""

    float32 = torch.float64

    def __getattr__(self, name: str):
        return getattr(torch, name)


@pytest.fixture
def stock(model, monkeypatch: pytest.MonkeyPatch):
    """transformers' own model with the same weights, in float64 throughout."""
    monkeypatch.setattr(stock_module, "torch", _Doubled())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    config = transformers.GraniteMoeHybridConfig(**model.config.to_dict())
    theirs = transformers.GraniteMoeHybridForCausalLM(config).double().eval()
    theirs.load_state_dict(model.state_dict())
    return theirs


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), atol=1e-6, rtol=0)


# ---- transformers' own, where it is right


@torch.no_grad()
def test_logits_of_rows_of_padding_and_of_every_next_token_are_stocks(model, stock):
    ours, theirs = (m(IDS, output_hidden_states=True) for m in (model, stock))
    same(ours.logits, theirs.logits)
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        same(a, b)
    for mask in (torch.arange(19) >= torch.tensor([[0], [6]]), torch.arange(19) < torch.tensor([[19], [12]])):
        mask = mask.long()
        found, expected = (m(IDS, attention_mask=mask).logits for m in (model, stock))
        same(found[mask.bool()], expected[mask.bool()])
    ours, theirs = DynamicCache(config=model.config), DynamicCache(config=stock.config)
    for start, stop in ((0, 7), (7, 8), (8, 13), (13, 14)):
        part = IDS[:, start:stop]
        same(model(part, past_key_values=ours).logits, stock(part, past_key_values=theirs).logits)
    assert ours.layers[1].keys.shape == theirs.layers[1].keys.shape


@torch.no_grad()
def test_a_left_padded_batch_generates_what_stock_generates(model, stock):
    mask = (torch.arange(19) >= torch.tensor([[0], [6]])).long()
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(IDS, **options), stock.generate(IDS, **options))


def test_fifty_steps_of_adamw_are_stocks(model, stock):
    """The same weights, gradients and updates all along."""
    ours = build()
    curves = []
    for m in (ours, stock):
        m.train()
        optimizer = torch.optim.AdamW(m.parameters(), lr=3e-3, weight_decay=0.1)
        losses = []
        for step in range(50):
            loss = m(IDS, labels=(IDS + step % 3) % 61).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)
    assert curves[0][-1] < curves[0][0] - 0.5


def test_stock_keeps_no_documents_apart_on_a_cpu(model, stock):
    """It refuses them, or mixes them where its version does not ask for the kernels."""
    positions = torch.cat([torch.arange(9), torch.arange(10)])[None].expand(2, -1)
    seq_idx = (torch.arange(19) >= 9).int()[None].expand(2, -1)
    offsets = torch.tensor([0, 9, 19, 28, 38], dtype=torch.int32)
    refusal = ""
    try:
        mixed = stock(IDS, position_ids=positions, seq_idx=seq_idx, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets,
                      max_length_q=10, max_length_k=10).logits  # fmt: skip
    except Exception as error:
        refusal = str(error)
    if refusal:
        assert "causal_conv1d" in refusal
    else:
        assert (mixed - model(IDS, seq_idx=seq_idx).logits).abs().max() > 1e-3


# ---- the mathematics, written a second time


def _attention(mixer, x: torch.Tensor) -> torch.Tensor:
    """(L, d) -> (L, d), token by token."""
    P, groups = mixer.head_dim, mixer.q_proj.out_features // mixer.k_proj.out_features
    q, k, v = ((x @ p.weight.T).unflatten(-1, (-1, P)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    out = []
    for t in range(len(x)):
        heads = []
        for h in range(q.shape[1]):
            scores = k[: t + 1, h // groups] @ q[t, h] * mixer.scale
            heads.append((scores - scores.max()).exp() @ v[: t + 1, h // groups] / (scores - scores.max()).exp().sum())
        out.append(torch.cat(heads))
    return torch.stack(out) @ mixer.o_proj.weight.T


def _mamba(mixer, x: torch.Tensor) -> torch.Tensor:
    """(L, d) -> (L, d), the recurrence."""
    (H, P), (G, N) = mixer.heads, mixer.groups
    z, u, dt = (x @ mixer.in_proj.weight.T).split(mixer.splits, -1)
    u = F.pad(u, (0, 0, 3, 0))
    u = F.silu(sum(u[j : j + len(x)] * mixer.conv1d.weight[:, 0, j] for j in range(4)) + mixer.conv1d.bias)
    xs, B, C = u.split(mixer.conv_splits, -1)
    xs, B, C = xs.unflatten(-1, (H, P)), B.unflatten(-1, (G, N)), C.unflatten(-1, (G, N))
    dt = F.softplus(dt + mixer.dt_bias)
    state, out = x.new_zeros(H, P, N), []
    for t in range(len(x)):
        b, c = (m[t].repeat_interleave(H // G, 0)[:, None] for m in (B, C))
        decay = torch.exp(-mixer.A_log.exp() * dt[t])[:, None, None]
        state = decay * state + (dt[t][:, None] * xs[t])[..., None] * b
        out.append(((state * c).sum(-1) + mixer.D[:, None] * xs[t]).flatten())
    y = torch.stack(out) * F.silu(z)
    y = y.unflatten(-1, (G, -1))
    y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + mixer.norm.variance_epsilon)).flatten(1)
    return (y * mixer.norm.weight) @ mixer.out_proj.weight.T


def reference(model, ids: torch.Tensor) -> torch.Tensor:
    """Logits (L, V) of one row."""

    def norm(module, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon) * module.weight

    config, m = model.config, model.config.residual_multiplier
    x = model.model.embed_tokens.weight[ids] * config.embedding_multiplier
    for layer in model.model.layers:
        mix = _mamba if hasattr(layer, "mamba") else _attention
        x = x + m * mix(layer.mixer, norm(layer.input_layernorm, x))
        mlp = layer.shared_mlp
        gate, up = (norm(layer.post_attention_layernorm, x) @ mlp.input_linear.weight.T).chunk(2, -1)
        x = x + m * ((F.silu(gate) * up) @ mlp.output_linear.weight.T)
    return norm(model.model.norm, x) @ model.lm_head.weight.T / config.logits_scaling


@torch.no_grad()
def test_logits_are_the_recurrences(model):
    for row, found in zip(IDS, model(IDS).logits, strict=True):
        torch.testing.assert_close(found, reference(model, row), atol=1e-11, rtol=0)


# ---- documents, padding and both kinds of state

DOCUMENTS = (5, 1, 9, 4)
SEQ_IDX = torch.repeat_interleave(torch.arange(4), torch.tensor(DOCUMENTS))[None].expand(2, -1)


def alone(model, ids: torch.Tensor, lengths=DOCUMENTS) -> torch.Tensor:
    return torch.cat([model(part).logits for part in ids.split(lengths, 1)], 1)


@torch.no_grad()
def test_documents_behind_a_block_mask_are_documents_alone(model, monkeypatch):
    """What a GPU in fp32 and a compiled graph compute; one call for each document is in test_sequences."""
    monkeypatch.setattr(attention.torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(model(IDS, seq_idx=SEQ_IDX).logits, alone(model, IDS), atol=1e-11, rtol=0)


@pytest.fixture(params=["dynamic", "static"])
def cache(request, model):
    config = model.config
    return DynamicCache(config=config) if request.param == "dynamic" else StaticCache(config=config, max_cache_len=40)


@torch.no_grad()
def test_padding_anywhere_then_more_tokens_is_each_row_alone(model, cache):
    """Three turns of unequal length, each padded in its own way, the last a single token."""
    generator = torch.Generator().manual_seed(2)
    seen = [torch.zeros(0, dtype=torch.long) for _ in range(2)]
    for turn in range(4):
        length = 1 if turn == 3 else 7
        ids = torch.randint(1, 61, (2, length), generator=generator)
        mask = torch.ones_like(ids) if turn == 3 else torch.rand(2, length, generator=generator) > 0.4
        mask = mask.bool() & (torch.tensor([[True], [turn != 1]]))  # in the second turn one row says nothing
        logits = model(ids, attention_mask=mask.long(), cache_params=cache).logits
        assert logits.isfinite().all()
        for row in range(2):
            said = ids[row][mask[row]]
            seen[row] = torch.cat([seen[row], said])
            if len(said):
                expected = model(seen[row][None]).logits[0, -len(said) :]
                torch.testing.assert_close(logits[row][mask[row]], expected, atol=1e-11, rtol=0)


@torch.no_grad()
def test_a_packed_turn_goes_on_with_its_last_document(model, cache):
    """The first document of a turn continues the carried one; position 0 begins a new one in its row."""
    model(IDS[:, :6], cache_params=cache)
    logits = model(IDS[:, 6:13], seq_idx=torch.tensor([[0, 0, 0, 1, 1, 2, 2]] * 2), cache_params=cache).logits
    expected = torch.cat([model(IDS[:, :9]).logits[:, 6:], alone(model, IDS[:, 9:13], (2, 2))], 1)
    torch.testing.assert_close(logits, expected, atol=1e-11, rtol=0)
    positions = torch.tensor([[0, 1, 2], [2, 3, 4]])  # the first row forgets
    logits = model(IDS[:, 13:16], position_ids=positions, cache_params=cache).logits
    torch.testing.assert_close(logits[:1], model(IDS[:1, 13:16]).logits, atol=1e-11, rtol=0)
    torch.testing.assert_close(logits[1:], model(IDS[1:, 11:16]).logits[:, 2:], atol=1e-11, rtol=0)
    step = model(IDS[:, 16:17], cache_params=cache).logits
    torch.testing.assert_close(step[0], model(IDS[:1, 13:17]).logits[0, -1:], atol=1e-11, rtol=0)


@torch.no_grad()
def test_a_token_whose_key_is_zero_is_still_attended_to(model):
    """An empty slot is one of zeros, which a token's key is never stored as."""
    model = build()
    for layer in model.model.layers[1:3]:
        layer.self_attn.k_proj.weight.zero_()
    cache = DynamicCache(config=model.config)
    first = model(IDS[:, :9], cache_params=cache).logits
    rest = model(IDS[:, 9:], cache_params=cache).logits
    torch.testing.assert_close(torch.cat([first, rest], 1), model(IDS).logits, atol=1e-11, rtol=0)


@torch.no_grad()
def test_a_saved_cache_of_either_kind_goes_on_as_if_never_saved(model, cache, tmp_path):
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    model(IDS[:, :9], attention_mask=mask, cache_params=cache)
    save_cache(cache, tmp_path / "state", model.config)
    loaded = load_cache(tmp_path / "state", model.config)
    found, expected = (model(IDS[:, 9:12], cache_params=past).logits for past in (loaded, cache))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    other = GraniteMoeHybridConfig(**SMALL | {"layer_types": ["attention", "mamba", "attention", "mamba"]})
    with pytest.raises(ValueError, match="layer_types"):
        load_cache(tmp_path / "state", other)


# ---- configurations


@torch.no_grad()
def test_fresh_initialisation_is_mamba2s_and_closes_2_n_branches():
    torch.manual_seed(0)
    config = GraniteMoeHybridConfig(
        hidden_size=128, num_hidden_layers=4, vocab_size=1000, num_attention_heads=4, num_key_value_heads=2,
        mamba_n_heads="auto", mamba_d_head=32, mamba_d_state=16, shared_intermediate_size=192,
        layer_types=["mamba", "attention", "mamba", "mamba"], tie_word_embeddings=True,
    )  # fmt: skip
    model = GraniteMoeHybridForCausalLM(config)
    mamba, attention = model.model.layers[0], model.model.layers[1]
    for weight, fan_in, branches in (
        (mamba.mamba.in_proj.weight, 128, 1),
        (mamba.mamba.out_proj.weight, 256, 8),
        (attention.self_attn.q_proj.weight, 128, 1),
        (attention.self_attn.o_proj.weight, 128, 8),
        (attention.shared_mlp.input_linear.weight, 128, 1),
        (attention.shared_mlp.output_linear.weight, 192, 8),
    ):
        assert weight.std() == pytest.approx((3 * fan_in * branches) ** -0.5, rel=0.05)
    dt = F.softplus(mamba.mamba.dt_bias)
    assert dt.min() >= 1e-3 * (1 - 1e-4)
    assert dt.max() <= 0.1 * (1 + 1e-4)
    assert mamba.mamba.A_log.exp().min() >= 1
    assert mamba.mamba.A_log.exp().max() <= 16
    ids = torch.randint(0, 1000, (4, 64))
    assert model(ids, labels=ids).loss.item() == pytest.approx(math.log(1000), abs=0.1)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"num_local_experts": 8}, "num_local_experts is 8"),
        ({"position_embedding_type": "rope"}, "position_embedding_type is 'rope'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"head_dim": 8}, "head_dim is 8, but .* 4"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4"),
        ({"num_attention_heads": 5}, "num_attention_heads is 5"),
        ({"layer_types": ["mamba"] * 4}, "has no 'attention'"),
        ({"layer_types": ["mamba", "attention"]}, "names 2 layers, and num_hidden_layers is 4"),
        ({"layer_types": ["mamba", "moe", "attention", "mamba"]}, "layer_types has 'moe'"),
        ({"mamba_n_heads": 5}, "mamba_n_heads 5 x mamba_d_head 8 is 40"),
        ({"mamba_n_groups": 4}, "mamba_n_groups is 4"),
        ({"mamba_d_state": 0}, "mamba_d_state is 0"),
        ({"attention_multiplier": 0.0}, "attention_multiplier is 0"),
        ({"time_step_limit": (0.2, 0.1)}, "time_step_limit is"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_this_model_is_not_is_refused_by_its_field(own: dict, message: str):
    with pytest.raises(ValueError, match=message):
        GraniteMoeHybridConfig(**SMALL | own)


def test_a_file_without_a_field_means_what_stock_reads_in_it():
    fields = transformers.GraniteMoeHybridConfig(**SMALL, num_local_experts=0).to_dict()
    del fields["attention_multiplier"]
    assert GraniteMoeHybridConfig.from_dict(fields).attention_multiplier == 1.0
    assert GraniteMoeHybridConfig(**SMALL).attention_multiplier == 0.5
    del fields["num_local_experts"]
    with pytest.raises(ValueError, match="num_local_experts is 8"):
        GraniteMoeHybridConfig.from_dict(fields)


def test_files_say_what_every_reader_understands(model, tmp_path):
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["layer_types"] == SMALL["layer_types"]
    assert written["num_local_experts"] == written["num_experts_per_tok"] == 0
    assert written["architectures"] == ["GraniteMoeHybridForCausalLM"]
    assert written["position_embedding_type"] is None
    assert "time_step_limit" not in written
    assert {name: written[name] for name in MULTIPLIERS} == MULTIPLIERS
