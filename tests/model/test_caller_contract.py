"""What callers of a transformers causal LM count on: arguments, logits, layers, the names of the past."""

import pytest
import torch
import transformers
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import TrainerCallback, TrainingArguments

import hf_mamba
import hf_mamba.ops
from hf_mamba.models.common.outputs import PAST, UnreadOutput

IDS = torch.arange(2 * 13).view(2, 13) * 11 % 61
MASK = torch.tensor([[0, 0, 0] + [1] * 10, [1] * 5 + [0, 0] + [1] * 6])


def test_what_every_model_is_handed_is_taken_and_ignored(model):
    extra = {"output_attentions": None, "token_type_ids": IDS * 0, "tokenizer": object(), "num_items_in_batch": None}
    assert torch.equal(model(IDS, **extra).logits, model(IDS).logits)
    body = model.base_model
    assert torch.equal(body(IDS, token_type_ids=IDS).last_hidden_state, body(IDS).last_hidden_state)


@pytest.mark.parametrize("training", [False, True])
def test_labels_that_are_shifted_already(make, training: bool):
    """As transformers' loss: `shift_labels` is scored as it stands, and another index may stand for no label."""
    model = make().train(training)
    shifted = torch.roll(IDS, -1, 1).clone()
    shifted[:, -1] = -100
    expected = model(IDS, labels=IDS).loss
    for labels in (IDS, None):
        torch.testing.assert_close(model(IDS, labels=labels, shift_labels=shifted).loss, expected)
    own = model(IDS, labels=IDS, shift_labels=shifted.masked_fill(shifted == -100, 7), ignore_index=7).loss
    torch.testing.assert_close(own, model(IDS, labels=None, shift_labels=shifted.masked_fill(shifted == 7, -100)).loss)


@pytest.mark.parametrize("training", [False, True])
def test_labels_of_the_positions_that_are_kept(make, training: bool):
    model = make().train(training)
    logits = model(IDS).logits[:, -5:]
    expected = F.cross_entropy(logits[:, :-1].mT, IDS[:, -4:])
    torch.testing.assert_close(model(IDS, labels=IDS[:, -5:], logits_to_keep=5).loss, expected)
    columns = torch.tensor([8, 9, 10, 11, 12])
    torch.testing.assert_close(model(IDS, labels=IDS[:, -5:], logits_to_keep=columns).loss, expected)


def test_the_logits_of_a_training_step_are_there_for_who_reads_them(make):
    """Whichever way: as an attribute, a key, a tuple's element; also through accelerate's rebuilding of outputs."""
    model = make().train()
    whole = model(IDS, labels=IDS, skip_logits=False)
    output = model(IDS, labels=IDS)
    assert isinstance(output, UnreadOutput)
    assert output[0] is output["loss"] is output.loss
    torch.testing.assert_close(output.loss, whole.loss)
    again = type(output)({key: value for key, value in output.items()})  # noqa: C416
    assert "unread" in again, "rebuilding must not compute the logits"
    for read in (output, again):
        assert "logits" in read
        torch.testing.assert_close(read.logits, whole.logits)
        assert read["logits"] is read.get("logits") is read.logits is read.to_tuple()[1] is read[1]
        assert set(read.keys()) == {"loss", "logits"}
    torch.testing.assert_close(model(IDS, labels=IDS, return_dict=False)[1], whole.logits)
    assert model(IDS, labels=IDS, skip_logits=True).logits is None
    assert model.eval()(IDS, labels=IDS)["logits"].shape == (2, 13, 61)


def test_a_loss_of_ones_own_over_the_logits_has_the_right_gradients(make):
    model, gradients = make().train(), []
    for skip in (None, False):
        model.zero_grad()
        logits = model(IDS, labels=IDS, skip_logits=skip).logits
        F.cross_entropy(logits[:, :-1].mT, IDS[:, 1:], label_smoothing=0.1).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_a_loss_function_that_somebody_set_is_the_one_that_counts(make):
    model = make().train()
    seen = {}

    def loss_function(logits, labels, vocab_size, **kwargs):
        seen.update(kwargs, labels=labels)
        return logits.square().sum()

    model.loss_function = loss_function
    output = model(IDS, labels=IDS, num_items_in_batch=3)
    torch.testing.assert_close(output.loss, output.logits.square().sum())
    assert seen["labels"] is IDS
    assert seen["num_items_in_batch"] == 3


