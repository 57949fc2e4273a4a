"""Damaged, incomplete and malicious checkpoints: refused, named, and nothing changed on disk."""

import ast
import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import same_weights, write_original
from safetensors.torch import load_file, save_file

from hf_mamba import MambaForCausalLM
from hf_mamba.interop.convert import convert
from hf_mamba.interop.hub import Target, push


class _Code:
    """Pickles as a call; loading it would create the file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def truncated_shard(folder: Path) -> None:
    file = folder / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def truncated_header(folder: Path) -> None:
    (folder / "model-00001-of-00003.safetensors").write_bytes(b"\x08")


def absent_file(folder: Path) -> None:
    (folder / "model-00003-of-00003.safetensors").unlink()


def _edit_index(folder: Path, change: Callable[[dict], None]) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    change(index["weight_map"])
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def outside_path(folder: Path) -> None:
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder.parent / "x.safetensors")
    _edit_index(folder, lambda names: names.update({next(iter(names)): "../x.safetensors"}))


def absolute_path(folder: Path) -> None:
    _edit_index(folder, lambda names: names.update({next(iter(names)): "/etc/passwd"}))


def index_not_json(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ')


def _edit_tensors(folder: Path, change: Callable[[dict], object]) -> None:
    file = folder / "model-00002-of-00003.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})


def missing_tensor(folder: Path) -> None:
    _edit_tensors(folder, lambda state: state.pop("backbone.layers.0.mixer.x_proj.weight"))


def wrong_shape(folder: Path) -> None:
    name = "backbone.layers.0.mixer.x_proj.weight"
    _edit_tensors(folder, lambda state: state.update({name: state[name][:-1].clone()}))


def foreign_tensor(folder: Path) -> None:
    _edit_tensors(folder, lambda state: state.update({"backbone.layers.0.mixer.dt_layernorm.weight": torch.ones(2)}))


def integer_weights(folder: Path) -> None:
    name = "backbone.layers.0.mixer.x_proj.weight"
    _edit_tensors(folder, lambda state: state.update({name: state[name].to(torch.int8)}))


def code_in_bin(folder: Path) -> None:
    _only_bin(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"backbone.norm_f.weight": _Code(folder / "ran")}))


def code_in_zip_bin(folder: Path) -> None:
    _only_bin(folder)
    torch.save({"backbone.norm_f.weight": _Code(folder / "ran")}, folder / "pytorch_model.bin")


def truncated_bin(folder: Path) -> None:
    _only_bin(folder)
    torch.save({"a": torch.ones(1000)}, folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").write_bytes((folder / "pytorch_model.bin").read_bytes()[:2000])


def _bin(folder: Path, content: object) -> None:
    _only_bin(folder)
    torch.save(content, folder / "pytorch_model.bin")


def empty_bin(folder: Path) -> None:
    _only_bin(folder)
    (folder / "pytorch_model.bin").touch()


def number_as_a_name(folder: Path) -> None:
    _bin(folder, {1: torch.ones(2)})


def larger_than_its_bytes(folder: Path) -> None:
    _bin(folder, {"backbone.embeddings.weight": torch.ones(1).expand(50_000_000, 20)})


def sparse_tensor(folder: Path) -> None:
    _bin(folder, {"backbone.embeddings.weight": torch.eye(4).to_sparse()})


def meta_tensor(folder: Path) -> None:
    _bin(folder, {"backbone.embeddings.weight": torch.ones(4, device="meta")})


def integer_bin(folder: Path) -> None:
    _bin(folder, {"backbone.embeddings.weight": torch.ones(4, dtype=torch.int8)})


def lists_in_the_index(folder: Path) -> None:
    _edit_index(folder, lambda names: names.update({name: ["a"] for name in names}))


def deep_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")


def endless_layers(folder: Path) -> None:
    _edit_config(folder, num_hidden_layers=3_000_000)


def layers_beyond_the_weights(folder: Path) -> None:
    """Fewer than the weights have bytes, or than a count that costs nothing; each layer has matrices."""
    _edit_config(folder, num_hidden_layers=900_000)


def number_as_dtype(folder: Path) -> None:
    _edit_config(folder, dtype=1.5)


def list_as_model_type(folder: Path) -> None:
    _edit_config(folder, model_type=["mamba"])


def endless_labels(folder: Path) -> None:
    _edit_config(folder, num_labels=10_000_000_000)


def endless_vocabulary(folder: Path) -> None:
    _edit_config(folder, vocab_size=2**62)


def not_a_number(folder: Path) -> None:
    _edit_config(folder, hidden_size=float("nan"))


def no_layers(folder: Path) -> None:
    _edit_config(folder, num_hidden_layers=-1)


def nested_size(folder: Path) -> None:
    _edit_config(folder, hidden_size={"a": 1})


def dtype_that_is_a_function(folder: Path) -> None:
    _edit_config(folder, dtype="load")


def no_weights(folder: Path) -> None:
    _only_bin(folder)


def config_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _edit_config(folder: Path, **changes: object) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))


def field_of_the_wrong_kind(folder: Path) -> None:
    _edit_config(folder, hidden_size="20")


def unknown_dtype(folder: Path) -> None:
    _edit_config(folder, dtype="bloat16")


def unknown_activation(folder: Path) -> None:
    _edit_config(folder, hidden_act="sielu")


def more_layers_than_configured(folder: Path) -> None:
    _edit_config(folder, num_hidden_layers=1)


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def model_in_a_run(folder: Path) -> None:
    (folder / "model").mkdir()
    (folder / "config.json").rename(folder / "model" / "config.json")


def git_lfs_pointer(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 512\n"
    )


def _rename_tensors(folder: Path, name: Callable[[str], str]) -> None:
    state = {
        name(old): tensor for file in sorted(folder.glob("*.safetensors")) for old, tensor in load_file(file).items()
    }
    _only_bin(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def wrapped_model(folder: Path) -> None:
    _rename_tensors(folder, lambda name: f"_orig_mod.{name}")


def other_model(folder: Path) -> None:
    _rename_tensors(folder, lambda name: name.replace("backbone.", "h.").replace("norm_f", "ln_f"))


def _only_bin(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()


DAMAGES = {
    truncated_shard: "00002-of-00003.safetensors is truncated",
    truncated_header: "00001-of-00003.safetensors is truncated",
    absent_file: "not there: model-00003-of-00003",
    outside_path: r"names '\.\./x\.safetensors'",
    absolute_path: "names '/etc/passwd'",
    index_not_json: "not valid JSON",
    missing_tensor: r"lacks 1 .*layers\.0\.mixer\.x_proj\.weight",
    wrong_shape: r"x_proj\.weight is \(9, 40\), the configuration says \(10, 40\)",
    foreign_tensor: r"does not have: .*dt_layernorm",
    integer_weights: "dtype I8",
    code_in_bin: "pickled code",
    code_in_zip_bin: "pickled code",
    truncated_bin: r"pytorch_model\.bin is truncated",
    empty_bin: r"pytorch_model\.bin is truncated",
    number_as_a_name: "a tensor named 1, which is not text",
    larger_than_its_bytes: r"embeddings\.weight is \(50000000, 20\) and has only 4 bytes",
    sparse_tensor: r"embeddings\.weight is not a plain tensor",
    meta_tensor: r"embeddings\.weight is not a plain tensor",
    integer_bin: r"has dtype torch\.int8",
    lists_in_the_index: r"index\.json",
    deep_config: "nested too deeply",
    endless_layers: "num_hidden_layers is 3,000,000, and the weights have",
    layers_beyond_the_weights: "num_hidden_layers is 900,000 of hidden_size",
    number_as_dtype: "dtype is 1.5, which torch has not",
    list_as_model_type: r"model_type is \['mamba'\], which hf_mamba cannot load",
    endless_labels: "num_labels is 10,000,000,000, and the weights have",
    endless_vocabulary: "vocab_size is 4,611,686,018,427,387,904, and the weights",
    not_a_number: "hidden_size is nan",
    no_layers: "num_hidden_layers",
    nested_size: "'hidden_size' expected int",
    dtype_that_is_a_function: "dtype",
    config_not_json: r"config\.json",
    no_weights: "holds no weights|Error no file named",
    field_of_the_wrong_kind: r"config\.json .*'hidden_size' expected int, got str \(value: '20'\)",
    unknown_dtype: r"config\.json .*bloat16",
    unknown_activation: "hidden_act is 'sielu'; write one of .*silu",
    more_layers_than_configured: "holds 2 layers, and the configuration says num_hidden_layers 1",
    no_config: r"has no config\.json: it is not a model's folder\.$",
    model_in_a_run: r"has no config\.json.* Write .*model$",
    git_lfs_pointer: r"00002-of-00003\.safetensors is a Git LFS pointer.*git lfs pull",
    wrapped_model: r"begin with '_orig_mod\.', as a wrapped model.*key_mapping=\{'\^_orig_mod",
    other_model: r"no tensor of a Mamba: its names are such as 'h\.",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_folder_is_refused_by_name_and_left_alone(model, tmp_path: Path, damage: Callable[[Path], None]):
    folder = tmp_path / "model"
    model.save_pretrained(folder, max_shard_size="14KB")
    assert (folder / "model-00003-of-00003.safetensors").is_file()
    damage(folder)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises((ValueError, OSError), match=DAMAGES[damage]):
        MambaForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match=DAMAGES[damage]):
        convert(folder, tmp_path / "out", "transformers")
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": "20"}, "d_model is '20', not a whole number of at least 1"),
        ({"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple is 0, not a whole number"),
        ({"ssm_cfg": ["d_state"]}, r"ssm_cfg is \['d_state'\], not a block"),
        ({"ssm_cfg": {"d_state": "4"}}, r"'state_size' expected int, got str \(value: '4'\)"),
    ],
    ids=str,
)
def test_an_original_configuration_with_a_value_of_the_wrong_kind_is_refused(model, tmp_path: Path, changes, message):
    folder = write_original(model, tmp_path / "o", **changes)
    with pytest.raises(ValueError, match=message):
        MambaForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        convert(folder, tmp_path / "out", "transformers")


@pytest.mark.parametrize("content", ["[]", "[" * 100_000, "\0"])
def test_a_generation_config_that_is_none_is_refused(model, tmp_path: Path, content: str):
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match="generation_config.json is not"):
        MambaForCausalLM.from_pretrained(tmp_path)


def test_what_a_refusal_advises_works(model, tmp_path: Path):
    model.save_pretrained(tmp_path)
    wrapped_model(tmp_path)
    with pytest.raises(ValueError, match="key_mapping") as refusal:
        MambaForCausalLM.from_pretrained(tmp_path)
    advice = ast.literal_eval(re.search(r"key_mapping=(\{.*\})", str(refusal.value))[1])
    assert same_weights(MambaForCausalLM.from_pretrained(tmp_path, key_mapping=advice), model)


def test_a_file_is_not_taken_for_its_folder(stock_folder: Path, tmp_path: Path):
    file = stock_folder / "model.safetensors"
    for attempt in (MambaForCausalLM.from_pretrained, lambda path: convert(path, tmp_path / "out", "transformers")):
        with pytest.raises(ValueError, match=f"is a file. Write its folder, .*: {re.escape(str(stock_folder))}$"):
            attempt(file)
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_not_converted(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match=r"holds an adapter.*merge_and_unload\(\)\.save_pretrained"):
        convert(tmp_path, tmp_path / "out", "transformers")


def test_an_untied_head_that_is_missing_is_refused(model, tmp_path: Path):
    model.save_pretrained(tmp_path)
    _edit_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"lacks 1 .*lm_head\.weight"):
        MambaForCausalLM.from_pretrained(tmp_path)


def test_a_tied_head_that_is_not_the_embedding_is_refused(model, tmp_path: Path):
    folder = write_original(model, tmp_path / "o")
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="differs from"):
        convert(folder, tmp_path / "out", "transformers")
    assert not (tmp_path / "out").exists()


def _lose_a_rank(step: Path) -> None:
    next(step.glob("*rank_1*optim_states.pt")).unlink()


def _truncate(step: Path) -> None:
    file = next(step.glob("*rank_0*optim_states.pt"))
    file.write_bytes(file.read_bytes()[:-500])


def _inject(step: Path) -> None:
    file = next(step.glob("*rank_0*optim_states.pt"))
    torch.save({"optimizer_state_dict": _Code(step / "ran")}, file)


def _lose_the_models(step: Path) -> None:
    for file in step.glob("*model_states.pt"):
        file.unlink()


def _lose_the_step(step: Path) -> None:
    shutil.rmtree(step)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_lose_a_rank, "written by 2 ranks and holds the files of 1"),
        (_truncate, "truncated"),
        (_inject, "pickled code"),
        (_lose_the_models, "incomplete"),
        (_lose_the_step, "incomplete"),
    ],
)
def test_damaged_training_folders_are_refused(zero_folder: Path, tmp_path: Path, damage, message: str):
    folder = tmp_path / "zero3"
    shutil.copytree(zero_folder / "zero3", folder)
    step = next(folder.glob("global_step*"))
    damage(step)
    with pytest.raises(ValueError, match=message):
        MambaForCausalLM.from_pretrained(folder)
    assert not (step / "ran").exists()


def test_a_latest_file_cannot_lead_out_of_the_folder(zero_folder: Path, tmp_path: Path):
    folder = tmp_path / "zero3"
    shutil.copytree(zero_folder / "zero3", folder)
    (folder / "latest").write_text("../elsewhere")
    with pytest.raises(ValueError, match=r"'\.\./elsewhere'"):
        MambaForCausalLM.from_pretrained(folder)


def test_nothing_is_tried_again_where_the_hub_is_switched_off(stock_folder: Path):
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set: unset it"):
        push(stock_folder, Target("tester/m"))


def test_a_folder_that_is_no_run_is_not_pushed(tmp_path: Path):
    with pytest.raises(ValueError, match="holds no model"):
        push(tmp_path, Target("tester/m"))
