"""The steps of a session in the order of what they are worth, and what must be importable. Standard library only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """A process of a session.

    Attributes:
        name: with the letter of its part before it: a numbers, b times, c training, d decoding, e a profile.
        function: "module:function", from this package on, called with a `Context` and the arguments.
        limit: seconds.
        together: it runs beside its neighbours, since it times nothing; the compiler takes most of its time.
    """

    name: str
    function: str
    limit: float
    arguments: tuple[str, ...] = ()
    together: bool = False


STEPS = (
    Step("card", ".card:measure", 40),
    Step("a-scan", ".numbers:compare", 150, ("selective_scan", "selective_state_update"), together=True),
    Step("a-ssd", ".numbers:compare", 150, ("ssd", "ssd_update"), together=True),
    Step(
        "a-others",
        ".numbers:compare",
        150,
        ("causal_conv1d", "causal_conv1d_update", "rms_norm", "add_rms_norm", "gated_rms_norm", "linear_cross_entropy"),
        together=True,
    ),
    Step("a-repeats", ".numbers:repeat", 150, together=True),
    Step("a-races", ".numbers:races", 90),
    Step("b-scan", ".times:measure", 90, ("scan",)),
    Step("b-ssd", ".times:measure", 120, ("ssd",)),
    Step("b-pointwise", ".times:measure", 60, ("pointwise",)),
    Step("b-head", ".times:measure", 40, ("head",)),
    Step("c-plain", ".training:launch", 120, ("none",)),
    Step("c-zero2", ".training:launch", 120, ("ds_configs/zero2.json",)),
    Step("c-130m_mamba", ".training:whole_step", 60, ("130m_mamba",)),
    Step("c-130m_mamba2", ".training:whole_step", 60, ("130m_mamba2",)),
    Step("c-350m_hybrid", ".training:whole_step", 60, ("350m_hybrid",)),
    Step("c-1.4b_mamba", ".training:whole_step", 80, ("1.4b_mamba",)),
    Step("d-mamba", ".decoding:measure", 150, ("mamba",)),
    Step("d-mamba2", ".decoding:measure", 150, ("mamba2",)),
    Step("c-auto", ".training:automatic", 120),
    Step("c-largest", ".training:largest", 90),
    Step("e-slowest", ".profiles:slowest", 60),
    Step("b-mixer", ".times:measure", 100, ("mixer",)),
    Step("a-tests", ".numbers:tests", 240),
)

IMPORTS = (  # a process each, all at once
    "import torch; assert torch.cuda.is_available(), 'PyTorch sees no CUDA device'",
    "import accelerate.commands.launch, accelerate.utils",
    "import datasets, pyarrow, rich, pydantic, hjson, einops",
    "import deepspeed",
    "import hf_mamba.ops.triton.launch, hf_mamba.ops.triton.ssd_launch",
    "import hf_mamba.training.trainer, hf_mamba.preflight, hf_mamba.data, matplotlib",
    "import transformers; transformers.MambaForCausalLM, transformers.Mamba2ForCausalLM",
)
IMPORT_LIMITS = (20, 60)  # seconds; a second try finds the files of a slow disk in memory
