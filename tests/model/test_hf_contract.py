"""What every transformers model does: the behaviours that its own common model and generation tests ask for."""

import copy
import inspect
import pickle
from pathlib import Path

import pytest
import tokenizers
import torch
from small import SMALL, carried
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerFast, StaticCache, TextStreamer
from transformers.data.data_collator import DataCollatorWithFlattening

from hf_mamba import MambaConfig, MambaForCausalLM
from hf_mamba.models.common.linear import LMHead

pytestmark = pytest.mark.core

IDS = torch.arange(2 * 13).view(2, 13) * 11 % 61


def test_the_configuration_behaves_like_one(tmp_path: Path):
    config = MambaConfig(hidden_size=37, num_hidden_layers=3, time_step_rank=2, bos_token_id=5)
    assert MambaConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    again = MambaConfig.from_pretrained(tmp_path)
    assert {k: v for k, v in again.to_dict().items() if k != "rescale_prenorm_residual"} == {
        k: v for k, v in config.to_dict().items() if k != "rescale_prenorm_residual"
    }
    config.hidden_size = 38
    assert config.to_dict()["hidden_size"] == 38
    assert copy.deepcopy(config).to_dict() == config.to_dict()
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()
    assert config.num_labels == 2
    config.num_labels = 3
    assert len(config.id2label) == 3


def test_signatures_and_capabilities(family, model):
    for cls in (family.base_class, family.model_class):
        names = list(inspect.signature(cls.forward).parameters)
        assert names[1] == "input_ids"
        assert cls.main_input_name == "input_ids"
    assert family.model_class.can_generate()
    assert not family.base_class.can_generate()
    assert model.base_model is getattr(model, model.base_model_prefix)
    assert model.device.type == "cpu"
    assert set(model._no_split_modules) == {type(model.base_model.layers[0]).__name__}
    assert isinstance(model.generation_config, GenerationConfig)


def test_a_forward_is_deterministic_and_changes_neither_inputs_nor_configuration(model):
    before = model.config.to_dict()
    ids = IDS.clone()
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert torch.equal(ids, IDS)
    assert model.config.to_dict() == before


def test_tuples_hold_what_dictionaries_hold(model):
    for kwargs in ({}, {"output_hidden_states": True}, {"labels": IDS}, {"use_cache": False}):
        as_dict = model(IDS, return_dict=True, **kwargs)
        as_tuple = model(IDS, return_dict=False, **kwargs)
        assert len(as_tuple) == len(as_dict.to_tuple())
        for one, other in zip(as_tuple, as_dict.to_tuple(), strict=True):
            if isinstance(one, torch.Tensor):
                assert torch.equal(one, other)


def test_hidden_states_of_every_layer_with_their_gradients(make):
    model = make()
    outputs = model(IDS, output_hidden_states=True, labels=IDS, use_cache=False)
    assert len(outputs.hidden_states) == model.config.num_hidden_layers + 1
    assert {tuple(h.shape) for h in outputs.hidden_states} == {(2, 13, model.config.hidden_size)}
    for hidden in outputs.hidden_states:
        hidden.retain_grad()
    outputs.loss.backward()
    assert all(hidden.grad is not None for hidden in outputs.hidden_states)
    model.config.output_hidden_states = True
    assert model(IDS).hidden_states is not None


