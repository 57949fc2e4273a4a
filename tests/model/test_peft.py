"""peft with task_type="CAUSAL_LM", the call that everybody uses."""

from pathlib import Path

import pytest
import torch

import hf_mamba

peft = pytest.importorskip("peft")

IDS = torch.arange(2 * 13).view(2, 13) * 11 % 61
EVERYTHING = ["in_proj", "x_proj", "dt_proj", "out_proj", "embeddings", "lm_head"]


@pytest.fixture(params=[True, False], ids=["registered", "plain"])
def registered(request):
    """peft refuses a layer or two of every `mamba` by itself; registered, ours are taken, since each is called."""
    if request.param:
        hf_mamba.register()
    yield request.param
    hf_mamba.unregister()


def lora(**how: object):
    return peft.LoraConfig(**({"task_type": "CAUSAL_LM", "r": 2, "init_lora_weights": False} | how))


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"target_modules": ["in_proj", "x_proj"], "use_dora": True},
        {"target_modules": "all-linear"},
        {"target_modules": ["in_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": EVERYTHING},
    ],
    ids=["default", "dora", "all-linear", "modules_to_save", "everything"],
)
def test_lora_trains_merges_saves_and_loads(family, make, registered, how, tmp_path: Path):
    untied = {"tie_word_embeddings": False}
    refused = how and (how["target_modules"] == "all-linear" or "out_proj" in how["target_modules"])
    if not registered and (not how or (refused and family.model_type != "granitemoehybrid")):
        pytest.skip("peft itself refuses it for this model_type")
    torch.manual_seed(0)
    base = make(torch.float32, **untied)
    adapted = peft.get_peft_model(base, lora(**how)).train()
    adapted(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss.backward()
    trained = [(name, p) for name, p in adapted.named_parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for _, p in trained), [n for n, _ in trained]
    adapted.eval()
    with torch.no_grad():
        expected = adapted(input_ids=IDS).logits
        assert not torch.allclose(expected, make(torch.float32, **untied)(IDS).logits, atol=1e-3)
        adapted.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(make(torch.float32, **untied), tmp_path)
        torch.testing.assert_close(again(input_ids=IDS).logits, expected)
        adapted.merge_adapter()
        torch.testing.assert_close(adapted(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
        adapted.unmerge_adapter()
        torch.testing.assert_close(adapted(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-4)
        how = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 3, "do_sample": False}
        assert torch.equal(merged.generate(IDS, **how), adapted.generate(input_ids=IDS, **how))


def test_prompt_tuning_is_a_prefix_of_embeddings_under_any_padding(make):
    model = make(torch.float32)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_attention_heads=1)
    tuned = peft.get_peft_model(model, config).eval()
    prompt = tuned.get_prompt(1)[0]
    mask = torch.tensor([[0] * 4 + [1] * 9, [1] * 13])
    found = tuned(input_ids=IDS, attention_mask=mask).logits
    for row in range(2):
        words = model.get_input_embeddings()(IDS[row, mask[row].bool()])
        alone = model(inputs_embeds=torch.cat([prompt, words])[None]).logits[0, 3:]
        torch.testing.assert_close(found[row, 3:][mask[row].bool()], alone, rtol=1e-4, atol=1e-5)
    tuned.train()(input_ids=IDS, attention_mask=mask, labels=IDS).loss.backward()
    assert tuned.prompt_encoder.default.embedding.weight.grad.abs().sum() > 0


def test_prefix_tuning_is_refused_in_words(make):
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_attention_heads=1, num_layers=2, token_dim=24
    )
    tuned = peft.get_peft_model(make(torch.float32), config)
    with pytest.raises(ValueError, match="no keys and values, so that prefix tuning cannot"):
        tuned(input_ids=IDS)
