"""The suite of hybrids on a CPU, at 350m_hybrid's shapes: steps, packed rows and decoding beside transformers' own.

    python -m benchmarks.run cpu --only hybrid

A step is one of training with AdamW, of a model of two layers, one with Mamba-2 and one with attention, and a
vocabulary of 8,192; decoding is the whole model's. Packed rows are compared with each document alone before they are
timed.
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from hf_mamba import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM
from hf_mamba.family import get_preset

from .apart import COMPILED, OURS, STOCK, Case, run_all, run_one
from .measure import Result
from .peers import Step

PACKED, STOCK_PACKED = "hf_mamba packed", "transformers packed"
DOCUMENTS = 8


@dataclass(frozen=True)
class Sizes:
    """A model's fields, and how much shorter rows are; `SMALL` is for rehearsing, and its figures mean nothing."""

    fields: dict[str, Any]
    shorter: int = 1

    @property
    def heads(self) -> int:
        """Of Mamba-2."""
        return 2 * self.fields["hidden_size"] // self.fields["mamba_d_head"]


WHOLE = Sizes(get_preset("350m_hybrid").config)
SMALL = Sizes(get_preset("tiny_hybrid").config, 16)


def models(sizes: Sizes, layers: int | None) -> tuple[Any, Any]:
    """Ours, and transformers' with the same weights: of two layers, or of all."""
    torch.manual_seed(0)
    two = {"num_hidden_layers": 2, "layer_types": ["mamba", "attention"], "vocab_size": 8192}
    config = GraniteMoeHybridConfig(**sizes.fields | (two if layers == 2 else {}))
    ours = GraniteMoeHybridForCausalLM(config)
    stock = transformers.GraniteMoeHybridForCausalLM(transformers.GraniteMoeHybridConfig(**config.to_dict()))
    stock.load_state_dict(ours.state_dict())
    return ours, stock


def training(model: Any, called: Callable[..., Any] | None = None, **inputs: Tensor) -> Step:
    """A step of training with AdamW, by the model or by what calls it."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4, foreach=True)
    call = model if called is None else called

    def step() -> None:
        call(labels=inputs["input_ids"], use_cache=False, **inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def steps(case: Case, sizes: Sizes) -> dict[str, Callable[[], Step]]:
    ours, stock = models(sizes, 2)
    ids = torch.randint(0, 8192, (1, case.length // sizes.shorter))
    return {
        OURS: lambda: training(ours, input_ids=ids),
        STOCK: lambda: training(stock, input_ids=ids),
        COMPILED: lambda: training(stock, torch.compile(stock), input_ids=ids),
    }


def packing(case: Case, sizes: Sizes) -> dict[str, Callable[[], Step]]:
    """Rows of several documents, which transformers takes on GPUs with mamba-ssm alone."""
    ours, stock = models(sizes, 2)
    length = case.length // sizes.shorter
    each = length // DOCUMENTS
    ids = torch.randint(0, 8192, (1, length))
    offsets = torch.arange(0, length + 1, each, dtype=torch.int32)
    documents = {"seq_idx": (torch.arange(length) // each)[None].int()}
    theirs = documents | {
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
        "max_length_q": each,
        "max_length_k": each,
    }

    def packed() -> Step:
        with torch.no_grad():
            found, alone = ours(ids, **documents).logits, [ours(part).logits for part in ids.split(each, 1)]
        torch.testing.assert_close(found, torch.cat(alone, 1), atol=1e-4, rtol=1e-4)
        return training(ours, input_ids=ids, **documents)

    def refused() -> Step:
        step = training(stock, input_ids=ids, **theirs)
        step()
        return step

    return {OURS: lambda: training(ours, input_ids=ids), PACKED: packed, STOCK_PACKED: refused}


def decoding(case: Case, sizes: Sizes) -> dict[str, Callable[[], Step]]:
    ours, stock = models(sizes, None)
    count = {"max_new_tokens": case.tokens, "min_new_tokens": case.tokens}
    prompt = torch.ones(1, 1, dtype=torch.long)

    def of(model: Any) -> Step:
        model.eval()
        return lambda: model.generate(prompt, do_sample=False, pad_token_id=0, **count)

    return {OURS: lambda: of(ours), STOCK: lambda: of(stock)}


PEERS = (OURS, STOCK, COMPILED)
CASES = (  # what says most comes first
    Case("step L=2048", steps, PEERS, 180, 2048),
    Case(f"step L=2048, {DOCUMENTS} documents", packing, (OURS, PACKED, STOCK_PACKED), 60, 2048),
    Case("decoding, a token", decoding, (OURS, STOCK), 120, tokens=32),
    Case("step L=512", steps, PEERS, 120, 512),
    Case("step L=8192", steps, PEERS, 240, 8192),
)


def hybrid(options: Namespace) -> list[Result]:
    """350m_hybrid's shapes in fp32: a training step, packed rows, and decoding, beside transformers'."""
    return run_all("hybrid", CASES, options)


if __name__ == "__main__":
    run_one("hybrid", CASES, WHOLE, SMALL)
