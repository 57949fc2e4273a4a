"""The order of a model's parameters, by whose places an optimizer's state and ZeRO's flat shards are stored.

It is transformers' own. Runs that began when it was another go on in that: those of the recipe by themselves. For a
plain Trainer's `optimizer.pt` of that time, call `restore_first_order(model)` before the Trainer is made.
"""

from torch import nn

ORDER, TRANSFORMERS = "parameter_order", "transformers"  # in the manifest of a checkpoint; absent where it is the first
# the parts that came later than they do now, in the order they had
_LATER = ("conv1d", "x_proj", "dt_proj", "norm", "mixer", "out_proj", "post_attention_layernorm", "shared_mlp")


def restore_first_order(model: nn.Module) -> None:
    """Register the modules as they once were: in_proj before conv1d, a hybrid's mixer before its MLP."""
    for module in list(model.modules()):
        parts = dict(module.named_children())
        for name in (name for name in _LATER if name in parts):
            delattr(module, name)
            setattr(module, name, parts[name])
