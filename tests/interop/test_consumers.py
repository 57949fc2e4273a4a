"""Other programs on our files, and our classes inside other programs."""

import json
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from checkpoints import make_model, same_weights
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, TextIteratorStreamer, pipeline

import hf_mamba
from hf_mamba import MambaForCausalLM, MambaModel
from hf_mamba.interop.convert import convert

IDS = torch.arange(2 * 17).view(2, 17) * 5 % 61


def need(package: str):
    """Skip without a package of the `test` extra; there it is a failure not to have it."""
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed (pip install .[test])")


@pytest.fixture
def registered():
    hf_mamba.register()
    yield
    hf_mamba.unregister()


# ---- programs that read our files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("source", ["ours", "converted"])
@torch.no_grad()
def test_stock_transformers(tmp_path: Path, dtype: torch.dtype, source: str):
    model = make_model().to(dtype)
    folder = tmp_path / "ours"
    model.save_pretrained(folder)
    if source == "converted":
        convert(folder, tmp_path / "o", "state-spaces")
        folder = convert(tmp_path / "o", tmp_path / "t", "transformers")
    ours = MambaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stock, info = transformers.MambaForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(ours(IDS).logits, stock.eval()(IDS).logits, rtol=1e-4, atol=1e-4)
    if source == "ours":  # the file's own dtype: bf16 matrices, fp32 A_log, D and dt bias
        assert transformers.MambaForCausalLM.from_pretrained(folder).dtype == dtype
        kept = MambaForCausalLM.from_pretrained(folder)
        assert same_weights(kept, model)