def test_unread_logits_cost_no_memory(make):
    """The largest moment of a step, by the allocator's account: that of the chunked loss, far below all logits."""
    model = make(torch.float32, hidden_size=8, num_hidden_layers=1, vocab_size=4096).train()
    ids = torch.arange(2 * 1024).view(2, 1024)
    logits = ids.numel() * 4096 * 4

    def peak(**how: object) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            model(ids, labels=ids, **how).loss.backward()
        now = most = 0
        for event in profile.profiler.kineto_results.events():
            now += event.nbytes() if event.name() == "[memory]" else 0
            most = max(most, now)
        return most

    by_default, left_out, whole = peak(), peak(skip_logits=True), peak(skip_logits=False)
    assert by_default <= left_out * 1.02
    assert by_default < whole - logits


@pytest.mark.parametrize("mask", [None, MASK])
def test_hidden_states_and_hooks_see_the_residual_stream_where_its_tokens_are(make, mask):
    """Also under padding anywhere: each layer's output is the stream, and lies on the path of the gradients."""
    model, seen = make(), []
    for layer in model.base_model.layers:
        layer.register_forward_hook(lambda _, __, out: seen.append(out))
    output = model(IDS, attention_mask=mask, output_hidden_states=True, use_cache=False)
    first = len(output.hidden_states) - len(seen) if model.base_model.attends else 0  # after the embeddings
    assert all(a is b for a, b in zip(output.hidden_states[first:-1], seen, strict=False))
    for hidden in output.hidden_states:
        hidden.retain_grad()
    output.logits.square().sum().backward()
    assert all(hidden.grad.abs().sum() > 0 for hidden in output.hidden_states)
    rows = IDS if mask is None else [row[keep] for row, keep in zip(IDS, mask.bool(), strict=True)]
    for number, row in enumerate(rows):
        alone = model(row[None], output_hidden_states=True, use_cache=False).hidden_states
        for mine, theirs in zip(output.hidden_states, alone, strict=True):
            kept = mine[number] if mask is None else mine[number, mask[number].bool()]
            torch.testing.assert_close(kept, theirs[0])


def test_a_stock_models_layers_return_the_same(family, make, tmp_path):
    model = make(torch.float32)
    model.save_pretrained(tmp_path)
    stock = getattr(transformers, family.model_class.__name__).from_pretrained(tmp_path).eval()
    streams: list[list[torch.Tensor]] = [[], []]
    for one, seen in zip((model, stock), streams, strict=True):
        for layer in one.base_model.layers:
            layer.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
        with torch.no_grad():
            one(IDS)
    torch.testing.assert_close(*streams, rtol=1e-4, atol=1e-4)


def test_the_past_has_both_of_its_names(model):
    output = model(IDS, use_cache=True)
    assert output.cache is output.cache_params is output[PAST]
    step = model(IDS[:, :2], cache=output.cache).logits
    again = model(IDS, use_cache=True)
    torch.testing.assert_close(model(IDS[:, :2], cache_params=again.cache_params).logits, step)
    with pytest.raises(ValueError, match="give the carried state once"):
        model(IDS, cache=output.cache, cache_params=again.cache_params)
    greedy = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    states = [model(IDS, use_cache=True).cache_params for _ in range(2)]
    one, other = (
        model.generate(IDS[:, :1], **{name: past}, **greedy)
        for name, past in zip(("cache", "cache_params"), states, strict=True)
    )
    assert torch.equal(one, other)


