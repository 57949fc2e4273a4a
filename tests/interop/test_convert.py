"""`hf-mamba convert`: bit for bit both ways, in bounded memory, whole or not at all."""

import json
import os
from pathlib import Path

import pytest
import torch
from checkpoints import make_model, same_weights, write_original
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_mamba import MambaConfig, MambaForCausalLM
from hf_mamba.cli import main
from hf_mamba.formats.folder import open_checkpoint
from hf_mamba.interop import convert as module
from hf_mamba.interop.convert import convert
from hf_mamba.models.mamba import original as formats


def _bits(folder: Path) -> dict[str, bytes]:
    tensors = open_checkpoint(folder).tensors
    return {name: tensors.get(name).contiguous().view(torch.uint8).numpy().tobytes() for name in tensors.shapes}


CONFIGS = [
    {},
    {"tie_word_embeddings": False, "use_bias": True, "use_conv_bias": False},
    {"time_step_rank": 5, "expand": 3, "conv_kernel": 3, "residual_in_fp32": False, "time_step_min": 0.002},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_there_and_back_is_the_same_bit_for_bit(tmp_path: Path, config: dict, dtype: torch.dtype):
    # the original has no field for how weights were drawn
    model = make_model(bos_token_id=3, eos_token_id=4, pad_token_id=5, initializer_range=0.02, **config).to(dtype)
    with torch.no_grad():  # bits that a cast would lose
        model.backbone.layers[0].mixer.D[:3] = torch.tensor([float("nan"), float("inf"), -0.0])
    model.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", "state-spaces")
    convert(tmp_path / "b", tmp_path / "c", "transformers", max_shard_size=8_000)
    before, after = _bits(tmp_path / "a"), _bits(tmp_path / "c")
    assert before == {name: after[name] for name in before}
    assert (tmp_path / "c" / "model.safetensors.index.json").is_file()
    first, last = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ac")
    assert {k: v for k, v in first.items() if v is not None} == {k: v for k, v in last.items() if v is not None}


def test_the_original_file_is_what_its_loader_wants(model, tmp_path: Path):
    """mamba_ssm's MambaLMHeadModel(**config) and a strict load_state_dict: its fields only, and the tied head."""
    model.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", "state-spaces")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    fields = {"d_model", "n_layer", "vocab_size", "ssm_cfg", "rms_norm", "residual_in_fp32", "fused_add_norm"}
    assert set(config) == fields | {"pad_vocab_size_multiple", "tie_embeddings"}
    assert config["vocab_size"] % config["pad_vocab_size_multiple"] == 0
    state = torch.load(tmp_path / "b" / "pytorch_model.bin", weights_only=True)
    expected = {name.replace("embeddings", "embedding") for name in model.state_dict()}
    assert set(state) == expected
    assert state["lm_head.weight"].data_ptr() == state["backbone.embedding.weight"].data_ptr()  # one tensor, once


@given(
    st.fixed_dictionaries(
        {
            "state_size": st.integers(1, 32),
            "conv_kernel": st.integers(2, 5),
            "expand": st.integers(1, 4),
            "time_step_rank": st.one_of(st.just("auto"), st.integers(1, 9)),
            "use_bias": st.booleans(),
            "use_conv_bias": st.booleans(),
            "time_step_max": st.sampled_from([0.1, 0.2]),
            "time_step_floor": st.sampled_from([1e-4, 1e-3]),
            "time_step_init_scheme": st.sampled_from(["random", "constant"]),
            "residual_in_fp32": st.booleans(),
            "tie_word_embeddings": st.booleans(),
            "vocab_size": st.integers(1, 99),
        }
    )
)
@settings(max_examples=60)
def test_configurations_survive_the_other_format(fields):
    config = MambaConfig(hidden_size=20, num_hidden_layers=3, rescale_prenorm_residual=False, **fields)
    back = MambaConfig(**formats.config_from_original(formats.config_to_original(config)))
    assert back.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("config", "field"),
    [({"hidden_act": "gelu"}, "hidden_act"), ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"),
     ({"intermediate_size": 30}, "intermediate_size")],
)  # fmt: skip
def test_what_the_original_cannot_express_is_refused_by_name(tmp_path: Path, config: dict, field: str):
    make_model(**config).save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=field):
        convert(tmp_path / "a", tmp_path / "b", "state-spaces")
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("to", module.FORMATS)
def test_padding_the_vocabulary_never_makes_a_new_token_likely(tmp_path: Path, to: str):
    model = make_model(vocab_size=61, tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", to, pad_vocab_to=16, verify=True)
    padded = MambaForCausalLM.from_pretrained(tmp_path / "b")
    assert padded.config.vocab_size == 64 == padded.lm_head.weight.shape[0]
    ids = torch.arange(60).view(2, 30)
    with torch.no_grad():
        before, after = model(ids).logits, padded(ids).logits
    assert torch.equal(after[..., :61], before)
    assert (after[..., 61:].max(-1).values < before.max(-1).values).all()
    torch.testing.assert_close(after[..., 61], before.mean(-1))


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("to", module.FORMATS)
def test_training_folders_convert(zero_folder: Path, tmp_path: Path, stage: int, to: str):
    source = zero_folder / f"zero{stage}"
    convert(source, tmp_path / "out", to, verify=True)
    loaded = MambaForCausalLM.from_pretrained(tmp_path / "out")
    assert same_weights(loaded, MambaForCausalLM.from_pretrained(source))
    assert loaded.config.bos_token_id == 7
    assert not list((tmp_path / "out").glob("*spill*"))


def test_files_beside_the_weights_come_along(stock_folder: Path, tmp_path: Path):
    convert(stock_folder, tmp_path / "b", "state-spaces")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "b" / name).read_bytes() == (stock_folder / name).read_bytes()


