"""Build the TrainingArguments and the model of a Plan; under ZeRO-3 partitioned from the first tensor on."""

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from hf_mamba.data.tokenizer_files import padded_vocabulary
from hf_mamba.family import family_of
from hf_mamba.plan import Plan
from hf_mamba.preflight.arguments import for_transformers
from hf_mamba.private.torch import limit_group
from hf_mamba.private.transformers import new_model
from hf_mamba.training.continuation import load_for_training


def build_training_arguments(plan: Plan) -> TrainingArguments:
    """The plan's arguments for Trainer, by the names of the installed transformers."""
    args = TrainingArguments(**for_transformers(plan.training_arguments, TrainingArguments.__dataclass_fields__))
    if args.device.type == "cpu":
        limit_group(args.ddp_timeout)
    return args


def build_model(plan: Plan, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model to train, with the tokenizer's special tokens, in fp32: the engine casts and keeps master weights.

    TrainingArguments must exist already: they make loading and `new_model` partition the weights under ZeRO-3.

    Raises:
        ValueError: for a checkpoint that cannot be used, or a tokenizer that is larger than a fresh embedding.
    """
    family = family_of(plan.model_config)
    if plan.start_from is not None:
        rows = plan.model_config["vocab_size"]
        model = load_for_training(plan.start_from, tokenizer, torch.float32, family, rows)
        _serve_context(model.config, plan.seq_len)
        return model
    config = family.config_class(**plan.model_config)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer):,} tokens and the embedding {config.vocab_size:,} rows: some tokens "
            f"would have no embedding. Write --vocab_size {padded_vocabulary(len(tokenizer))}, or use a smaller "
            "tokenizer."
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    _serve_context(config, plan.seq_len)
    return new_model(family.model_class, config, torch.float32)


def _serve_context(config: PretrainedConfig, seq_len: int) -> None:
    """Let readers such as vLLM serve the trained length: they go no further than the file says, where it says it."""
    if getattr(config, "max_position_embeddings", seq_len) < seq_len:
        config.max_position_embeddings = seq_len