def test_a_plain_trainer_given_the_groups_decays_matrices_only(make, tmp_path):
    model = make(torch.float32)
    optimizer = torch.optim.AdamW(hf_mamba.decay_groups(model, 0.5), lr=0.1)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, max_grad_norm=0,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in IDS]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rate = optimizer.param_groups[0]["lr"] * 0.5
    trainer = transformers.Trainer(
        model, arguments, train_dataset=data, optimizers=(optimizer, None),
        compute_loss_func=lambda outputs, labels, **_: 0 * outputs.logits.sum(),  # decay alone moves a weight
    )  # fmt: skip
    trainer.train()
    for name, parameter in model.named_parameters():
        decays = before[name].dim() > 1 and not name.endswith("A_log")
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - rate if decays else 1))


def test_decay_is_stock_trainers_but_for_the_state_space_and_the_norms(model):
    """Stock goes by names, of which it knows those of norms and biases."""
    parameters = dict(model.named_parameters())
    stock = {n for n in transformers.Trainer.get_decay_parameter_names(None, model) if n in parameters}
    decay = {id(p) for p in hf_mamba.decay_groups(model, 0.1)[0]["params"]}
    ours = {name for name, parameter in parameters.items() if id(parameter) in decay}
    assert ours < stock
    assert stock - ours == {name for name in parameters if name.endswith(("A_log", ".D", "norm_f.weight"))}


class _Losses(TrainerCallback):
    def on_log(self, *args, logs=None, **kwargs):
        self.seen = [*getattr(self, "seen", []), *([logs["loss"]] if "loss" in logs else [])]


def test_a_plain_trainer_with_a_loss_that_reads_logits_trains_as_one_that_does_not(make, tmp_path):
    class Own(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            output = model(**inputs, labels=labels)
            loss = F.cross_entropy(output.logits[:, :-1].mT, labels[:, 1:])
            return (loss, output) if return_outputs else loss

    data = [{"input_ids": row, "labels": row} for row in IDS]
    losses, accuracy = [], []
    for trainer_class in (transformers.Trainer, Own):
        arguments = TrainingArguments(
            str(tmp_path), max_steps=3, use_cpu=True, report_to=[], logging_steps=1, save_strategy="no",
            per_device_train_batch_size=2, learning_rate=1e-2, disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        callback = _Losses()
        trainer = trainer_class(
            make(torch.float32), arguments, train_dataset=data, eval_dataset=data, callbacks=[callback],
            compute_metrics=lambda p: {"right": float((p.predictions[0].argmax(-1) == p.label_ids).mean())}
            if isinstance(p.predictions, tuple)
            else {"right": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        )  # fmt: skip
        trainer.train()
        losses.append(callback.seen)
        accuracy.append(trainer.evaluate()["eval_right"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert accuracy[0] == accuracy[1]


def test_generate_in_training_mode_and_from_nothing(make):
    """Trainer leaves a model in training mode, checkpointing on; an empty prompt is the bos token."""
    model = make(bos_token_id=5, initializer_range=0.5)
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids, ones = IDS[:1], torch.ones_like(IDS[:1])
    expected = model.generate(ids, attention_mask=ones, **greedy)
    model.train().gradient_checkpointing_enable()
    assert torch.equal(model.generate(ids, attention_mask=ones, **greedy), expected)
    model.eval()
    assert torch.equal(model.generate(**greedy), model.generate(torch.tensor([[5]]), **greedy))


def test_a_layer_or_mixer_called_alone_takes_a_mask_as_in_stock(model):
    """By place or by name; a hook that asks for keywords sees those of stock's loop."""
    hidden = torch.randn(
        2, 13, model.config.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    for module in (model.base_model.layers[0], model.base_model.layers[0].mixer):
        found = module(hidden, attention_mask=MASK)
        assert torch.equal(module(hidden, None, MASK), found)
        for row, real, whole in zip(hidden, MASK.bool(), found, strict=True):
            torch.testing.assert_close(whole[real], module(row[None, real])[0])
    seen = {}
    handle = model.base_model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs, count=len(args)), with_kwargs=True
    )
    model(IDS, attention_mask=MASK)
    handle.remove()
    assert seen["count"] == 1
    assert seen["attention_mask"] is MASK
    assert "cache_params" in seen


def _gradients(model, ids, mask=None, **options):
    loss = model(ids, attention_mask=mask, labels=ids, use_cache=False, **options).loss
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))


@pytest.mark.parametrize("training", [False, True])
def test_functional_gradients_are_those_of_backward(make, training: bool):
    """torch.func's grad, and per-sample gradients by vmap over it, whatever backend serves otherwise."""
    model = make().train(training)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, ids):
        inputs = {"labels": ids, "use_cache": False}
        return torch.func.functional_call(model, parameters, (ids,), inputs).loss

    torch.testing.assert_close(torch.func.grad(loss)(parameters, IDS), _gradients(model, IDS))
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, IDS[:, None])
    for number in range(2):
        alone = _gradients(model, IDS[number : number + 1])
        torch.testing.assert_close({name: grad[number] for name, grad in each.items()}, alone)