@need("mambapy")
@torch.no_grad()
def test_mambapy(model, tmp_path: Path):
    """Its Mamba takes the original file's tensors by their names (mambapy/lm.py::from_pretrained), strictly."""
    from mambapy.mamba import Mamba, RMSNorm
    from mambapy.mamba import MambaConfig as Peer

    model.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "o", "state-spaces")
    config = json.loads((tmp_path / "o" / "config.json").read_text())
    peer = Mamba(Peer(config["d_model"], config["n_layer"], d_state=config["ssm_cfg"]["d_state"])).eval()
    state = torch.load(tmp_path / "o" / "pytorch_model.bin", weights_only=True, mmap=True)
    layers = {name: state.pop(name) for name in list(state) if name.startswith("backbone.layers.")}
    peer.load_state_dict({name.removeprefix("backbone."): tensor for name, tensor in layers.items()})
    norm = RMSNorm(config["d_model"], 1e-5)
    norm.weight.copy_(state.pop("backbone.norm_f.weight"))
    assert set(state) == {"backbone.embedding.weight", "lm_head.weight"}
    logits = norm(peer(state["backbone.embedding.weight"][IDS])) @ state["lm_head.weight"].T
    torch.testing.assert_close(logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


@need("gguf")
@torch.no_grad()
def test_llama_cpp_by_gguf(model, tokenizer, tmp_path: Path):
    """llama.cpp's conversion/mamba.py is not on a registry: its rules are followed here with its own gguf package.

    Every tensor has a GGUF name; E = 2d; vocab_size is a multiple of 8; A = -exp(A_log); the convolution is squeezed;
    the tied head is left out. transformers reads the file back.
    """
    import gguf

    from hf_mamba.formats.folder import open_checkpoint

    model.save_pretrained(tmp_path / "a")
    checkpoint = open_checkpoint(convert(tmp_path / "a", tmp_path / "b", "transformers", pad_vocab_to=16))
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["architectures"] == ["MambaForCausalLM"]
    assert config["intermediate_size"] == 2 * config["hidden_size"]
    assert config["vocab_size"] % 8 == 0
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MAMBA, config["num_hidden_layers"])
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "mamba")
    writer.add_context_length(2**20)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_ssm_conv_kernel(config["conv_kernel"])
    writer.add_ssm_inner_size(config["intermediate_size"])
    writer.add_ssm_state_size(config["state_size"])
    writer.add_ssm_time_step_rank(config["time_step_rank"])
    writer.add_layer_norm_rms_eps(config["layer_norm_epsilon"])
    writer.add_ssm_dt_b_c_rms(False)
    writer.add_vocab_size(config["vocab_size"])
    for name in checkpoint.tensors.shapes:
        tensor = checkpoint.tensors.get(name)
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new is not None, name
        if name.endswith("A_log"):
            tensor = -torch.exp(tensor)
        writer.add_tensor(new, tensor.squeeze().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert len(read) == len(checkpoint.tensors.shapes)
    embedding = read["token_embd.weight"].data.reshape(config["vocab_size"], -1)
    np.testing.assert_array_equal(embedding, model.get_input_embeddings().weight.numpy())
    stock = transformers.MambaForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    torch.testing.assert_close(stock.eval()(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_vllms_contract(model, tmp_path: Path):
    """What vllm/model_executor/models/mamba.py reads: these fields, and a parameter for every tensor of the file."""
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "mamba"
    for field in ("hidden_size", "state_size", "conv_kernel", "intermediate_size", "time_step_rank", "use_conv_bias",
                  "use_bias", "hidden_act", "layer_norm_epsilon", "num_hidden_layers", "vocab_size", "pad_token_id",
                  "tie_word_embeddings"):  # fmt: skip
        assert field in config, field
    assert config["architectures"] == ["MambaForCausalLM"]
    from safetensors.torch import load_file

    mixer = {"A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight",
             "dt_proj.bias", "out_proj.weight"}  # fmt: skip
    expected = {f"backbone.layers.{i}.mixer.{name}" for i in range(2) for name in mixer}
    expected |= {"backbone.embeddings.weight", "backbone.norm_f.weight"}
    expected |= {f"backbone.layers.{i}.norm.weight" for i in range(2)}
    assert set(load_file(tmp_path / "model.safetensors")) == expected
    assert config["vocab_size"] == model.get_input_embeddings().weight.shape[0]


# ---- programs that use our classes


def test_register_is_on_request_idempotent_and_undoable(stock_folder: Path):
    def classes() -> list[type]:
        loaded = AutoModelForCausalLM.from_pretrained(stock_folder)
        return [type(loaded), type(AutoModel.from_pretrained(stock_folder)), type(loaded.config)]

    stock = [transformers.MambaForCausalLM, transformers.MambaModel, transformers.MambaConfig]
    assert classes() == stock
    hf_mamba.register()
    hf_mamba.register()
    try:
        assert classes() == [MambaForCausalLM, MambaModel, hf_mamba.MambaConfig]
        assert type(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(stock_folder))) is MambaForCausalLM
        assert type(transformers.MambaForCausalLM.from_pretrained(stock_folder)) is transformers.MambaForCausalLM
    finally:
        hf_mamba.unregister()
    assert classes() == stock


@pytest.mark.usefixtures("registered")
def test_pipelines_and_streamers(stock_folder: Path, tokenizer):
    pipe = pipeline("text-generation", model=str(stock_folder), device="cpu")
    assert type(pipe.model) is MambaForCausalLM
    kwargs = {"max_new_tokens": 5, "do_sample": False}
    texts = pipe(["the cat", "a dog sat on the mat"], batch_size=2, **kwargs)
    assert texts[0] == pipe(["the cat"], **kwargs)[0]  # padding inside the batch changes nothing
    features = pipeline("feature-extraction", model=str(stock_folder), device="cpu")("the cat sat")
    assert len(features[0]) == 3
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    thread = threading.Thread(target=pipe.model.generate, args=(ids,), kwargs=kwargs | {"streamer": streamer})
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    assert streamed == tokenizer.decode(pipe.model.generate(ids, **kwargs)[0, 2:])


class Int8Linear(nn.Module):
    """A quantised projection: integers and scales, and no `weight` for anyone to read."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.integers = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.offset = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.integers * self.scale, self.offset)


@torch.no_grad()
def test_quantised_linears_are_called_and_never_read():
    model, quantised = make_model(use_bias=True), make_model(use_bias=True)
    for layer in quantised.backbone.layers:
        for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
            setattr(layer.mixer, name, Int8Linear(getattr(layer.mixer, name)))
    quantised.lm_head = Int8Linear(quantised.lm_head)
    expected, got = model(IDS).logits, quantised(IDS).logits
    assert (expected - got).abs().max() < 0.05 * expected.abs().max()
    assert not torch.equal(expected, got)
    cache = quantised(IDS[:, :9], use_cache=True).cache_params
    step = quantised(IDS[:, 9:], cache_params=cache).logits
    torch.testing.assert_close(step, got[:, 9:], rtol=1e-4, atol=1e-4)
    quantised.train()
    quantised(input_ids=IDS, labels=IDS, skip_logits=True)


@need("peft")
@pytest.mark.usefixtures("registered")
def test_peft_lora(tmp_path: Path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model = make_model()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = get_peft_model(model, LoraConfig(r=3, init_lora_weights=False)).eval()
    assert set(adapted.peft_config["default"].target_modules) == {"in_proj", "x_proj", "out_proj"}
    loss = adapted(input_ids=IDS, labels=IDS).loss
    loss.backward()
    trained = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 3 * 2
    assert all(grad is not None and grad.abs().sum() > 0 for grad in trained.values())
    adapted.zero_grad()
    with torch.no_grad():
        expected = adapted(input_ids=IDS).logits
        generated = adapted.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4)
        adapted.save_pretrained(tmp_path)
        fresh = make_model()
        fresh.load_state_dict(base)
        again = PeftModel.from_pretrained(fresh, tmp_path)
        torch.testing.assert_close(again(input_ids=IDS).logits, expected)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(merged.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4), generated)
    model = make_model()
    wider = get_peft_model(model, LoraConfig(r=2, target_modules=["dt_proj", "lm_head"], init_lora_weights=False))
    wider.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in wider.parameters() if p.requires_grad)


@need("peft")
@pytest.mark.usefixtures("registered")
def test_peft_still_refuses_what_the_stock_model_cannot_do(stock_folder: Path):
    from peft import LoraConfig, get_peft_model

    stock = transformers.MambaForCausalLM.from_pretrained(stock_folder)
    with pytest.raises(ValueError, match="incompatible"):
        get_peft_model(stock, LoraConfig(target_modules=["out_proj"]))


@need("trl")
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.usefixtures("registered")
def test_trl_sft_with_packing_is_sft_on_separate_documents(tokenizer, tmp_path: Path, lora: bool):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    texts = ["the cat sat on a mat", "a dog ran", "the dog sat", "the cat ran and the dog sat on a mat"]

    def train(packing: bool) -> tuple[list[float], set[str]]:
        model = make_model(vocab_size=16, initializer_range=0.3)
        seen: set[str] = set()
        model.backbone.register_forward_pre_hook(
            lambda _, __, kwargs: seen.update(key for key, value in kwargs.items() if value is not None),
            with_kwargs=True,
        )
        args = SFTConfig(
            output_dir=str(tmp_path / str(packing)), packing=packing, max_length=32, max_steps=3, report_to=[],
            per_device_train_batch_size=1 if packing else 4, use_cpu=True, bf16=False, logging_steps=1, seed=3,
            save_strategy="no", learning_rate=1e-2, shuffle_dataset=False,
        )  # fmt: skip
        peft_config = LoraConfig(r=2) if lora else None
        data = Dataset.from_dict({"text": texts})
        trainer = SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, peft_config=peft_config)
        trainer.train()
        rows = [row for row in trainer.state.log_history if "loss" in row]
        assert all(0 <= row["mean_token_accuracy"] <= 1 for row in rows)
        return [row["loss"] for row in rows], seen

    packed, seen = train(True)
    padded, _ = train(False)
    assert {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "position_ids"} <= seen
    assert packed == pytest.approx(padded, rel=1e-4)


@need("lm_eval")
def test_lm_eval_recipe_offline(stock_folder: Path, tmp_path: Path):
    """Its accuracy and perplexity on data made here equal those computed by hand."""
    rows = [("the cat", i % 2) for i in range(5)]
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps({"q": q, "choices": ["sat", "ran"], "a": a}) + "\n" for q, a in rows)
    )
    task = {
        "task": "toy", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{a}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "toy.yaml").write_text(json.dumps(task))
    recipe = Path(__file__).parents[2] / "recipes" / "evaluate.py"
    output = tmp_path / "out.json"
    command = [sys.executable, recipe, stock_folder, "--tasks", "toy", "--task_folder", tmp_path / "tasks"]
    done = subprocess.run(
        [*map(str, command), "--output", str(output), "--device", "cpu"], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "toy" in done.stdout
    tokenizer = transformers.AutoTokenizer.from_pretrained(stock_folder)
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    with torch.no_grad():
        last = MambaForCausalLM.from_pretrained(stock_folder)(ids).logits[0, -1]
    sat, ran = (last[tokenizer.convert_tokens_to_ids(word)] for word in ("sat", "ran"))
    answer = int(ran > sat)
    expected = sum(a == answer for _, a in rows) / len(rows)
    assert json.loads(output.read_text())["results"]["toy"]["acc,none"] == pytest.approx(expected)
