"""What a training step of the whole model may be put through, on both backends that run here: nothing changes."""

import pytest
import torch

from hf_mamba import ops

IDS = torch.arange(2 * 37).view(2, 37) * 7 % 61
SEQ_IDX = (torch.arange(37) // 16).expand(2, -1).int()


@pytest.fixture(params=["cpu", "torch"])
def backend(request):
    if ops.available_backends()[request.param] != "available":
        pytest.skip(ops.available_backends()[request.param])
    with ops.backend(request.param):
        yield request.param


def gradients(model, **inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(labels=IDS, seq_idx=SEQ_IDX, **inputs).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


def distance(found: dict, expected: dict) -> float:
    """The largest error of a tensor, of the tensor's own norm."""
    assert found.keys() == expected.keys()
    return max(float((found[n].double() - v.double()).norm() / v.double().norm()) for n, v in expected.items())


@pytest.fixture
def exact(make) -> dict[str, torch.Tensor]:
    """The same weights in float64."""
    with ops.backend("reference"):
        return gradients(make(torch.float32).double().train(), input_ids=IDS)


def test_a_plain_step(make, backend, exact):
    assert distance(gradients(make(torch.float32).train(), input_ids=IDS), exact) < 1e-5


def test_autocast(make, backend, exact):
    """The products are bf16; parameters, their gradients and the loss stay fp32."""
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(make(torch.float32).train(), input_ids=IDS)
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert 1e-4 < distance(found, exact) < 0.05


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(make, backend, reentrant: bool):
    model = make(torch.float32).train()
    expected = gradients(model, input_ids=IDS)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert distance(gradients(model, input_ids=IDS), expected) < 3e-6  # fp32's rounding


def test_a_second_backward_through_a_retained_graph(make, backend):
    model = make(torch.float32).train()
    loss = model(IDS, labels=IDS, seq_idx=SEQ_IDX).loss
    parameters = list(model.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, parameters), strict=True))


def test_input_that_is_not_contiguous(make, backend):
    model = make(torch.float32).train()
    embeds = model.get_input_embeddings()(IDS).detach()
    strided = embeds.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    expected = gradients(model, inputs_embeds=embeds)
    assert distance(gradients(model, inputs_embeds=strided), expected) < 1e-6


def test_compiled_as_one_graph(make, backend):
    torch.compiler.reset()
    model = make(torch.float32).train()
    expected = gradients(model, input_ids=IDS)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    loss = compiled(input_ids=IDS, labels=IDS, seq_idx=SEQ_IDX, use_cache=False).loss
    loss.backward()
    found = {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}
    assert distance(found, expected) < 1e-5


def test_a_forced_backend_that_cannot_serve_stops_the_model(make, monkeypatch):
    monkeypatch.setenv("HF_MAMBA_BACKEND", "cpu")
    with pytest.raises(ValueError, match="'cpu' is forced but cannot serve .* not float64"):
        make(torch.float64)(IDS)
