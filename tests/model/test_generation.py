"""Generation: padding on any side, states carried, saved and moved, prompts of any length."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from small import addresses, word
from transformers import DynamicCache

import hf_mamba
from hf_mamba import load_cache, save_cache

LENGTHS = [3, 11, 7]
NEW = 6
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model(make):
    """One that says something else after every prompt."""
    return make(initializer_range=0.5)


def _prompts(lengths: list[int] = LENGTHS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 61, (length,), generator=generator) for length in lengths]


def _padded(prompts: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side=side)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True, padding_side=side)
    return ids, mask


@pytest.mark.parametrize(
    "how", [{}, {"use_cache": False}, {"num_beams": 3}, {"num_beams": 3, "use_cache": False}], ids=str
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_generates_what_its_rows_generate_alone(model, side: str, how: dict):
    prompts = _prompts()
    alone = [model.generate(p[None], **GREEDY, **how)[0, len(p) :] for p in prompts]
    ids, mask = _padded(prompts, side)
    together = model.generate(ids, attention_mask=mask, **GREEDY, **how)
    assert torch.equal(together[:, -NEW:], torch.stack(alone))
    assert torch.equal(together[:, :-NEW], ids)
    assert len({tuple(row.tolist()) for row in alone}) == len(alone)  # the prompts matter


@pytest.mark.parametrize("chunk", [1, 2, 4, 5, 100])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("embeds", [False, True])
def test_chunked_prefill_changes_nothing(model, side: str, chunk: int, embeds: bool):
    ids, mask = _padded(_prompts(), side)
    inputs = {"inputs_embeds": model.get_input_embeddings()(ids)} if embeds else {"input_ids": ids}
    whole = model.generate(**inputs, attention_mask=mask, **GREEDY)
    assert torch.equal(model.generate(**inputs, attention_mask=mask, prefill_chunk_size=chunk, **GREEDY), whole)


def test_chunked_prefill_needs_a_state(model):
    with pytest.raises(ValueError, match="leave use_cache on"):
        model.generate(_prompts()[1][None], prefill_chunk_size=2, use_cache=False, **GREEDY)


@pytest.mark.parametrize("how", [{"do_sample": False}, {"num_beams": 4, "do_sample": False}, {"do_sample": True}])
def test_the_cache_changes_nothing(model, how: dict):
    ids, mask = _padded(_prompts(), "left")
    arguments = {"attention_mask": mask, "max_new_tokens": NEW, "num_return_sequences": how.get("num_beams", 2)}
    if not how["do_sample"] and "num_beams" not in how:
        arguments["num_return_sequences"] = 1
    results = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        results.append(model.generate(ids, use_cache=use_cache, eos_token_id=None, pad_token_id=0, **arguments, **how))
    assert torch.equal(*results)


def test_a_conversation_continues_from_the_returned_state(model):
    prompt = _prompts()[1][None]
    whole = model.generate(prompt, **GREEDY | {"max_new_tokens": 12})
    first = model.generate(prompt, return_dict_in_generate=True, **GREEDY)
    state = first.past_key_values
    second = model.generate(first.sequences[:, -1:], cache_params=state, **GREEDY)  # the token that it has not seen
    assert torch.equal(torch.cat([first.sequences, second[:, 1:]], 1), whole)
    # the user speaks: several tokens at once, a few at a time
    said = torch.tensor([[5, 9, 2, 44]])
    history = torch.cat([whole, said], 1)
    unpadded = torch.ones_like(history)  # the model may have written the padding's id
    expected = model.generate(history, attention_mask=unpadded, **GREEDY)[:, history.shape[1] :]
    for chunk in (None, 2):
        again = model.generate(prompt, return_dict_in_generate=True, **GREEDY | {"max_new_tokens": 12}).past_key_values
        new = torch.cat([whole[:, -1:], said], 1)
        got = model.generate(
            new, attention_mask=torch.ones_like(new), cache_params=again, prefill_chunk_size=chunk, **GREEDY
        )
        assert torch.equal(got[:, new.shape[1] :], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_next_token_sees_weights_that_changed_behind_autograds_back(make, dtype: torch.dtype):
    """As an engine's flat buffers do: written through .data, moved, at the old address or a new one."""
    model, other = make(dtype), make(dtype)
    ids, mask = _padded(_prompts(), "left")
    caches = [m(ids, attention_mask=mask, use_cache=True).cache_params for m in (model, other)]
    with torch.no_grad():
        model(ids[:, -1:], cache_params=caches[0])  # whatever is kept between tokens is kept by now
        other(ids[:, -1:], cache_params=caches[1])
        for parameter in model.parameters():
            parameter.data.mul_(1.25)
        expected = {name: parameter * 1.25 for name, parameter in other.named_parameters()}
        for name, parameter in other.named_parameters():
            parameter.data = expected[name]
        assert torch.equal(
            model(ids[:, :1], cache_params=caches[0]).logits, other(ids[:, :1], cache_params=caches[1]).logits
        )
        stepped = model(ids[:, 1:2], cache_params=caches[0]).logits
        with hf_mamba.ops.backend("torch"):
            plain = other(ids[:, 1:2], cache_params=caches[1]).logits
    scale = plain.abs().max()
    assert (stepped - plain).abs().max() < scale * (1e-5 if dtype == torch.float32 else 0.05)


