"""Muon against formulas in float64 that know only each family's matrices, by name, and against torch's own."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_mamba.family import all_presets, family_of, get_preset
from hf_mamba.preflight import Plan, resolve
from hf_mamba.training.muon import Muon, muon_groups, orthogonalise

SMALL = {
    "tiny_mamba": {"hidden_size": 24, "num_hidden_layers": 2, "state_size": 4, "use_bias": True},
    "tiny_mamba2": {"hidden_size": 24, "num_hidden_layers": 2, "head_dim": 8, "state_size": 6, "n_groups": 2},
    "tiny_hybrid": {
        **{"hidden_size": 24, "mamba_d_head": 8, "mamba_d_state": 6, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "shared_intermediate_size": 20},
    },
}
# what is fused in a tensor's rows, by the papers' names; every other matrix is one
PARTS: dict[str, dict[str, list[int]]] = {
    "tiny_mamba": {"in_proj": [48, 48], "x_proj": [2, 4, 4]},  # x|z, Δ|B|C
    "tiny_mamba2": {"in_proj": [48, 48, 12, 12, 6]},  # z|x|B|C|Δ
    "tiny_hybrid": {"in_proj": [48, 48, 6, 6, 6], "input_linear": [20, 20]},  # and gate|up
}
NOT_MUON = ("embed", "lm_head", "conv1d", "A_log")
LR, DECAY, MOMENTUM, BETAS, EPS = 3e-3, 0.1, 0.95, (0.9, 0.95), 1e-8


def build(preset: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = {**get_preset(preset).config, "vocab_size": 40, **SMALL[preset]}
    family = family_of(config)
    return family.model_class(family.config_class(**config))


def exact(matrix: np.ndarray) -> np.ndarray:
    """Five steps of 3.4445 s - 4.775 s^3 + 2.0315 s^5 on the singular values, which sum to one in squares at first."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    s = s / np.sqrt((s**2).sum())
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    return u * s @ v


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20), st.integers(-6, 6), st.integers(0, 99))
def test_singular_values_become_about_one(count: int, rows: int, columns: int, size: int, seed: int):
    matrices = np.random.default_rng(seed).normal(size=(count, rows, columns)) * 10.0**size
    ours = orthogonalise(torch.tensor(matrices, dtype=torch.float32)).numpy()
    np.testing.assert_allclose(ours, [exact(matrix) for matrix in matrices], atol=2e-4)


def test_nothing_is_made_of_nothing():
    assert torch.equal(orthogonalise(torch.zeros(1, 3, 5)), torch.zeros(1, 3, 5))


def reference(preset: str, names: list[str], start: dict[str, Any], gradients: list[dict[str, Any]]) -> dict[str, Any]:
    """The weights after these gradients, every matrix apart, in float64."""
    out = {}
    for name in names:
        value = start[name].astype(np.float64)
        matrix = value.ndim == 2 and not any(word in name for word in NOT_MUON)
        decay = DECAY if value.ndim >= 2 and "A_log" not in name else 0.0
        m, second = np.zeros_like(value), np.zeros_like(value)
        for step, gradient in enumerate((g[name].astype(np.float64) for g in gradients), 1):
            value = value * (1 - LR * decay)
            if matrix:
                m = MOMENTUM * m + (1 - MOMENTUM) * gradient
                update = (1 - MOMENTUM) * gradient + MOMENTUM * m
                rows = next((r for part, r in PARTS[preset].items() if f"{part}.weight" in name), [len(value)])
                parts = np.split(update, np.cumsum(rows)[:-1])
                value = value - LR * np.concatenate([0.2 * np.sqrt(max(p.shape)) * exact(p) for p in parts])
                continue
            m = BETAS[0] * m + (1 - BETAS[0]) * gradient
            second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
            root = np.sqrt(second / (1 - BETAS[1] ** step)) + EPS
            value = value - LR * m / (1 - BETAS[0] ** step) / root
        out[name] = value
    return out


@pytest.mark.parametrize("preset", PARTS)
def test_every_family_is_updated_as_its_matrices_apart(preset: str):
    model: Any = build(preset)
    named = dict(model.named_parameters())
    optimizer = Muon(muon_groups(model, model.config, DECAY), lr=LR, betas=BETAS, eps=EPS, fused=True)
    start = {name: p.detach().numpy().copy() for name, p in named.items()}
    random, gradients = np.random.default_rng(1), []
    for _ in range(4):
        gradients.append({name: random.normal(size=p.shape).astype(np.float32) for name, p in named.items()})
        for name, p in named.items():
            p.grad = torch.from_numpy(gradients[-1][name])
        optimizer.step()
    expected = reference(preset, list(named), start, gradients)
    for name, p in named.items():
        np.testing.assert_allclose(p.detach().numpy(), expected[name], atol=2e-6, rtol=2e-5, err_msg=name)
    kept = {frozenset(state) for state in optimizer.state.values()}
    assert kept == {frozenset({"momentum_buffer"}), frozenset({"step", "exp_avg", "exp_avg_sq"})}


def test_torch_does_the_same_with_tensors_that_are_cut_apart():
    """Its five steps are in bf16: the direction of an update agrees to that."""
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(96, 24))
    apart = [torch.nn.Parameter(part.clone()) for part in ours.detach().split((48, 48))]
    one = Muon([{"params": [ours], "matrices": (48, 48), "weight_decay": 0.1}], lr=0.02, fused=True)
    other = torch.optim.Muon(apart, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        before = ours.detach().clone()
        ours.grad = torch.randn_like(ours)
        for part, gradient in zip(apart, ours.grad.split((48, 48)), strict=True):
            part.grad = gradient.clone()
        one.step()
        other.step()
        difference = ours.detach() - torch.cat(apart).detach()
        assert difference.norm() < 0.05 * (ours.detach() - before).norm()
        for part, own in zip(apart, ours.detach().split((48, 48)), strict=True):
            part.data.copy_(own)


@pytest.mark.parametrize("preset", all_presets())
def test_the_parts_of_a_tensor_are_all_of_its_rows(preset: str):
    family = family_of(get_preset(preset).config)
    for row in family.parameters(get_preset(preset).config):
        matrix = len(row.shape) == 2 and row.decays and row.name not in (f"{family.embedding}.weight", family.head)
        matrix = matrix and "embed" not in row.name and "lm_head" not in row.name
        assert sum(row.matrices) == (row.shape[0] if matrix else 0), row.name


def test_what_cannot_have_whole_matrices_is_one_line():
    """Each rule's own example is tested with all the others'."""
    found = resolve({"optim": "muon", "deepspeed": "zero2", "world_size": 2})
    assert [problem.id for problem in found.problems] == ["muon-needs-whole-matrices"]
    plan = resolve({"optim": "muon"})
    assert isinstance(plan, Plan)
    assert (plan.optim, plan.training_arguments["optim"]) == ("muon", "muon")
