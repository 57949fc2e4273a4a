"""The end of a run: a stock-format model folder that any program can load, complete or absent."""

import json
import shutil
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, Trainer
from transformers.utils import CONFIG_NAME

from hf_mamba.data.encoding import prompt_ids
from hf_mamba.files import publish_folder, write_json
from hf_mamba.names import LOSS_CURVE
from hf_mamba.plan import Plan
from hf_mamba.report.card import write_model_card
from hf_mamba.report.plots import plot_loss
from hf_mamba.run import ranks
from hf_mamba.run.checkpoints import SaveError, why_not_written
from hf_mamba.run.log import read_history
from hf_mamba.training.screen import without_bars


def export_model(trainer: Trainer, plan: Plan, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """Write weights, configuration, tokenizer, generation config, plan, loss curve and model card to `folder`.

    Every rank calls this: under ZeRO-3 and FSDP the weights are gathered on the way. The folder appears in one rename.

    Returns:
        `folder`.

    Raises:
        SaveError: it cannot be written, and why; nothing of it is left.
    """
    staging = folder.with_name(folder.name + ".partial")

    def prepare() -> None:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)

    def complete() -> None:
        (staging / "training_args.bin").unlink(missing_ok=True)  # a pickle; the plan says the same
        config = json.loads((staging / CONFIG_NAME).read_text(encoding="utf-8"))
        if "use_cache" in config:  # Trainer turns it off for training
            write_json(staging / CONFIG_NAME, config | {"use_cache": True})
        tokenizer.save_pretrained(staging)
        generation_config(tokenizer).save_pretrained(staging)
        plan.save(staging)
        history = read_history(Path(str(trainer.args.output_dir)), earlier=trainer.state.log_history)
        plot_loss(history, staging / LOSS_CURVE, plan.tokens_per_step, f"{plan.preset or 'Mamba'}: loss")
        write_model_card(staging, plan.to_dict(), history)
        publish_folder(staging, folder)

    try:
        ranks.on_main(prepare)
        with without_bars():
            _save_weights(trainer, staging)
        ranks.on_main(complete)
    except BaseException as error:  # the writers raise what they like: OSError, RuntimeError, SafetensorError
        reason = why_not_written(staging, error) if isinstance(error, Exception) else None
        if trainer.is_world_process_zero():
            shutil.rmtree(staging, ignore_errors=True)
        if reason is None:
            raise
        raise SaveError(
            f"The model cannot be written to {folder}: {reason}. The checkpoints are whole; what was written of the "
            "model is removed. Make room, and run the same command again: it trains no step twice, and writes it."
        ) from error
    return folder


def _save_weights(trainer: Trainer, staging: Path) -> None:
    if not trainer.is_fsdp_enabled:
        trainer.save_model(str(staging))
        return
    state = trainer.accelerator.get_state_dict(trainer.model)  # save_model writes none where checkpoints are sharded
    if trainer.is_world_process_zero():
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(staging, state_dict=state)


def generation_config(tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Sampling defaults and the tokenizer's special tokens."""
    return GenerationConfig(
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@torch.inference_mode()
def sample_text(folder: Path, prompt: str, max_new_tokens: int = 80, seed: int = 0) -> str:
    """Generate from the exported folder, as a user of it would; the prompt is included in the result."""
    from transformers import AutoTokenizer
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from hf_mamba.formats.folder import open_checkpoint

    unset_hf_deepspeed_config()  # one rank loads a whole model; under ZeRO-3 it would wait for the others
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with without_bars():
        model = open_checkpoint(folder).family.model_class.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = torch.tensor([prompt_ids(tokenizer, prompt)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokens = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=max_new_tokens)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))
