"""torch.compile with inductor, whole graphs only: a training step, and decoding as generate compiles it."""

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

# one length for all prompts: transformers sizes static keys and values by it
GREEDY = {"max_length": 14, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def _prompt(batch: int, length: int) -> torch.Tensor:
    return torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(length))


def test_a_training_step(make, fewest: int):
    """Packed rows, loss and every gradient; the second step compiles nothing."""
    model = make(torch.float32, num_hidden_layers=fewest).train()
    compiled = torch.compile(model, fullgraph=True)
    ids = _prompt(2, 9)
    seq_idx = torch.tensor([[0] * 4 + [1] * 5, [0] * 9], dtype=torch.int32)
    for _ in range(2):
        gradients, losses = [], []
        for call in (model, compiled):
            model.zero_grad()
            loss = call(input_ids=ids, labels=ids, seq_idx=seq_idx, use_cache=False).loss
            loss.backward()
            losses.append(loss.detach())
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        torch.testing.assert_close(*losses)
        for name, expected in gradients[0].items():
            error = (gradients[1][name] - expected).abs().max() / expected.abs().max()
            assert error < 1e-4, name
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_decoding_is_compiled_once_for_each_batch_size(make, fewest: int):
    """generate's own mechanism: a static cache. Neither another token nor another prompt compiles anything."""
    model = make(torch.float32, num_hidden_layers=fewest, initializer_range=0.5)
    config = CompileConfig(fullgraph=True, mode="default")
    config._compile_all_devices = True  # generate compiles on accelerators only, unless told
    how = GREEDY | {"cache_implementation": "static", "compile_config": config}
    for batch, length, graphs in ((1, 7, 1), (1, 3, 1), (2, 5, 2), (2, 8, 2), (1, 4, 2)):
        ids = _prompt(batch, length)
        expected = model.generate(ids, **GREEDY)
        assert torch.equal(model.generate(ids, **how), expected)
        assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


@pytest.mark.parametrize("gradients", [False, True])
def test_an_export_takes_every_length_from_two_on(make, fewest: int, gradients: bool):
    """One graph for a part of a chunk and for several, with the gradients of the weights."""
    model = make(torch.float32, num_hidden_layers=fewest)

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=ids, use_cache=False).logits

    length = torch.export.Dim("length", min=2, max=4096)
    with torch.set_grad_enabled(gradients):
        program = torch.export.export(Logits(), (_prompt(1, 12),), dynamic_shapes={"ids": {1: length}})
        exported = program.module()
        for tokens in (2, 8, 9, 33, 257):
            ids = _prompt(1, tokens)
            expected = model(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(exported(ids), expected)
            if gradients:
                own = dict(exported.named_parameters())
                found = torch.autograd.grad(exported(ids).square().sum(), list(own.values()), allow_unused=True)
                names = [name.removeprefix("model.") for name in own]
                weights = [model.get_parameter(name) for name in names]
                wanted = torch.autograd.grad(expected.square().sum(), weights, allow_unused=True)
                for name, a, b in zip(names, found, wanted, strict=True):
                    assert (a is None) == (b is None), name
                    assert a is None or (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-7, name


@pytest.mark.gpu
def test_decoding_on_a_gpu_replays_a_captured_graph(make):
    """As above with the mode that generate chooses there: nothing keeps CUDA graphs from being used."""
    model = make(torch.float32, initializer_range=0.5).cuda()
    for batch, length in ((1, 7), (1, 3), (2, 5)):
        ids = _prompt(batch, length).cuda()
        expected = model.generate(ids, **GREEDY)
        assert torch.equal(model.generate(ids, cache_implementation="static", **GREEDY), expected)
    assert counters["stats"]["unique_graphs"] == 2
    assert counters["inductor"]["cudagraph_skips"] == 0
