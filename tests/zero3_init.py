"""Build a model under ZeRO-3 on this rank and report how far its memory rose. Run by test_zero3_init.py."""

import json
import os
import resource
import sys
from pathlib import Path

import torch
from transformers import TrainingArguments

from hf_mamba import MambaConfig, MambaForCausalLM

PAGE = os.sysconf("SC_PAGE_SIZE")
CONFIG = {"hidden_size": 512, "num_hidden_layers": 48, "vocab_size": 1000}
DS_CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": False},
    "zero_optimization": {"stage": 3},
}


def main(folder: Path) -> None:
    args = TrainingArguments(
        str(folder), deepspeed=DS_CONFIG, use_cpu=True, per_device_train_batch_size=1, report_to="none"
    )
    # what DeepSpeed and gloo take for themselves, once
    MambaForCausalLM._from_config(MambaConfig(**CONFIG | {"num_hidden_layers": 1}), dtype=torch.float32)
    torch.manual_seed(0)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
    model = MambaForCausalLM._from_config(MambaConfig(**CONFIG), dtype=torch.float32)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    report = {
        "rise": peak - before,
        "whole": sum(p.ds_numel for p in model.parameters()),
        "mine": sum(p.ds_tensor.numel() for p in model.parameters()),
    }
    (folder / f"rank{args.process_index}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
