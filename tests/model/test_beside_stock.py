"""What goes from transformers' own classes to ours and back without a seam: an optimizer's state, a reader's dtype."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small import GROUPS, SMALL, lively
from transformers import Trainer, TrainingArguments

import hf_mamba
from hf_mamba.family import get_family
from hf_mamba.models.common.order import restore_first_order

pytestmark = pytest.mark.core

HYBRID = {
    "num_attention_heads": 6, "num_key_value_heads": 2, "shared_intermediate_size": 20, "mamba_n_heads": 6,
    "mamba_d_head": 8, "mamba_d_state": 5, "mamba_n_groups": GROUPS, "layer_types": ["mamba", "attention"],
    "num_local_experts": 0, "position_embedding_type": None, "mamba_proj_bias": True,
}  # fmt: skip
MAMBA2 = {"num_heads": 6, "head_dim": 8, "n_groups": GROUPS, "use_bias": True}
ALL: dict[str, Any] = {"mamba": {"use_bias": True}, "mamba2": MAMBA2, "granitemoehybrid": HYBRID}
IDS = torch.arange(8 * 13).view(8, 13) * 11 % 60 + 1  # a stock hybrid does not train padding


def pair(kind: str, **own: object) -> dict[str, torch.nn.Module]:
    """A small model with the same weights in both classes."""
    family = get_family(kind)
    ours = lively(family.model_class(family.config_class(**SMALL | ALL[kind] | own)))
    stock = getattr(transformers, type(ours).__name__)
    stock = stock(stock.config_class(**ours.config.to_dict()))
    stock.load_state_dict(ours.state_dict())
    return {"ours": ours, "stock": stock}


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("groups", ["Trainer's", "ours"])
@pytest.mark.parametrize("first", ["stock", "ours"])
def test_a_plain_trainers_checkpoint_is_resumed_by_the_other_class(kind: str, groups: str, first: str, tmp_path: Path):
    """Two steps of one class and two of the other are four of stock's, the optimizer's moments included."""
    torch.manual_seed(0)
    start = pair(kind)["ours"].state_dict()

    def train(whose: str, steps: int, resume: Path | None = None) -> dict[str, torch.Tensor]:
        model = pair(kind)[whose]
        model.load_state_dict(start)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=steps, use_cpu=True, report_to=[], save_steps=2, disable_tqdm=True,
            per_device_train_batch_size=2, learning_rate=1e-2, weight_decay=0.1, lr_scheduler_type="constant",
            adam_epsilon=1e-3,
        )  # fmt: skip
        own = torch.optim.AdamW(hf_mamba.decay_groups(model, 0.1), lr=1e-2, eps=1e-3) if groups == "ours" else None
        data = [{"input_ids": row, "labels": row} for row in IDS]
        trainer = Trainer(model, arguments, train_dataset=data, optimizers=(own, None))
        trainer.train(resume_from_checkpoint=resume and str(resume))
        return {name: p.detach() for name, p in model.named_parameters()}

    expected = train("stock", 4)
    train(first, 2)
    found = train("ours" if first == "stock" else "stock", 4, tmp_path / "checkpoint-2")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-5)


def test_a_plain_trainers_checkpoint_of_the_first_order_goes_on_where_the_caller_restores_it(tmp_path: Path):
    models = [pair("mamba")["ours"] for _ in range(3)]
    for model in models:
        model.load_state_dict(models[0].state_dict())
        restore_first_order(model)

    def train(model: torch.nn.Module, steps: int, resume: bool = False) -> None:
        arguments = TrainingArguments(
            str(tmp_path), max_steps=steps, use_cpu=True, report_to=[], save_steps=2, disable_tqdm=True,
            lr_scheduler_type="constant", learning_rate=1e-2,
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in IDS]
        Trainer(model, arguments, train_dataset=data).train(resume_from_checkpoint=resume)

    train(models[0], 4)
    train(models[1], 2)
    train(models[2], 4, resume=True)
    torch.testing.assert_close(dict(models[2].named_parameters()), dict(models[0].named_parameters()))


def test_the_padding_of_a_hybrid_is_learnt_as_an_input_where_stocks_is_not():
    gradients = {}
    for whose, model in pair("granitemoehybrid").items():
        model(torch.tensor([[5, 0, 7, 9]]), labels=torch.tensor([[5, 0, 7, 9]])).loss.backward()
        gradients[whose] = model.get_input_embeddings().weight.grad
    assert gradients["ours"][0].abs().sum() > 0
    assert gradients["stock"][0].abs().sum() == 0
    torch.testing.assert_close(gradients["ours"][1:], gradients["stock"][1:], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ALL)
def test_parameters_have_stocks_order_and_runs_of_another_order_keep_theirs(kind: str):
    models = pair(kind)
    names = {whose: [name for name, _ in model.named_parameters()] for whose, model in models.items()}
    assert names["ours"] == names["stock"]
    restore_first_order(models["ours"])
    then = [name for name, _ in models["ours"].named_parameters()]
    assert sorted(then) == sorted(names["ours"])
    parts = list(dict.fromkeys(name.split(".")[-2] for name in then if ".layers.0." in name and "." in name))
    order = {
        "mamba": ["norm", "mixer", "in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"],
        "mamba2": ["norm", "mixer", "in_proj", "conv1d", "out_proj"],
        "granitemoehybrid": ["input_layernorm", "mamba", "in_proj", "conv1d", "norm", "out_proj",
                             "post_attention_layernorm", "input_linear", "output_linear"],
    }  # fmt: skip
    assert parts == order[kind]


@pytest.mark.parametrize("kind", ALL)
def test_a_file_of_integers_and_a_file_of_nothing_are_what_they_are_to_stock(kind: str, tmp_path: Path):
    """Whole numbers are weights; what a file lacks is drawn for who asks to be told of it, and refused elsewhere."""
    models = pair(kind)
    models["ours"].save_pretrained(tmp_path)
    norm = next(n for n, _ in models["ours"].named_parameters() if "norm" in n)
    tensors = load_file(tmp_path / "model.safetensors")
    whole = tensors | {norm: torch.arange(24) - 3}
    file = {"metadata": {"format": "pt"}, "filename": tmp_path / "model.safetensors"}
    save_file(whole, **file)
    ours, stock = (type(model).from_pretrained(tmp_path) for model in models.values())
    torch.testing.assert_close(ours.state_dict(), stock.state_dict(), rtol=0, atol=0)
    assert ours.get_parameter(norm).tolist() == list(range(-3, 21))

    save_file({"tensor": torch.tensor([1, 2])}, **file)
    found = [type(m).from_pretrained(tmp_path, output_loading_info=True) for m in models.values()]
    assert found[0][1]["missing_keys"] == found[1][1]["missing_keys"] >= {n for n, _ in found[0][0].named_parameters()}
    assert found[0][1]["unexpected_keys"] == found[1][1]["unexpected_keys"] == {"tensor"}
    assert all(p.isfinite().all() for p in found[0][0].parameters())
    with pytest.raises(ValueError, match="holds no tensor of a"):
        type(models["ours"]).from_pretrained(tmp_path)


@pytest.mark.parametrize("residual_in_fp32", [True, False])
@pytest.mark.parametrize("kind", ALL)
def test_a_bf16_models_hidden_states_have_stocks_dtypes_and_values(kind: str, residual_in_fp32: bool, tmp_path: Path):
    """Those that a caller asks for; a head reads the last in the weights' dtype, and no wide copy is made for it."""
    models = pair(kind, residual_in_fp32=residual_in_fp32)
    models["ours"].save_pretrained(tmp_path)
    ours, stock = (type(m).from_pretrained(tmp_path, dtype=torch.bfloat16).eval() for m in models.values())
    with torch.no_grad():
        mine, theirs = (m.base_model(IDS) for m in (ours, stock))
        assert mine.last_hidden_state.dtype == theirs.last_hidden_state.dtype
        torch.testing.assert_close(mine.last_hidden_state, theirs.last_hidden_state, rtol=0.1, atol=0.1)
        asked = [m(IDS, output_hidden_states=True).hidden_states for m in (ours, stock)]
        assert asked[0][-1].dtype == asked[1][-1].dtype
        read = []
        ours.lm_head.register_forward_pre_hook(lambda _, args: read.append(args[0].dtype))
        ours(IDS)
        assert read == [torch.bfloat16]
