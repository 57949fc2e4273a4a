"""Quantisers that swap a model's projections: torch's own, and transformers' where their libraries are installed."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import hf_mamba
from hf_mamba import MambaConfig, MambaForCausalLM

IDS = torch.arange(2 * 13).view(2, 13) * 11 % 61
PROJECTIONS = {"in_proj", "x_proj", "dt_proj", "out_proj"}


@pytest.fixture
def wide() -> MambaForCausalLM:
    """As wide as the quantisers' blocks of 64 ask for, and bitsandbytes' CPU kernels for 4 bits of rows by 32."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "time_step_rank": 64, "vocab_size": 61}
    return MambaForCausalLM(MambaConfig(**sizes, pad_token_id=0)).eval()


def swapped(model: nn.Module) -> set[str]:
    """Names of the projections whose module or weight is a quantiser's."""
    return {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if "_proj" in name.rpartition(".")[2]
        and (type(module) is not nn.Linear or type(module.weight) is not nn.Parameter)
        and not type(module).__module__.startswith("hf_mamba")
    } & PROJECTIONS


def check(quantised: nn.Module, model: MambaForCausalLM, error: float) -> None:
    """Near the model but not equal to it, and a state carried over any split continues it."""
    with torch.no_grad():
        expected, found = model(IDS).logits, quantised(IDS).logits
        assert 0 < (found - expected).abs().max() < error * expected.abs().max()
        first = quantised(IDS[:, :12], use_cache=True)
        step = quantised(IDS[:, 12:], cache_params=first.cache_params).logits
    assert (step - found[:, 12:]).abs().max() < error * expected.abs().max()


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated")
def test_quantize_dynamic_swaps_every_projection_and_leaves_the_original(wide):
    quantised = torch.ao.quantization.quantize_dynamic(wide, {nn.Linear}, dtype=torch.qint8)
    assert swapped(quantised) == PROJECTIONS
    assert "quantized" in type(quantised.lm_head).__module__
    check(quantised, wide, 0.1)
    assert all(type(m).__module__.startswith("hf_mamba") for n, m in wide.named_modules() if n.endswith("_proj"))

    layer = nn.Sequential(hf_mamba.Mamba(32), nn.Linear(32, 2))
    assert swapped(torch.ao.quantization.quantize_dynamic(layer)) == PROJECTIONS


QUANTISERS = {
    "bitsandbytes 8 bit": ("bitsandbytes", lambda: transformers.BitsAndBytesConfig(load_in_8bit=True), 0.05),
    "bitsandbytes 4 bit": ("bitsandbytes", lambda: transformers.BitsAndBytesConfig(load_in_4bit=True), 0.3),
    "torchao int8": ("torchao", lambda: _torchao("Int8WeightOnlyConfig"), 0.05),
    "torchao fp8": ("torchao", lambda: _torchao("Float8WeightOnlyConfig"), 0.1),
    "quanto int8": ("optimum.quanto", lambda: transformers.QuantoConfig("int8"), 0.05),
}
CANNOT_BE_SAVED = {"quanto int8"}


def _torchao(name: str):
    import torchao.quantization

    return transformers.TorchAoConfig(getattr(torchao.quantization, name)())


@pytest.mark.parametrize("name", QUANTISERS)
def test_transformers_quantisers_load_save_and_load_again(wide, name: str, tmp_path: Path):
    library, config, error = QUANTISERS[name]
    if find_spec(library.split(".")[0]) is None:
        pytest.skip(f"{library} is not installed")
    wide.save_pretrained(tmp_path / "whole")
    quantised = MambaForCausalLM.from_pretrained(tmp_path / "whole", quantization_config=config())
    assert swapped(quantised) == PROJECTIONS
    check(quantised, wide, error)
    if name not in CANNOT_BE_SAVED:
        quantised.save_pretrained(tmp_path / "small")
        again = MambaForCausalLM.from_pretrained(tmp_path / "small")
        assert swapped(again) == PROJECTIONS
        assert torch.equal(again(IDS).logits, quantised(IDS).logits)


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, torch.int8),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, torch.float8_e4m3fn),
    ],
    ids=["int8", "fp8"],
)
def test_a_quantised_stock_folder_reaches_its_quantiser(wide, tmp_path: Path, method: dict, dtype: torch.dtype):
    """What happens to it is the quantiser's word: here it lacks its library or its hardware, or it loads."""
    wide.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({n: t.to(dtype) if "in_proj" in n else t for n, t in tensors.items()}, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": method}
    (tmp_path / "config.json").write_text(json.dumps(config))
    outcomes = []
    for model_class in (transformers.MambaForCausalLM, MambaForCausalLM):
        try:
            outcomes.append(type(model_class.from_pretrained(tmp_path).backbone.layers[0].mixer.in_proj).__name__)
        except Exception as error:
            outcomes.append(f"{type(error).__name__}: {error}")
    assert outcomes[0] == outcomes[1]
