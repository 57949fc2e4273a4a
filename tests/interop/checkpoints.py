"""Builders of small models, tokenizers and folders for the tests of this directory."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_mamba import MambaConfig, MambaForCausalLM
from hf_mamba.models.mamba import original as formats

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "with", "it", "to", "sea"]


def make_model(seed: int = 0, **config) -> MambaForCausalLM:
    """A small fp32 model in eval mode, every weight moved off its initial value."""
    torch.manual_seed(seed)
    fields = {"vocab_size": 64, "hidden_size": 20, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.3}
    model = MambaForCausalLM(MambaConfig(**(fields | config)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def make_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<eos>", "<pad>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", bos_token="<eos>"
    )


def write_original(model: MambaForCausalLM, folder: Path, **changes) -> Path:
    """The model as mamba_ssm's `save_pretrained` writes it: config.json and pytorch_model.bin."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(formats.config_to_original(model.config) | changes))
    state = {name.replace("backbone.embeddings", "backbone.embedding"): t for name, t in model.state_dict().items()}
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