def test_embeddings_in_place_of_ids(model):
    embeds = model.get_input_embeddings()(IDS)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(IDS).logits, rtol=0, atol=0)
    for kwargs in ({}, {"input_ids": IDS, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="exactly one"):
            model(**kwargs)


def test_input_and_output_embeddings_can_be_exchanged(make):
    model = make(tie_word_embeddings=False)
    new = torch.nn.Embedding(61, model.config.hidden_size, dtype=torch.float64)
    model.set_input_embeddings(new)
    assert model.get_input_embeddings() is new is model.base_model.get_input_embeddings()
    head = torch.nn.Linear(model.config.hidden_size, 61, bias=False, dtype=torch.float64)
    model.set_output_embeddings(head)
    assert model.get_output_embeddings() is head
    assert isinstance(head, LMHead)
    assert model(IDS).logits.shape == (2, 13, 61)


@pytest.mark.parametrize("tied", [True, False])
def test_resizing_up_and_down_and_generating_after(make, tied: bool):
    model = make(tie_word_embeddings=tied)
    rows = model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(70)
    assert model.config.vocab_size == 70 == model.lm_head.weight.shape[0] == model.lm_head.out_features
    assert torch.equal(model.get_input_embeddings().weight[:61], rows)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    assert model(IDS).logits.shape[-1] == 70
    model.resize_token_embeddings(61)
    assert torch.equal(model.get_input_embeddings().weight, rows)
    model.resize_token_embeddings(62, pad_to_multiple_of=16)
    assert model.config.vocab_size == 64
    assert model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2, eos_token_id=None).shape == (
        2,
        15,
    )
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()


def test_every_parameter_is_trained_and_may_be_frozen(family, make):
    model = make().train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    model.zero_grad(set_to_none=True)
    model.base_model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == [family.embedding]


def test_gradient_checkpointing_goes_on_and_off(make):
    model = make().train()
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    assert all(layer.gradient_checkpointing for layer in model.base_model.layers)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_copies_pickles_and_state_dicts_are_the_model(make, tmp_path: Path):
    model = make()
    expected = model(IDS).logits
    assert torch.equal(copy.deepcopy(model)(IDS).logits, expected)
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(IDS).logits, expected)
    other = make()
    torch.nn.init.zeros_(other.base_model.layers[0].mixer.D)
    assert not other.load_state_dict(model.state_dict(), strict=True).missing_keys
    assert torch.equal(other(IDS).logits, expected)


def test_building_on_the_meta_device_and_in_another_dtype():
    with torch.device("meta"):
        model = MambaForCausalLM(MambaConfig(hidden_size=64, num_hidden_layers=2))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    config = MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64)
    half = MambaForCausalLM._from_config(config, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.backbone.layers[0].mixer.A_log.dtype == torch.float32
    assert half(IDS).logits.dtype == torch.float32


def test_state_and_tokens_of_different_dtypes_meet(make):
    """A state of another run's dtype is taken: the scan's state is fp32, and all else is cast."""
    low, model = make(torch.bfloat16), make(torch.bfloat16).float()
    expected = model(torch.cat([IDS, IDS[:, :3]], 1)).logits[:, 15:]
    for before, after in ((low, model), (model, low)):
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=16)):
            before(IDS, cache_params=cache)
            assert {states["ssm"].dtype for states in carried(cache) if "ssm" in states} == {torch.float32}
            for part in (IDS[:, :2], IDS[:, 2:3]):
                found = after(part, cache_params=cache).logits
            torch.testing.assert_close(found, expected, atol=0.1, rtol=0)


@pytest.mark.parametrize("how", [{"do_sample": False}, {"do_sample": True}, {"num_beams": 2}], ids=str)
def test_generate_returns_what_is_asked_for(model, how: dict):
    rows = 2 * how.get("num_beams", 1)
    out = model.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, return_dict_in_generate=True, output_scores=True,
        output_logits=True, output_hidden_states=True, eos_token_id=None, pad_token_id=0, **how,
    )  # fmt: skip
    assert out.sequences.shape == (2, 17)
    assert len(out.scores) == len(out.logits) == len(out.hidden_states) == 4
    assert {tuple(s.shape) for s in out.scores} == {(rows, 61)}
    assert [h[0].shape[1] for h in out.hidden_states] == [13, 1, 1, 1]
    assert all(len(h) == model.config.num_hidden_layers + 1 for h in out.hidden_states)
    states, mixer = carried(out.past_key_values, rows - 1)[0], model.base_model.layers[0].mixer
    assert states["conv"].shape == mixer.conv1d.weight[:, 0].shape
    assert states["ssm"].shape[-1] == SMALL["state_size"]
    assert states["ssm"].numel() == mixer.out_proj.in_features * SMALL["state_size"]


