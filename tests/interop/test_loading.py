"""`from_pretrained` on every kind of folder, with the arguments that transformers users know."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import make_model, same_weights, write_original
from safetensors.torch import load_file, save_file

from hf_mamba import MambaConfig, MambaForCausalLM, MambaModel

pytestmark = pytest.mark.core


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["one file", "sharded", "bin", "old bin", "original"])
def test_every_kind_of_folder_loads_bit_for_bit(tmp_path: Path, kind: str, tied: bool):
    model = make_model(tie_word_embeddings=tied)
    folder = tmp_path / "model"
    if kind == "original":
        write_original(model, folder)
    elif kind.endswith("bin"):
        model.config.save_pretrained(folder)
        zipped = kind == "bin"
        torch.save(model.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    else:
        model.save_pretrained(folder, max_shard_size="20KB" if kind == "sharded" else "1GB")
        assert (folder / "model.safetensors.index.json").is_file() == (kind == "sharded")
    loaded, info = MambaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert same_weights(loaded, model)
    assert not info["missing_keys"]
    assert loaded.config.tie_word_embeddings is tied
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) is tied
    assert same_weights(MambaModel.from_pretrained(folder), model.backbone)
    loaded.save_pretrained(tmp_path / "again")  # stock, wherever it came from
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == set(model.state_dict()) - (
        {"lm_head.weight"} if tied else set()
    )


def test_a_stock_folder_with_the_originals_embedding_name_loads(model, tmp_path: Path):
    model.config.save_pretrained(tmp_path)
    state = {name.replace("embeddings", "embedding"): tensor for name, tensor in model.state_dict().items()}
    del state["lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert same_weights(MambaForCausalLM.from_pretrained(tmp_path), model)


def test_a_bare_backbone_becomes_a_tied_language_model(model, tmp_path: Path):
    model.backbone.save_pretrained(tmp_path)
    assert same_weights(MambaForCausalLM.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_folders_equal_deepspeeds_own_consolidation(zero_folder: Path, stage: int):
    loaded = MambaForCausalLM.from_pretrained(zero_folder / f"zero{stage}")
    expected = load_file(zero_folder / f"zero{stage}.safetensors")
    state = loaded.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    assert loaded.dtype == torch.float32  # the master weights, not their bf16 copies
    assert loaded.config.bos_token_id == loaded.generation_config.bos_token_id == 7


def test_zero_folders_take_arguments_and_a_step_without_latest(zero_folder: Path, tmp_path: Path):
    folder = tmp_path / "zero3"
    shutil.copytree(zero_folder / "zero3", folder)
    (folder / "latest").unlink()
    loaded = MambaForCausalLM.from_pretrained(folder, dtype="bfloat16", use_cache=False)
    assert loaded.dtype == torch.bfloat16
    assert loaded.backbone.layers[0].mixer.D.dtype == torch.float32
    assert loaded.config.use_cache is False
    assert loaded.config.name_or_path == str(folder)


@pytest.mark.parametrize("kind", ["stock", "original"])
def test_arguments_keep_their_meaning(model, tmp_path: Path, kind: str):
    outer = tmp_path / "outer"
    folder = outer / "inner"
    model.save_pretrained(folder) if kind == "stock" else write_original(model, folder)
    loaded = MambaForCausalLM.from_pretrained(
        outer, subfolder="inner", revision="main", dtype=torch.bfloat16, device_map="auto", use_cache=False
    )
    assert loaded.dtype == torch.bfloat16
    mixer = loaded.backbone.layers[1].mixer
    assert mixer.A_log.dtype == mixer.D.dtype == mixer.dt_proj.bias.dtype == torch.float32
    assert torch.equal(mixer.A_log, model.backbone.layers[1].mixer.A_log)
    assert loaded.config.use_cache is False
    assert not loaded.training


def test_a_stock_configuration_object_is_taken(stock_folder: Path):
    import transformers

    config = transformers.MambaConfig.from_pretrained(stock_folder)
    loaded = MambaForCausalLM.from_pretrained(stock_folder, config=config)
    assert isinstance(loaded.config, MambaConfig)


def test_variants_and_new_heads(model, tmp_path: Path):
    model.save_pretrained(tmp_path, variant="fp32")
    assert same_weights(MambaForCausalLM.from_pretrained(tmp_path, variant="fp32"), model)

    class Classifier(MambaForCausalLM):
        def __init__(self, config: MambaConfig):
            super().__init__(config)
            self.score = torch.nn.Linear(config.hidden_size, 3)

    assert Classifier.from_pretrained(tmp_path, variant="fp32").score.weight.shape == (3, 20)  # new, so not refused


def test_the_originals_vocabulary_is_rounded_up(model, tmp_path: Path):
    folder = write_original(model, tmp_path / "o", vocab_size=57, pad_vocab_size_multiple=8)
    assert MambaForCausalLM.from_pretrained(folder).config.vocab_size == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_intermediate": 64}, "d_intermediate is 64"),
        ({"attn_layer_idx": [1]}, "attn_layer_idx"),
        ({"attn_cfg": {"num_heads": 2}}, "attn_cfg"),
        ({"rms_norm": False}, "rms_norm is false"),
        ({"ssm_cfg": {"layer": "Mamba2"}}, "Mamba2"),
        ({"ssm_cfg": {"d_ssm": 8}}, r"ssm_cfg\.d_ssm"),
        ({"ssm_cfg": {"D_has_hdim": True}}, r"ssm_cfg\.D_has_hdim"),
        ({"ssm_cfg": {"norm_before_gate": True}}, r"ssm_cfg\.norm_before_gate"),
        ({"bidirectional": True}, "bidirectional"),
        ({"d_model": None}, "d_model is missing"),
        ({"n_layer": None}, "n_layer is missing"),
        ({"vocab_size": None}, "vocab_size is missing"),
    ],
    ids=str,
)
def test_original_configurations_that_cannot_be_expressed_are_refused_by_name(model, tmp_path: Path, changes, message):
    folder = write_original(model, tmp_path / "o", **changes)
    raw = {key: value for key, value in json.loads((folder / "config.json").read_text()).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message):
        MambaForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("model_type", "reason"), [("falcon_mamba", "RMSNorm"), ("mamba2", "Mamba2ForCausalLM"), ("llama", "llama")]
)
def test_other_architectures_are_refused_with_the_reason(model, tmp_path: Path, model_type: str, reason: str):
    model.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"model_type": model_type}))
    with pytest.raises(ValueError, match=reason):
        MambaForCausalLM.from_pretrained(tmp_path)


def test_intermediate_size_wins_over_expand_on_load(tmp_path: Path):
    model = make_model(intermediate_size=24)
    model.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"expand": 16}))
    assert same_weights(MambaForCausalLM.from_pretrained(tmp_path), model)


def test_ignoring_mismatched_sizes_is_the_users_to_ask_for(model, tmp_path: Path):
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["backbone.layers.0.mixer.D"] = torch.ones(3)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.0\.mixer\.D is \(3,\), the configuration says \(40,\)"):
        MambaForCausalLM.from_pretrained(tmp_path)
    loaded = MambaForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert loaded.backbone.layers[0].mixer.D.shape == (40,)