def test_a_failure_leaves_nothing(model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    model.save_pretrained(tmp_path / "a")

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        convert(tmp_path / "a", tmp_path / "b", "transformers")
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "transformers"]) == 2
    assert "No space left" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["a"]


def test_a_wrong_result_is_not_kept(model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model.save_pretrained(tmp_path / "a")
    write = module.save_file

    def flipped(tensors: dict, *args: object, **kwargs: object) -> None:
        write({name: t + 1 if name.endswith("out_proj.weight") else t for name, t in tensors.items()}, *args, **kwargs)

    monkeypatch.setattr(module, "save_file", flipped)
    with pytest.raises(ValueError, match="logits of the converted model differ"):
        convert(tmp_path / "a", tmp_path / "b", "transformers", verify=True)
    assert os.listdir(tmp_path) == ["a"]


def test_damaged_weights_are_named_where_logits_are_to_be_compared(tmp_path: Path):
    model = make_model()
    model.backbone.norm_f.weight.data[0] = float("nan")
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=f"logits of {tmp_path / 'a'} itself are not finite.*leave --verify out"):
        convert(tmp_path / "a", tmp_path / "b", "transformers", verify=True)
    assert os.listdir(tmp_path) == ["a"]
    convert(tmp_path / "a", tmp_path / "b", "transformers")


def test_an_existing_folder_is_not_touched(model, tmp_path: Path):
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").touch()
    with pytest.raises(ValueError, match="exists already"):
        convert(tmp_path / "a", tmp_path / "b", "transformers")
    assert os.listdir(tmp_path / "b") == ["mine"]


def test_the_command(model, tmp_path: Path, capsys: pytest.CaptureFixture):
    write_original(model, tmp_path / "o")
    command = ["convert", str(tmp_path / "o"), str(tmp_path / "t"), "--to", "transformers"]
    assert main([*command, "--verify", "--max_shard_size", "20KB", "--pad_vocab_to", "128"]) == 0
    assert "verified" in capsys.readouterr().out
    assert MambaForCausalLM.from_pretrained(tmp_path / "t").config.vocab_size == 128
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*command[:2], str(tmp_path / "u"), *command[3:], "--max_shard_size", "5"]) == 2
    assert "5GB" in capsys.readouterr().err


_MEASURE = """
import sys, threading, time
from hf_mamba.interop.convert import convert

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

import hf_mamba.models.mamba.modeling_mamba
low, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous()); time.sleep(0.001)
thread = threading.Thread(target=watch); thread.start()
convert(sys.argv[1], sys.argv[2], sys.argv[3], max_shard_size=8_000_000)
done = True; thread.join()
print(peak - low)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("to", module.FORMATS)
def test_memory_is_that_of_a_shard_and_not_of_the_model(run_python, tmp_path: Path, to: str):
    model = make_model(hidden_size=512, num_hidden_layers=12, vocab_size=4096, state_size=16)
    size = sum(p.numel() for p in model.parameters()) * 4
    model.save_pretrained(tmp_path / "a")
    del model
    code = f"import sys; sys.argv[1:] = {[str(tmp_path / 'a'), str(tmp_path / 'b'), to]!r}\n{_MEASURE}"
    extra = int(run_python(code).splitlines()[-1])
    assert size > 80e6
    assert extra < 40e6, f"{extra / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB in shards of 8 MB"