def test_generation_stops_and_pads_each_row_for_itself(model):
    ones = torch.ones_like(IDS)
    plain = model.generate(IDS, attention_mask=ones, max_new_tokens=6, do_sample=False, eos_token_id=None)
    stop = int(plain[0, 14])
    out = model.generate(IDS, attention_mask=ones, max_new_tokens=6, do_sample=False, eos_token_id=stop, pad_token_id=0)
    first = int((out[0, 13:] == stop).int().argmax())
    assert (out[0, 13 + first + 1 :] == 0).all()
    shared = min(out.shape[1], plain.shape[1])
    until = int((plain[1, 13:] == stop).int().argmax()) if stop in plain[1, 13:] else shared - 13
    assert torch.equal(out[1, : 13 + until], plain[1, : 13 + until])


def test_processors_streamers_and_limits_of_generate(model):
    class Words:
        def decode(self, ids, **_):
            return " ".join(map(str, torch.as_tensor(ids).tolist())) + " "

    ones = torch.ones_like(IDS[:1])
    out = model.generate(
        IDS[:1], attention_mask=ones, max_length=20, min_length=20, streamer=TextStreamer(Words()), temperature=0.7,
        do_sample=True, top_k=5, top_p=0.9, repetition_penalty=1.2, no_repeat_ngram_size=2, bad_words_ids=[[3]],
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    assert out.shape == (1, 20)
    assert 3 not in out[0, 13:]


def test_generation_stops_at_a_string_that_ends_within_a_token(model):
    texts = {f"{i:02d}": i for i in range(61)} | {"abcdef": 61}  # which transformers puts before every token
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(texts, unk_token="abcdef"))
    words.decoder = tokenizers.decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="abcdef")
    how = {"attention_mask": torch.ones_like(IDS[:1]), "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    plain = model.generate(IDS[:1], **how)
    tokens = [f"{token:02d}" for token in plain[0, 13:].tolist()]
    stop = tokens[1] + tokens[2][0]  # half of the third token's text
    first = next(n for n in range(8) if stop in "".join(tokens[: n + 1]))
    out = model.generate(IDS[:1], **how, stop_strings=[stop], tokenizer=tokenizer)
    assert torch.equal(out, plain[:, : 13 + first + 1])


@pytest.mark.parametrize("what", [{"return_flash_attn_kwargs": True}, {"return_seq_idx": True}, {}], ids=str)
def test_transformers_padding_free_collator_is_understood(make, what: dict):
    """DataCollatorWithFlattening's rows: the loss is that of the documents one by one."""
    model = make().train()
    documents = [IDS[0, :5], IDS[1, :9], IDS[0, 3:12]]
    batch = DataCollatorWithFlattening(**what)([{"input_ids": d.tolist()} for d in documents])
    packed = model(**batch).loss
    losses = [model(input_ids=d[None], labels=d[None]).loss * (len(d) - 1) for d in documents]
    expected = sum(losses) / sum(len(d) - 1 for d in documents)
    torch.testing.assert_close(packed, expected)


_OFFSETS = torch.tensor([0, 5, 13])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_length_q": 5}, "max_length_q given without cu_seq_lens_q"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 5, 13]), "cu_seq_lens_k": torch.tensor([0, 6, 13])},
            "cu_seq_lens_k differs",
        ),
        ({"cu_seq_lens_q": torch.tensor([0, 5, 13]), "max_length_k": 7}, "max_length_k is 7, .* document of 8"),
    ],
)
def test_attention_kernels_hints_must_agree(model, kwargs: dict, message: str):
    with pytest.raises(ValueError, match=message):
        model(IDS[:1], **kwargs)


def test_compiling_captures_one_graph(make):
    model = make(torch.float32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
        torch.testing.assert_close(compiled(IDS, use_cache=False).logits, expected)
