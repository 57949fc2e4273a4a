"""The end of a run: a stock-format model folder that any program can load, complete or absent."""

import shutil
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, Trainer

from hf_mamba.data.encoding import prompt_ids
from hf_mamba.files import publish_folder
from hf_mamba.names import LOSS_CURVE
from hf_mamba.plan import Plan
from hf_mamba.report.card import write_model_card
from hf_mamba.report.plots import plot_loss


def export_model(trainer: Trainer, plan: Plan, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """Write weights, configuration, tokenizer, generation config, plan, loss curve and model card to `folder`.

    Every rank calls this: under ZeRO-3 and FSDP the weights are gathered on the way. The folder appears in one rename.

    Returns:
        `folder`.
    """
    staging = folder.with_name(folder.name + ".partial")
    main = trainer.is_world_process_zero()
    if main:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_fsdp_enabled:  # save_model writes no weights where checkpoints are sharded
        state = trainer.accelerator.get_state_dict(trainer.model)
        if main:
            trainer.accelerator.unwrap_model(trainer.model).save_pretrained(staging, state_dict=state)
    else:
        trainer.save_model(str(staging))
    if main:
        (staging / "training_args.bin").unlink(missing_ok=True)  # a pickle; the plan says the same
        tokenizer.save_pretrained(staging)
        generation_config(tokenizer).save_pretrained(staging)
        plan.save(staging)
        history = trainer.state.log_history
        plot_loss(history, staging / LOSS_CURVE, plan.tokens_per_step, f"{plan.preset or 'Mamba'}: loss")
        write_model_card(staging, plan.to_dict(), history)
        publish_folder(staging, folder)
    trainer.accelerator.wait_for_everyone()
    return folder


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
    model = open_checkpoint(folder).family.model_class.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = torch.tensor([prompt_ids(tokenizer, prompt)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokens = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=max_new_tokens)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))
