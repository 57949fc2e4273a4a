"""Where transformers' own Mamba-2 and hybrid are wrong, and by how much, or refuse, beside ours with the same weights.

    python benchmarks/stock_mamba2.py > benchmarks/results/mamba2_stock.md      seconds on a CPU

Every number is the largest difference of logits from those of the same model where the question does not arise: each
document alone, the row without padding, the whole text in one pass. Rounding alone is below 1e-5.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from hf_mamba import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM, Mamba2Config, Mamba2ForCausalLM
from hf_mamba.family import get_preset

LONG, SHORT, NEXT = 41, 24, 8  # tokens of two documents, and of what comes after the prompt
LIMIT = (0.0, 0.02)  # of Δ, in the last two rows


def models(**own: Any) -> list[Any]:
    """transformers' model and ours, with one set of weights that are not at their initial values."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 16, "state_size": 16}
    torch.manual_seed(0)
    ours = Mamba2ForCausalLM(Mamba2Config(**sizes, n_groups=2, vocab_size=97, pad_token_id=0, **own)).eval()
    for parameter in ours.parameters():
        parameter += 0.2 * torch.randn_like(parameter)
    stock = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**ours.config.to_dict())).eval()
    stock.load_state_dict(ours.state_dict())
    return [stock, ours]


def hybrids() -> list[Any]:
    """transformers' hybrid of Mamba-2 and attention and ours, with one set of weights."""
    torch.manual_seed(0)
    config = GraniteMoeHybridConfig(**get_preset("tiny_hybrid").config)
    ours = GraniteMoeHybridForCausalLM(config).eval()
    stock = transformers.GraniteMoeHybridForCausalLM(transformers.GraniteMoeHybridConfig(**config.to_dict())).eval()
    stock.load_state_dict(ours.state_dict())
    return [stock, ours]


def documents() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randint(1, 97, (1, LONG)), torch.randint(1, 97, (1, SHORT))


def packed(model: Any, **numbers: Tensor) -> float:
    """Two documents in one row, told apart by `numbers`, against each alone."""
    alone = torch.cat([model(ids).logits for ids in documents()], 1)
    return distance(model(torch.cat(documents(), 1), **numbers).logits, alone)


def by_seq_idx(model: Any) -> float:
    return packed(model, seq_idx=torch.tensor([[0] * LONG + [1] * SHORT], dtype=torch.int32))


def by_position_ids(model: Any) -> float:
    return packed(model, position_ids=torch.cat([torch.arange(LONG), torch.arange(SHORT)])[None])


def by_cu_seq_lens(model: Any) -> float:
    """As collators for flash attention write it."""
    ends = torch.tensor([0, LONG, LONG + SHORT], dtype=torch.int32)
    return packed(model, cu_seq_lens_q=ends, cu_seq_lens_k=ends)


def padded(model: Any, left: bool) -> float:
    """A batch of a long and a short prompt, then tokens one by one, against the short one alone."""
    long, short = documents()
    sides = (LONG - SHORT, 0) if left else (0, LONG - SHORT)
    ids = torch.cat([long, torch.nn.functional.pad(short, sides)])
    mask = torch.cat([torch.ones_like(long), torch.nn.functional.pad(torch.ones_like(short), sides)])
    batch = model(ids, attention_mask=mask, use_cache=True).cache_params
    alone = model(short, use_cache=True).cache_params
    worst = 0.0
    for token in range(1, NEXT + 1):
        step = torch.full((2, 1), token)
        found = model(step, cache_params=batch, use_cache=True)
        expected = model(step[:1], cache_params=alone, use_cache=True)
        batch, alone = found.cache_params, expected.cache_params
        worst = max(worst, distance(found.logits[1:], expected.logits))
    return worst


def continued(model: Any) -> float:
    """A prompt, then tokens one by one, against the same text in one pass."""
    ids = torch.cat(documents(), 1)
    expected = model(ids).logits[:, -NEXT:]
    cache = model(ids[:, :-NEXT], use_cache=True).cache_params
    steps = []
    for token in ids[:, -NEXT:].split(1, 1):
        out = model(token, cache_params=cache, use_cache=True)
        cache = out.cache_params
        steps.append(out.logits)
    return distance(torch.cat(steps, 1), expected)


def distance(found: Tensor, expected: Tensor) -> float:
    return (found - expected).abs().max().item()


CASES: list[tuple[str, Callable[[Any], float], dict[str, Any]]] = [
    ("one row, whole against token by token", continued, {}),
    ("two packed documents, `seq_idx`", by_seq_idx, {}),
    ("two packed documents, `position_ids`", by_position_ids, {}),
    ("two packed documents, `cu_seq_lens_q`", by_cu_seq_lens, {}),
    ("padding on the left, then decoding", lambda model: padded(model, left=True), {}),
    ("padding on the right, then decoding", lambda model: padded(model, left=False), {}),
    (f"`time_step_limit` {LIMIT}, whole against token by token", continued, {"time_step_limit": LIMIT}),
]


def verdict(measure: Callable[[Any], float], model: Any) -> str:
    try:
        difference = measure(model)
    except Exception as error:  # what transformers raises is what is shown
        return f"refused: {type(error).__name__}"
    return f"{difference:.1e}" if difference < 1e-4 else f"**{difference:.2f}**, wrong"


@torch.no_grad()
def main() -> None:
    print("# Mamba-2 beside transformers' own: the same weights, the largest difference of logits\n")
    versions = f"transformers {transformers.__version__}, its PyTorch path, torch {torch.__version__}, fp32 on a CPU"
    print(f"Printed by `python benchmarks/stock_mamba2.py`: {versions}.")
    print("Each number is a model against itself where the question does not arise: documents alone, no padding,")
    print("one pass.\n")
    print("| case | transformers | hf_mamba |\n|---|---:|---:|")
    for name, measure, own in CASES:
        print(f"| {name} | {' | '.join(verdict(measure, model) for model in models(**own))} |")
    for name, measure in (
        ("seq_idx", by_seq_idx),
        ("position_ids", by_position_ids),
        ("cu_seq_lens_q", by_cu_seq_lens),
    ):
        found = " | ".join(verdict(measure, model) for model in hybrids())
        print(f"| hybrid with attention, two packed documents, `{name}` | {found} |")
    stock, ours = models()
    ids = torch.cat(documents(), 1)
    apart, reach = distance(stock(ids).logits, ours(ids).logits), ours(ids).logits.abs().max().item()
    print(f"\nOn a plain row the two models differ by {apart:.1e}; logits reach {reach:.1f}.")
    print("mamba_ssm's kernels, which transformers uses where they are installed, were not measured here.")


if __name__ == "__main__":
    main()