def test_functional_transforms_of_the_forward(model):
    """vmap also over masks; forward-mode derivatives against a difference quotient."""

    def logits(ids, mask):
        return model(ids[None], attention_mask=mask[None], use_cache=False).logits[0]

    found = torch.func.vmap(logits)(IDS, MASK)
    expected = model(IDS, attention_mask=MASK).logits
    torch.testing.assert_close(found[MASK.bool()], expected[MASK.bool()])
    embeds = model.get_input_embeddings()(IDS[:, :6]).detach()
    along = torch.randn(embeds.shape, dtype=embeds.dtype, generator=torch.Generator().manual_seed(0))

    def of_embeds(x):
        return model(inputs_embeds=x, use_cache=False).logits

    _, tangent = torch.func.jvp(of_embeds, (embeds,), (along,))
    step = 1e-5
    quotient = (of_embeds(embeds + step * along) - of_embeds(embeds - step * along)) / (2 * step)
    torch.testing.assert_close(tangent, quotient.detach(), rtol=1e-5, atol=1e-5)


def test_second_derivatives(make):
    """Those of a gradient penalty, against the definitions', which are torch's own operations throughout.

    Attention has them where the caller asks torch for its definition.
    """
    model = make()
    embeds = model.get_input_embeddings()(IDS[:, :6]).detach()

    def penalty(backend):
        x = embeds.clone().requires_grad_()
        with hf_mamba.ops.backend(backend), sdpa_kernel(SDPBackend.MATH):
            outputs = model(inputs_embeds=x, use_cache=False).logits.square().sum()
            gradient = torch.autograd.grad(outputs, x, create_graph=True)[0]
            return torch.autograd.grad(gradient.square().sum(), [x, *model.parameters()], allow_unused=True)

    torch.testing.assert_close(penalty("torch"), penalty("reference"), rtol=1e-9, atol=1e-9)
    model.train()
    with pytest.raises(RuntimeError, match="skip_logits=False"):
        torch.autograd.grad(model(IDS, labels=IDS).loss, list(model.parameters()), create_graph=True)
    with sdpa_kernel(SDPBackend.MATH):
        whole = model(IDS, labels=IDS, skip_logits=False, use_cache=False).loss
    gradients = torch.autograd.grad(whole, list(model.parameters()), create_graph=True)
    sum(g.square().sum() for g in gradients).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_guided_generation_carries_the_unconditional_state(model):
    """Stock gives its unconditional branch one token at a time without its past."""
    ones, scale, prompt = torch.ones_like(IDS), 1.5, IDS[:, -1:]
    how = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(IDS, attention_mask=ones, guidance_scale=scale, **how)
    for length in range(13, 17):
        with torch.no_grad():
            told = model(found[:, :length]).logits[:, -1].log_softmax(-1)
            free = model(torch.cat([prompt, found[:, 13:length]], 1)).logits[:, -1].log_softmax(-1)
        assert torch.equal(found[:, length], (scale * (told - free) + free).argmax(-1))
