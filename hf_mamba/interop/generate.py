"""`hf-mamba generate MODEL "prompt"`: see a model write, from any folder or Hub name that loads here."""

from __future__ import annotations

import argparse
import sys
from typing import Any

# flag -> (type, what it does); transformers' own names and meanings (GenerationConfig)
SAMPLING: dict[str, tuple[Any, str]] = {
    "max_new_tokens": (int, "tokens to write at most (default 200)"),
    "temperature": (float, "above 1 for more surprise, below for less; 0 always takes the likeliest token"),
    "top_k": (int, "draw among so many likeliest tokens"),
    "top_p": (float, "draw among the likeliest tokens that hold this probability together"),
    "min_p": (float, "draw among tokens at least this likely, relative to the likeliest"),
    "repetition_penalty": (float, "above 1 to repeat less"),
}


def main(argv: list[str]) -> int:
    """Write text to the terminal as it is made; memory does not grow with it.

    Raises:
        ValueError: for a model or tokenizer that cannot be loaded, or a setting that cannot be sampled with.
    """
    parser = argparse.ArgumentParser(
        prog="hf-mamba generate", description="Continue a text, as it is written.", allow_abbrev=False
    )
    parser.add_argument("model", help="a model's folder, or a repository of the Hub")
    parser.add_argument("prompt", help="the text to continue; - reads it from standard input")
    for name, (kind, help) in SAMPLING.items():
        parser.add_argument(f"--{name}", type=kind, help=help)
    parser.add_argument("--seed", type=int, default=0, help="of the drawing (default 0)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--device", help="cuda or cpu; what there is by default")
    own = parser.parse_args(argv)
    prompt = sys.stdin.read() if own.prompt == "-" else own.prompt
    settings = {name: value for name in SAMPLING if (value := getattr(own, name)) is not None}
    write(own.model, prompt, settings, seed=own.seed, dtype=own.dtype, device=own.device)
    return 0


def write(
    name: str, prompt: str, settings: dict[str, Any], *, seed: int = 0, dtype: str = "auto", device: str | None = None
) -> None:
    """Load the model, and print the prompt and what it makes of it, token by token; Ctrl-C ends the text.

    Raises:
        ValueError: see main.
    """
    import torch
    from transformers import GenerationConfig, TextStreamer

    from hf_mamba.data.encoding import prompt_ids
    from hf_mamba.interop.loading import load_model, load_tokenizer

    model = load_model(name, dtype, device).eval()
    tokenizer = load_tokenizer(name)
    ids = prompt_ids(tokenizer, prompt)
    if not ids:  # a document's begin: behind the end of the one before, where there is no token for it
        begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if begin is None:
            raise ValueError("the prompt has no tokens, and the tokenizer has none to begin with: write a prompt.")
        ids = [begin]
    greedy = settings.get("temperature") == 0
    drawn = {key: value for key, value in settings.items() if not (greedy and key == "temperature")}
    try:
        config = GenerationConfig(**{"max_new_tokens": 200, "do_sample": not greedy, **drawn})
        config.validate(strict=True)
    except ValueError as error:
        raise ValueError(f"these settings cannot be sampled with: {' '.join(str(error).split())}") from None
    inputs = torch.tensor([ids], device=model.device)
    torch.manual_seed(seed)
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    try:
        model.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=config, streamer=streamer)
    except KeyboardInterrupt:
        print()
