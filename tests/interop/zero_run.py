"""Two ranks train a small model for two steps under ZeRO-2 and ZeRO-3: python zero_run.py OUT PORT.

OUT/zero2 and OUT/zero3 become training folders; OUT/zero2.safetensors and OUT/zero3.safetensors hold what DeepSpeed's
own script makes of them. OUT/longer.safetensors and OUT/other.safetensors hold the weights of zero2 after
`load_for_training` under ZeRO-3, with a tokenizer that has more tokens and with another one.
"""

import os
import sys
from pathlib import Path

import torch
import torch.multiprocessing as mp

os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer  # imports inductor, else in every fork


def main(rank: int, out: str, port: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": port}
    torch.set_num_threads(1)
    from safetensors.torch import save_file

    from hf_mamba import MambaConfig, MambaForCausalLM

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo does; nothing is compiled
    deepspeed.init_distributed("gloo", verbose=False)
    for stage in (2, 3):
        torch.manual_seed(0)
        config = MambaConfig(vocab_size=61, hidden_size=20, num_hidden_layers=2, state_size=4, bos_token_id=7)
        model = MambaForCausalLM(config)
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim == 1]
        optimizer = torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2)
        settings = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 1,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": stage},
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        for step in range(2):
            tokens = torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(2 * step + rank))
            engine.backward(engine(input_ids=tokens, labels=tokens).loss)
            engine.step()
        folder = Path(out, f"zero{stage}")
        engine.save_checkpoint(str(folder))
        if rank == 0:
            config.save_pretrained(folder)
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

            state = get_fp32_state_dict_from_zero_checkpoint(str(folder))
            save_file({name: tensor.clone() for name, tensor in state.items()}, Path(out, f"zero{stage}.safetensors"))

    from checkpoints import WORDS, make_tokenizer
    from transformers.integrations import HfDeepSpeedConfig

    from hf_mamba.training.continuation import load_for_training

    source = Path(out, "zero2")
    if rank == 0:
        make_tokenizer(WORDS).save_pretrained(source)
    torch.distributed.barrier()
    live = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
    for name, words in (("longer", [*WORDS, *(f"w{i}" for i in range(99))]), ("other", [*reversed(WORDS), "zebra"])):
        model = load_for_training(source, make_tokenizer(words), torch.float32)
        assert all(hasattr(parameter, "ds_id") for parameter in model.backbone.layers.parameters())
        # resized embeddings are whole until deepspeed.initialize, which takes rank 0's
        partitioned = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
        with deepspeed.zero.GatheredParameters(partitioned):
            if rank == 0:
                whole = {n: p.detach().clone() for n, p in model.named_parameters()}
                save_file(whole, Path(out, f"{name}.safetensors"))
    del live


if __name__ == "__main__":
    mp.start_processes(main, args=(sys.argv[1], sys.argv[2]), nprocs=2, start_method="fork")
