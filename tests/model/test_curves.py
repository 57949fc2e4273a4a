"""200 updates of every family beside an independent model: the same weights, data and optimizer, nothing shared."""

from typing import Any

import papers
import pytest
import torch
import torch.nn.functional as F

from hf_mamba.family import FAMILIES, family_of

MODELS: dict[str, dict[str, Any]] = {
    "mamba": {"hidden_size": 16, "state_size": 3, "num_hidden_layers": 2},
    "mamba2": {
        **{"hidden_size": 16, "num_heads": 4, "head_dim": 8, "n_groups": 2, "state_size": 3, "num_hidden_layers": 2},
        **{"tie_word_embeddings": True},
    },
    "granitemoehybrid": {
        **{"hidden_size": 16, "num_hidden_layers": 2, "layer_types": ["mamba", "attention"], "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "shared_intermediate_size": 20, "mamba_n_heads": 4, "mamba_d_head": 8},
        **{"mamba_d_state": 3, "embedding_multiplier": 2.0, "residual_multiplier": 0.7, "logits_scaling": 1.5},
    },
}
STEPS, ROWS, LENGTH, VOCABULARY = 200, 3, 10, 23


def batches() -> list[torch.Tensor]:
    """Rows that count up by one of three strides from anywhere."""
    random = torch.Generator().manual_seed(3)
    starts = torch.randint(0, VOCABULARY, (STEPS, ROWS, 1), generator=random)
    strides = torch.randint(1, 4, (STEPS, ROWS, 1), generator=random)
    return list((starts + strides * torch.arange(LENGTH)) % VOCABULARY)


def build(model_type: str, dtype: torch.dtype) -> Any:
    config = {"model_type": model_type, "vocab_size": VOCABULARY, "pad_token_id": 0, **MODELS[model_type]}
    family = family_of(config)
    torch.manual_seed(0)
    return family.model_class(family.config_class(**config)).to(dtype).train()


def train(parameters: list[torch.Tensor], loss_of: Any) -> torch.Tensor:
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, weight_decay=0.1, foreach=False)
    losses = []
    for ids in batches():
        loss = loss_of(ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def curve_of_the_paper(request: pytest.FixtureRequest) -> tuple[str, torch.Tensor]:
    model = build(request.param, torch.float64)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    logits_of = getattr(papers, request.param)

    def loss(ids: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits_of(weights, model.config, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    return request.param, train(list(weights.values()), loss)


def test_in_float64_the_losses_are_the_papers(curve_of_the_paper: tuple[str, torch.Tensor]):
    name, expected = curve_of_the_paper
    model = build(name, torch.float64)
    found = train(list(model.parameters()), lambda ids: model(ids, labels=ids).loss)
    assert expected[-20:].mean() < 0.5 * expected[0]  # it has learned something
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_in_bf16_they_differ_by_rounding_alone(curve_of_the_paper: tuple[str, torch.Tensor]):
    """As Trainer trains: weights in fp32, products in bf16. At each moment the mean of 20 losses is within 3%."""
    name, expected = curve_of_the_paper
    model = build(name, torch.float32)

    def loss(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(ids, labels=ids).loss

    found = train(list(model.parameters()), loss)
    means = [curve.unfold(0, 20, 20).mean(1) for curve in (found, expected)]
    torch.testing.assert_close(*means, rtol=0.03, atol=0.01)
    assert (found - expected).abs().max() > 1e-6  # it was bf16
