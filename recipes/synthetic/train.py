"""Train a small model on one of the papers' tasks and say how far beyond its training it goes.

    python recipes/synthetic/train.py induction_heads
    python recipes/synthetic/train.py parity --family mamba2 --optim muon
    python recipes/synthetic/train.py selective_copying --setting paper --device cuda

What is expected of each, written down before any of them was run, is in expected.md, and what came out beside it.
Training ends early once two hundred fresh examples in a row hold no mistake.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from tasks import SETTINGS, UNASKED, Setting

from hf_mamba import decay_groups
from hf_mamba.family import FAMILIES, family_of
from hf_mamba.training.muon import Muon, muon_groups

# what each family needs beside width, depth and vocabulary
FIELDS: dict[str, dict[str, Any]] = {
    "mamba": {},
    "mamba2": {"num_heads": "auto", "head_dim": 16, "n_groups": 1, "state_size": 64},
    "granitemoehybrid": {
        **{"num_attention_heads": 4, "shared_intermediate_size": 128, "mamba_n_heads": "auto", "mamba_d_head": 16},
        **{"mamba_d_state": 64},
    },
}
EXAMPLES = 200  # of an evaluation


def main() -> int:
    args = parse_arguments(sys.argv[1:])
    setting = SETTINGS[args.task][args.setting]
    torch.manual_seed(args.seed)
    model = build(args.family, setting).to(args.device).train()
    begin = time.perf_counter()
    steps = train(model, setting, args)
    seconds = time.perf_counter() - begin
    found = {f"{far}x": accuracy(model, setting, far, args.seed) for far in setting.tested}
    result = vars(args) | {"steps": steps, "seconds": round(seconds), "accuracy": found}
    print(" ".join(f"{name} {value:.1%}" for name, value in found.items()))
    if args.output:
        with open(args.output, "a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
    return 0


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=SETTINGS)
    parser.add_argument("--setting", choices=("small", "paper"), default="small")
    parser.add_argument("--family", choices=FAMILIES, default="mamba")
    parser.add_argument("--optim", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--learning_rate", type=float, help="by default the setting's")
    parser.add_argument("--max_steps", type=int, help="by default the setting's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", help="append the result to this file of JSON lines")
    return parser.parse_args(argv)


def build(model_type: str, setting: Setting) -> Any:
    sizes = {"hidden_size": setting.hidden_size, "num_hidden_layers": setting.layers, "vocab_size": setting.vocabulary}
    config = {"model_type": model_type, "tie_word_embeddings": False, **sizes, **FIELDS[model_type]}
    family = family_of(config)
    return family.model_class(family.config_class(**config))


def train(model: Any, setting: Setting, args: argparse.Namespace) -> int:
    """Train with a constant rate after a short warm-up, as the papers do; returns the number of steps."""
    rate = args.learning_rate or setting.rate
    if args.optim == "muon":
        optimizer: Any = Muon(muon_groups(model, model.config, 0.0), lr=rate)
    else:
        optimizer = torch.optim.AdamW(decay_groups(model, 0.0), lr=rate)
    generator = torch.Generator().manual_seed(args.seed)
    total = args.max_steps or setting.steps
    right = 0
    for step in range(1, total + 1):
        length = setting.length
        if setting.shortest:
            length = int(torch.randint(setting.shortest, setting.length + 1, (), generator=generator))
        ids, targets = (t.to(args.device) for t in setting.draw(setting.rows, length, generator, **setting.options))
        output = model(input_ids=ids, shift_labels=targets)
        loss = output.loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, step / 100)
        optimizer.step()
        wrong = ((output.logits.argmax(-1) != targets) & (targets != UNASKED)).any(1)
        right = 0 if wrong.any() else right + len(wrong)
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.4f}, {1 - wrong.float().mean().item():.0%} right", flush=True)
        if right >= EXAMPLES and length == setting.length:
            break
    return step


@torch.no_grad()
def accuracy(model: Any, setting: Setting, far: int, seed: int) -> float:
    """Share of what is asked that is right, in fresh examples `far` times as long; of parity, the last bit alone."""
    model.eval()
    generator = torch.Generator().manual_seed(10**6 + seed)
    length, right, asked = setting.length * far, 0, 0
    at_once = max(1, min(EXAMPLES, 2**15 // length))
    for _ in range(-(-EXAMPLES // at_once)):
        ids, targets = (t.to(model.device) for t in setting.draw(at_once, length, generator, **setting.options))
        if setting.shortest:
            targets[:, :-1] = UNASKED
        known = targets != UNASKED
        right += int((model(input_ids=ids).logits.argmax(-1)[known] == targets[known]).sum())
        asked += int(known.sum())
    return right / asked


if __name__ == "__main__":
    sys.exit(main())
