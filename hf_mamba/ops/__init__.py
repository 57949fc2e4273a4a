"""The operations of a state-space model, one function and one meaning each; see public.py for their documentation.

public      the functions: shapes are checked, and a backend is chosen
dispatch    the choice of the backend
reference   the definitions, as plain recurrences
operands    an operation's operands as one value
operators   the registered operators and their gradients, for every backend
loss        the head's product and its cross entropy, in chunks
torch, cpu, triton, mamba_ssm    one room for each way of computing
"""

from hf_mamba.ops import reference
from hf_mamba.ops.dispatch import available_backends, backend, which
from hf_mamba.ops.loss import linear_cross_entropy
from hf_mamba.ops.public import (
    add_rms_norm,
    causal_conv1d,
    causal_conv1d_update,
    gated_rms_norm,
    linear,
    rms_norm,
    selective_scan,
    selective_state_update,
    ssd,
    ssd_update,
)

__all__ = [
    "add_rms_norm",
    "available_backends",
    "backend",
    "causal_conv1d",
    "causal_conv1d_update",
    "gated_rms_norm",
    "linear",
    "linear_cross_entropy",
    "reference",
    "rms_norm",
    "selective_scan",
    "selective_state_update",
    "ssd",
    "ssd_update",
    "which",
]
