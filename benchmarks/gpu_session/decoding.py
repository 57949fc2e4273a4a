"""Decoding at one and at 64 sequences: step by step, as a CUDA graph, and by `generate`, beside transformers' own."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import mamba2, peers
from benchmarks.gpu_session.step import Context
from benchmarks.gpu_session.timing import Step, alternate, captured


def measure(context: Context, family: str) -> None:
    """ms of a token for all sequences; of `generate`, over as many as it makes."""
    ours, stock = (model.to(context.device, torch.bfloat16).eval() for model in models(context, family))
    tokens = context.pick(64, 4)
    weights = sum(p.numel() * p.element_size() for p in ours.parameters())
    copy = context.figure("card//copy")
    least = None if copy is None else weights / copy / 1e6
    for batch in context.pick((1, 64), (1,)):
        step = token(ours, batch)
        steps: dict[str, Step] = {"hf_mamba": step, "transformers": token(stock, batch), "CUDA graph": captured(step)}
        compare(context, f"B={batch}, a token", steps, 1, least)
        prompt = torch.randint(0, ours.config.vocab_size, (batch, 16), device=context.device)
        count = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        steps = {
            "hf_mamba": partial(ours.generate, prompt, **count),
            "transformers": partial(stock.generate, prompt, **count),
            "static": partial(ours.generate, prompt, cache_implementation="static", **count),
        }
        compare(context, f"B={batch}, generate {tokens}", steps, tokens, least)


def compare(context: Context, setting: str, steps: dict[str, Step], tokens: int, least: float | None) -> None:
    """By the greater of the host's and the device's time: a call waits for both. The last one is held against each."""
    found = alternate(steps, context.pick(3, 1))
    each = {name: max(times.ms, min(times.host)) / tokens for name, times in found.items()}
    for name, ms in each.items():
        context.report(setting, name, ms, "ms", least, f"{found[name]}; least: its weights once")
    *others, last = steps
    for name in set(others) & set(each) if last in each else ():
        context.report(setting, f"{last} / {name}", each[last] / each[name], "x", note="of its time")


def models(context: Context, family: str) -> tuple[Any, Any]:
    """Ours and transformers', with the same weights, of 130m."""
    if family == "mamba2":
        sizes = context.pick(mamba2.Sizes(), mamba2.SMALL)
        return mamba2.models(sizes, sizes.layers)
    layers, vocabulary = context.pick((24, 50_280), (2, 97))
    ours = peers.our_model(layers, vocabulary)
    return ours, peers.stock_model({name: t.clone() for name, t in ours.state_dict().items()}, layers, vocabulary)


def token(model: nn.Module, batch: int) -> Step:
    """One more token for every sequence, through the model's own cache."""
    prompt = torch.zeros(batch, 8, dtype=torch.long, device=next(model.parameters()).device)
    with torch.no_grad():
        cache = model(prompt, use_cache=True).cache_params

    @torch.no_grad()
    def step() -> Tensor:
        return model(prompt[:, :1], cache_params=cache, use_cache=True).logits

    return step
