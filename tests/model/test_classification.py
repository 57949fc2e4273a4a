"""MambaForSequenceClassification: the last real token under any padding, saved and loaded, by its name and by Auto."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import hf_mamba
from hf_mamba import MambaConfig, MambaForCausalLM, MambaForSequenceClassification

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "vocab_size": 61, "state_size": 5, "pad_token_id": 0}
DOCS = [torch.arange(1, 1 + n) * 7 % 60 + 1 for n in (3, 9, 6)]


@pytest.fixture(scope="module")
def model() -> MambaForSequenceClassification:
    torch.manual_seed(0)
    return MambaForSequenceClassification(MambaConfig(**SIZES, num_labels=3)).double().eval()


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.long)
    for row, doc in enumerate(DOCS):
        where = torch.arange(len(doc)) + {"left": 12 - len(doc), "right": 0, "between": 0}[side]
        if side == "between":
            where[-1] = 11 - row
        ids[row, where], mask[row, where] = doc, 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right", "between"])
def test_padding_changes_nothing(model, side: str):
    alone = torch.cat([model(doc[None]).logits for doc in DOCS])
    ids, mask = padded(side)
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, alone)
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds, attention_mask=mask).logits, alone)
    if side == "right":  # the padding's id says it, too
        torch.testing.assert_close(model(ids).logits, alone)
    expected = model.score(model.backbone(DOCS[1][None]).last_hidden_state[:, -1])
    torch.testing.assert_close(alone[1:2], expected)


@pytest.mark.parametrize(
    ("labels", "problem", "loss"),
    [
        (torch.tensor([0, 2, 1]), None, torch.nn.CrossEntropyLoss()),
        (torch.rand(3, 3).double(), "regression", torch.nn.MSELoss()),
        (torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]]).double(), None, torch.nn.BCEWithLogitsLoss()),
    ],
)
def test_the_loss_is_that_of_the_labels_kind(model, labels, problem, loss):
    model.config.problem_type = problem
    ids, mask = padded("left")
    output = model(ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(output.loss, loss(output.logits, labels))
    torch.testing.assert_close(model(ids, attention_mask=mask, labels=labels, return_dict=False)[0], output.loss)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.config.problem_type = None


def test_what_has_no_class_is_refused(model):
    with pytest.raises(ValueError, match="row 1 is padding alone"):
        model(DOCS[0].repeat(2, 1), attention_mask=torch.tensor([[1, 1, 1], [0, 0, 0]]))
    with pytest.raises(ValueError, match="seq_idx packs several"):
        model(DOCS[0][None], seq_idx=torch.zeros(1, 3, dtype=torch.int32))


def test_saved_loaded_registered_and_begun_from_a_language_model(model, tmp_path: Path):
    ids, mask = padded("left")
    model.float().save_pretrained(tmp_path / "classifier")
    expected = model(ids, attention_mask=mask).logits
    hf_mamba.register()
    try:
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier").eval()
    finally:
        hf_mamba.unregister()
    assert type(again) is MambaForSequenceClassification
    assert again.config.num_labels == 3
    torch.testing.assert_close(again(ids, attention_mask=mask).logits, expected)
    model.double()
    for tied in (True, False):
        lm = MambaForCausalLM(MambaConfig(**SIZES, tie_word_embeddings=tied))
        lm.save_pretrained(tmp_path / "lm")
        fresh = MambaForSequenceClassification.from_pretrained(tmp_path / "lm", num_labels=4)
        assert fresh.score.weight.shape == (4, 24)
        assert 0 < fresh.score.weight.std() < 0.1
        for (name, mine), (_, theirs) in zip(
            fresh.backbone.named_parameters(), lm.backbone.named_parameters(), strict=True
        ):
            assert torch.equal(mine, theirs), name


def test_incomplete_checkpoints_are_taken_where_the_caller_says_so(tmp_path: Path):
    """As transformers takes them: an untied head that is missing, one layer more, another vocabulary."""
    MambaForSequenceClassification(MambaConfig(**SIZES)).save_pretrained(tmp_path / "no_head")
    MambaForCausalLM(MambaConfig(**SIZES)).save_pretrained(tmp_path / "tied")
    for folder, how in (
        ("no_head", {"tie_word_embeddings": False}),
        ("tied", {"num_hidden_layers": 3}),
        ("tied", {"vocab_size": 70}),
    ):
        with pytest.raises((ValueError, RuntimeError), match="ignore_mismatched_sizes"):
            MambaForCausalLM.from_pretrained(tmp_path / folder, **how)
        model = MambaForCausalLM.from_pretrained(tmp_path / folder, **how, ignore_mismatched_sizes=True)
        assert all(p.isfinite().all() for p in model.parameters()), how
        assert model(DOCS[0][None]).logits.shape[-1] == how.get("vocab_size", 61)