def test_states_have_static_addresses_through_generation(model):
    cache = DynamicCache(config=model.config)
    ids = _prompts()[1][None]
    with torch.no_grad():
        model(ids, cache_params=cache, use_cache=True)
    before = addresses(cache)
    model.generate(ids, cache_params=cache, prefill_chunk_size=3, **GREEDY)
    assert before
    assert before == addresses(cache)


def test_the_static_cache_implementation_is_the_same(model):
    ids = _prompts()[1][None]
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, cache_implementation="static", **GREEDY), expected)


def test_reordering_a_cache_is_reordering_its_rows(model):
    ids, mask = _padded(_prompts(), "left")
    cache = model(ids, attention_mask=mask, use_cache=True).cache_params
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    step = torch.tensor([[7], [7], [8]])
    got = model(step, cache_params=cache).logits
    fresh = model(ids[order], attention_mask=mask[order], use_cache=True).cache_params
    torch.testing.assert_close(got, model(step, cache_params=fresh).logits, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kwargs", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": "itself"}], ids=str)
def test_what_a_state_cannot_do_is_refused(model, kwargs: dict):
    kwargs = {key: model if value == "itself" else value for key, value in kwargs.items()}
    with pytest.raises(ValueError, match="stateful"):
        model.generate(_prompts()[1][None], **GREEDY, **kwargs)


# ---- a state on disk


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_saved_state_continues_as_if_never_saved(make, tmp_path: Path, dtype: torch.dtype):
    model = make(dtype)
    ids, mask = _padded(_prompts(), "left")
    cache = model(ids, attention_mask=mask, use_cache=True).cache_params
    save_cache(cache, tmp_path / "state.safetensors", model.config)
    loaded = load_cache(tmp_path / "state.safetensors", model.config)
    more = torch.tensor([[4, 5], [6, 7], [8, 9]])
    assert torch.equal(model(more, cache_params=loaded).logits, model(more, cache_params=cache).logits)
    with safe_open(tmp_path / "state.safetensors", "pt") as file:
        assert len(file.keys()) == 2 * model.config.num_hidden_layers


def test_the_file_is_as_small_for_a_long_prompt(family, model, tmp_path: Path):
    if family.model_type == "granitemoehybrid":
        pytest.skip("attention keeps the keys and values of every token")
    sizes = []
    for length in (1, 10, 700):
        cache = model(torch.ones(1, length, dtype=torch.long), use_cache=True).cache_params
        save_cache(cache, tmp_path / "state", model.config)  # replaces the one before
        sizes.append((tmp_path / "state").stat().st_size)
    assert len(set(sizes)) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["state"]


def test_states_that_do_not_fit_are_refused(family, model, make, tmp_path: Path):
    file, size = tmp_path / "state", word(family, "state_size")
    with pytest.raises(ValueError, match="empty"):
        save_cache(DynamicCache(config=model.config), file, model.config)
    assert not file.exists()
    save_cache(model(_prompts()[0][None], use_cache=True).cache_params, file, model.config)
    other = type(model.config)(**(model.config.to_dict() | {size: 6}))
    with pytest.raises(ValueError, match=rf"{size} 5 \(the model: 6\)"):
        load_cache(file, other)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="cannot be read"):
        load_cache(file, model.config)
    torch.save({"a": 1}, file)
    with pytest.raises(ValueError, match="cannot be read"):
        load_cache(file, model.config)
    with pytest.raises(ValueError, match="cannot be read"):
        load_cache(tmp_path / "nowhere", model.config)


_MEASURE = """
import sys, torch
from hf_mamba import MambaConfig, MambaForCausalLM

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024

torch.set_num_threads(1)
model = MambaForCausalLM(MambaConfig(vocab_size=512, hidden_size=32, num_hidden_layers=2)).eval()
for length in (2048, 2048, 120_000):
    open("/proc/self/clear_refs", "w").write("5")
    ids = torch.ones(1, length, dtype=torch.long)
    model.generate(ids, max_new_tokens=2, prefill_chunk_size=1024, eos_token_id=None)
    print(peak())
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_memory_is_flat_in_the_length_of_the_prompt():
    done = subprocess.run([sys.executable, "-c", _MEASURE], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    _, short, long = map(float, done.stdout.split())
    # the ids, the mask and their bookkeeping: about 8 int64 a token. The activations of 120,000 tokens would be 180 MB.
    assert long - short < 40, f"{short:.0f} MiB for 2,048 tokens, {long:.0f} MiB for 120,000"
