"""The attentions of a hybrid, and the names of attention that it takes: beside transformers' own class."""

import pytest
import torch
from test_beside_stock import pair
from transformers import DynamicCache, StaticCache

from hf_mamba import GraniteMoeHybridForCausalLM, GraniteMoeHybridForSequenceClassification

IDS = torch.arange(2 * 13).view(2, 13) * 11 % 60 + 1  # 0 is padding
LEFT = torch.tensor([[0] * 4 + [1] * 9, [1] * 13])
HOLES = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 0], [1] * 13])


@pytest.fixture(scope="module")
def both() -> dict[str, torch.nn.Module]:
    """Ours, which computes attention by kernels, and stock, eager; without a bias, by which stock's padding leaks."""
    models = pair("granitemoehybrid", mamba_proj_bias=False)
    models["stock"].set_attn_implementation("eager")
    assert models["ours"].config._attn_implementation == "sdpa"
    return {whose: model.eval() for whose, model in models.items()}


def same(found, expected, real: torch.Tensor) -> None:
    """The weights of each layer, in the rows of real tokens."""
    assert len(found) == len(expected) == 1  # one of two layers is attention
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        rows = real.bool()[:, None, -ours.shape[2] :, None]
        torch.testing.assert_close(ours * rows, theirs * rows, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("mask", [None, LEFT, LEFT.flip(1)], ids=["plain", "left", "right"])
def test_attentions_are_stocks_and_change_nothing(both, mask):
    given = {"attention_mask": mask, "output_hidden_states": True, "output_attentions": True}
    ours, theirs = (model(IDS, **given) for model in both.values())
    assert list(ours)[2:] == list(theirs)[2:]  # the past has another name in some versions
    real = torch.ones_like(IDS) if mask is None else mask
    same(ours.attentions, theirs.attentions, real)
    without = both["ours"](IDS, attention_mask=mask)
    assert without.attentions is None
    torch.testing.assert_close(ours.logits[real.bool()], without.logits[real.bool()], rtol=0, atol=1e-5)
    body = [model.base_model(IDS, **given, return_dict=False) for model in both.values()]
    assert [len(values) for values in body] == [4, 4]
    same(body[0][-1], body[1][-1], real)


@torch.no_grad()
@pytest.mark.parametrize(
    "how",
    [{}, {"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}],
    ids=str,
)
def test_generate_returns_stocks_attentions(both, how: dict):
    asked = {"output_attentions": True, "return_dict_in_generate": True, "output_hidden_states": True}
    greedy = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ours, theirs = (m.generate(IDS, attention_mask=LEFT, **greedy, **asked, **how) for m in both.values())
    assert torch.equal(ours.sequences, theirs.sequences)
    assert len(ours.attentions) == len(theirs.attentions) == 4
    real = torch.cat([LEFT, torch.ones(2, 4)], 1).repeat_interleave(how.get("num_beams", 1), 0)
    for new, (mine, stocks) in enumerate(zip(ours.attentions, theirs.attentions, strict=True)):
        same(mine, stocks, real[:, : 13 + new])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_turns_of_any_padding_have_the_columns_of_the_whole_mask(both, kind: str):
    """A row's tokens attend to the same ones as alone, wherever padding is; documents that ended have no weight."""
    model = both["ours"]
    make = {"dynamic": lambda: DynamicCache(config=model.config),
            "static": lambda: StaticCache(config=model.config, max_cache_len=30)}[kind]  # fmt: skip
    cache = make()
    model(IDS, attention_mask=HOLES, cache_params=cache)
    mask = torch.cat([HOLES, HOLES.flip(1)], 1)
    found = model(IDS.flip(1), attention_mask=mask, cache_params=cache, output_attentions=True).attentions[0]
    ids = torch.cat([IDS, IDS.flip(1)], 1)
    for row in range(2):
        alone = model(ids[row, mask[row].bool()][None], output_attentions=True).attentions[0][0]
        real = mask[row].bool()
        new = found[row][:, real[13:]]
        columns = torch.nn.functional.pad(real, (0, new.shape[2] - 26))
        torch.testing.assert_close(new[:, :, columns], alone[:, -new.shape[1] :], rtol=0, atol=1e-5)
        assert (new[:, :, ~columns] == 0).all()
    seq_idx = (torch.arange(13) >= 9).int()[None].expand(2, -1)
    packed = model(IDS, seq_idx=seq_idx, output_attentions=True).attentions[0]
    torch.testing.assert_close(packed[..., 9:, 9:], model(IDS[:, 9:], output_attentions=True).attentions[0])
    assert (packed[..., 9:, :9] == 0).all()


@pytest.mark.parametrize("mask", [None, HOLES])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_attentions_lie_on_the_path_of_the_gradients(mask, checkpointing: bool):
    model = pair("granitemoehybrid")["ours"].train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    output = model(IDS, attention_mask=mask, labels=IDS, output_attentions=True, output_hidden_states=True)
    recorded = [*output.attentions, *output.hidden_states]
    for tensor in recorded:
        tensor.retain_grad()
    output.loss.backward()
    assert all(tensor.grad.abs().sum() > 0 for tensor in recorded)


def test_attention_goes_by_stocks_names(both, tmp_path):
    model = both["ours"]
    model.save_pretrained(tmp_path)
    for name in ("eager", "sdpa", "flex_attention"):
        loaded = GraniteMoeHybridForCausalLM.from_pretrained(tmp_path, attn_implementation=name).eval()
        assert loaded.config._attn_implementation == name
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)
    weights = []
    loaded.base_model.layers[1].self_attn.register_forward_hook(lambda _, __, output: weights.append(output[1]))
    for name in ("eager", "sdpa"):
        loaded.set_attn_implementation(name)
        loaded(IDS)
    assert [one is None for one in weights] == [False, True]
    with pytest.raises(ValueError, match="eager"):
        loaded.config.output_attentions = True  # transformers' word: by the configuration, attention has to be eager
    eager = GraniteMoeHybridForSequenceClassification.from_pretrained(tmp_path, output_attentions=True, num_labels=3,
                                                                      attn_implementation="eager")  # fmt: skip
    assert eager(IDS).attentions[0].shape == (2, 6, 13, 13)


def test_eager_attention_has_second_derivatives_of_its_own():
    model = pair("granitemoehybrid")["ours"].double().eval()
    model.set_attn_implementation("eager")
    embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
    outputs = model(inputs_embeds=embeds, use_cache=False).logits.square().sum()
    gradient = torch.autograd.grad(outputs, embeds, create_graph=True)[0]
    assert torch.autograd.grad(gradient.square().sum(), embeds)[0].isfinite().all()


def test_hidden_states_are_chosen_by_number_as_in_stock(both):
    ours, theirs = (model(IDS, output_hidden_states=[0, 2]).hidden_states for model in both.values())
    assert [one is None for one in ours] == [one is None for one in theirs]
    for mine, stocks in zip(ours, theirs, strict=True):
        if mine is not None:
            torch.testing.assert_close(mine, stocks, rtol=0, atol=1e-4)
