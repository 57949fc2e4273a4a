"""Public layers built inside anybody's own module, and `hf_mamba.Mamba` in the place of mamba_ssm's."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_mamba import Mamba, MambaConfig, MambaForCausalLM
from hf_mamba.models.common.blocks import CausalConv1d, RMSNorm
from hf_mamba.models.common.linear import Linear, LMHead, drawn_later
from hf_mamba.models.mamba.modeling_mamba import MambaMixer

CONFIG = MambaConfig(hidden_size=32, state_size=4, num_hidden_layers=4, vocab_size=50, use_bias=True)
NAN = float("nan")


@pytest.fixture
def dirty_memory(monkeypatch):
    """What torch.empty hands out is NaN, so that nothing uninitialised passes for a number."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(NAN) if k.get("dtype") is None else
                        empty(*a, **k).fill_(NAN if k["dtype"].is_floating_point else 0))  # fmt: skip


@pytest.mark.usefixtures("dirty_memory")
@pytest.mark.parametrize(
    "build",
    [
        lambda: MambaMixer(CONFIG, 0),
        lambda: Linear(5, 7),
        lambda: LMHead(5, 7, bias=False),
        lambda: CausalConv1d(6, 4, True, "silu"),
        lambda: RMSNorm(5, 1e-5),
        lambda: Mamba(16),
        lambda: nn.Sequential(nn.Linear(4, 16), Mamba(16, bias=True), nn.Linear(16, 2)),
    ],
)
def test_a_module_built_alone_holds_numbers(build):
    for name, parameter in build().named_parameters():
        assert parameter.isfinite().all(), name


def test_a_mixer_built_alone_is_drawn_as_in_the_paper():
    """mamba_simple.py: A = -1..-N, D = 1, softplus(bias) within the time steps, and out_proj over √layers."""
    torch.manual_seed(0)
    mixer, inside = MambaMixer(CONFIG, 0), MambaForCausalLM(CONFIG).backbone.layers[0].mixer
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 5).expand(64, 4))
    assert (mixer.D == 1).all()
    steps = F.softplus(mixer.dt_proj.bias)
    assert 0.001 <= steps.min() < 0.005 < 0.02 < steps.max() <= 0.1 + 1e-6
    for one in (mixer, inside):
        for layer, bound in ((one.in_proj, 32**-0.5), (one.x_proj, 64**-0.5), (one.out_proj, 64**-0.5 / 2)):
            assert 0.95 * bound < layer.weight.abs().max() <= bound
        assert not one.in_proj.bias.any()
    before = mixer.in_proj.weight.clone()
    mixer.in_proj.reset_parameters()  # as FSDP calls it of a module on the meta device
    assert not torch.equal(mixer.in_proj.weight, before)


def test_layers_of_a_model_to_be_loaded_or_partitioned_draw_nothing():
    before = torch.get_rng_state()
    with drawn_later():
        MambaMixer(CONFIG, 0)
    assert torch.equal(torch.get_rng_state(), before)
    MambaMixer(CONFIG, 0)
    assert not torch.equal(torch.get_rng_state(), before)


