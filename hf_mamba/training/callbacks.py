"""Small concerns of a run, one callback each."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_mamba.data.encoding import prompt_ids
from hf_mamba.names import SAMPLES_FILE
from hf_mamba.run.log import append


class RunLog(TrainerCallback):
    """Appends every log line to log.jsonl, so that a run can be watched, and loses none when it is killed.

    A resumed run first appends {"resumed_at": step}: lines of later steps before that one belong to a part of the run
    that was done again.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            append(self._folder, {"resumed_at": state.global_step, "time": time.time()}, before="\n")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and logs:
            append(self._folder, {**logs, "step": state.global_step, "time": time.time()})


class DataWait(TrainerCallback):
    """How long training waited for its data: seconds of a step, and the share of the time between two log lines."""

    def __init__(self) -> None:
        self._waited = 0.0
        self._steps = 0
        self._since = time.perf_counter()

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same iterator, its waiting counted."""
        while True:
            begin = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waited += time.perf_counter() - begin
            yield batch

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._steps += 1

    def leave_out(self, seconds: float) -> None:
        """Time since the last call that was not training."""
        self._since += seconds

    def drain(self) -> dict[str, float]:
        """`data_wait_seconds` a step and `data_wait_share` since the last call."""
        now = time.perf_counter()
        elapsed, waited, steps = now - self._since, self._waited, self._steps
        self._since, self._waited, self._steps = now, 0.0, 0
        if not steps:
            return {}
        return {"data_wait_seconds": round(waited / steps, 6), "data_wait_share": round(waited / elapsed, 4)}


class Samples(TrainerCallback):
    """At each evaluation, a text that the model writes, appended to samples.jsonl by rank 0.

    Greedy, so that it changes with the model only, and no generator moves. Where every rank has a part of the weights
    (`sharded`: ZeRO-3, FSDP), all ranks take part, and the text is read again for each token: decoding reads weights
    past the hooks that gather them.
    """

    def __init__(self, folder: Path, prompt: str, sharded: bool = False, length: int = 64) -> None:
        self._path, self._prompt, self._sharded, self._length = folder / SAMPLES_FILE, prompt, sharded, length

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model, tokenizer = kwargs["model"], kwargs["processing_class"]
        if tokenizer is None or not (self._sharded or state.is_world_process_zero):
            return
        training = model.training
        inputs = torch.tensor([prompt_ids(tokenizer, self._prompt)], device=args.device)
        model.eval()
        if self._sharded:
            tokens = greedy(model, inputs, self._length, tokenizer.eos_token_id)
        else:
            with torch.inference_mode():
                tokens = model.generate(
                    inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=self._length, do_sample=False
                )
        model.train(training)
        if not state.is_world_process_zero:
            return
        text = tokenizer.decode(tokens[0], skip_special_tokens=True)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, "text": text}) + "\n")


@torch.no_grad()
def greedy(model: Any, tokens: torch.Tensor, length: int, eos: int) -> torch.Tensor:
    """`tokens` (1, L) and at most `length` more, by whole forwards; the same on all ranks, which so end together."""
    for _ in range(length):
        logits = model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits
        tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], 1)
        if tokens[0, -1] == eos:
            break
    return tokens