def formulas(layer: Mamba, u: torch.Tensor) -> torch.Tensor:
    """The paper's recurrence, one token after another: section 3.2, algorithm 2, figure 3."""
    x, z = (u @ layer.in_proj.weight.T).chunk(2, -1)
    taps = layer.conv1d.weight[:, 0]  # (E, k)
    padded = F.pad(x, (0, 0, taps.shape[1] - 1, 0))
    x = F.silu(sum(padded[:, i : i + x.shape[1]] * taps[:, i] for i in range(taps.shape[1])) + layer.conv1d.bias)
    dt, B, C = (x @ layer.x_proj.weight.T).split([layer.dt_rank, layer.d_state, layer.d_state], -1)
    dt = F.softplus(dt @ layer.dt_proj.weight.T + layer.dt_proj.bias)
    A, h, out = -layer.A_log.exp(), torch.zeros(len(u), layer.d_inner, layer.d_state, dtype=u.dtype), []
    for t in range(u.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + dt[:, t, :, None] * B[:, t, None] * x[:, t, :, None]
        out.append((h * C[:, t, None]).sum(-1) + layer.D * x[:, t])
    return (torch.stack(out, 1) * F.silu(z)) @ layer.out_proj.weight.T


@pytest.fixture
def layer() -> Mamba:
    torch.manual_seed(1)
    return Mamba(d_model=12, d_state=3, d_conv=3, expand=2, dt_rank=2).double()


U = torch.randn(2, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_the_layer_computes_the_papers_formulas(layer):
    torch.testing.assert_close(layer(U), formulas(layer, U))
    outputs, weights = (layer(U), formulas(layer, U)), list(layer.parameters())
    gradients = [torch.autograd.grad(out.square().sum(), weights) for out in outputs]
    torch.testing.assert_close(*gradients)


def test_its_arguments_and_names_are_those_of_mamba_ssm():
    layer = Mamba(64, d_state=8, d_conv=4, expand=3, dt_rank="auto", use_fast_path=False, layer_idx=2, bias=True,
                  device="cpu", dtype=torch.bfloat16)  # fmt: skip
    shapes = {name: tuple(p.shape) for name, p in layer.state_dict().items()}
    assert shapes == {
        "A_log": (192, 8), "D": (192,), "in_proj.weight": (384, 64), "in_proj.bias": (384,),
        "conv1d.weight": (192, 1, 4), "conv1d.bias": (192,), "x_proj.weight": (4 + 16, 192),
        "dt_proj.weight": (192, 4), "dt_proj.bias": (192,), "out_proj.weight": (64, 192), "out_proj.bias": (64,),
    }  # fmt: skip
    kept = {name for name, p in layer.named_parameters() if p.dtype == torch.float32}
    assert kept == {"A_log", "D", "dt_proj.bias"}
    assert layer(torch.randn(1, 5, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("gradients", [False, True])
def test_a_state_carries_on_and_documents_and_padding_are_kept_apart(layer, gradients: bool):
    with torch.set_grad_enabled(gradients):
        whole = layer(U)
        first, state = layer(U[:, :4], return_state=True)
        second, after = layer(U[:, 4:5], state=state, return_state=True)
        again = layer(U[:, 4:5], state=state)
        third = layer(U[:, 5:], state=after)
        torch.testing.assert_close(torch.cat([first, second, third], 1), whole)
        assert torch.equal(again, second), "the state that was given has not moved"
        packed = layer(U, seq_idx=torch.tensor([[0] * 4 + [1] * 5] * 2, dtype=torch.int32))
        torch.testing.assert_close(packed[:, 4:], layer(U[:, 4:]))
        mask = torch.tensor([[0, 0] + [1] * 7, [1, 0] * 4 + [1]])
        for row, found in enumerate(layer(U, attention_mask=mask)):
            real = mask[row].bool()
            torch.testing.assert_close(found[real], layer(U[row, real][None])[0])


def test_it_decodes_as_mamba_ssms_does(layer):
    """By `step` on allocated states, and by inference_params that several layers share."""
    whole = layer(U).detach()
    states = layer.allocate_inference_cache(2, 100)
    parameters = SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
    with torch.no_grad():
        torch.testing.assert_close(layer(U[:, :6], inference_params=parameters), whole[:, :6])
        for t in range(9):
            out, *same = layer.step(U[:, t : t + 1], *states)
            torch.testing.assert_close(out[:, 0], whole[:, t])
            assert all(a is b for a, b in zip(same, states, strict=True))
        for t in range(6, 9):
            parameters.seqlen_offset = t
            torch.testing.assert_close(layer(U[:, t : t + 1], inference_params=parameters)[:, 0], whole[:, t])
    with pytest.raises(ValueError, match="one token a row, not 2"):
        layer.step(U[:, :2], *states)
    with pytest.raises(ValueError, match="give the state once"):
        layer(U[:, :1], inference_params=parameters, state=states)


def test_the_examples_classifier_learns_what_only_both_directions_tell():
    """README's example."""

    class Classifier(nn.Module):
        def __init__(self, tokens: int = 4, width: int = 16, classes: int = 2):
            super().__init__()
            self.embedding = nn.Embedding(tokens, width)
            self.forwards, self.backwards = Mamba(width, d_state=4), Mamba(width, d_state=4)
            self.head = nn.Linear(2 * width, classes)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embedding(ids)
            both = torch.cat([self.forwards(x), self.backwards(x.flip(1)).flip(1)], -1)
            return self.head(both.mean(1))

    torch.manual_seed(0)
    ids = torch.randint(0, 4, (64, 12))
    labels = (ids[:, 0] == ids[:, -1]).long()
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(model(ids), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
