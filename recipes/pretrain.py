"""Pretrain a Mamba language model.

    accelerate launch recipes/pretrain.py                                    the tiny default, on whatever is here
    accelerate launch recipes/pretrain.py --preset 130m_mamba --dataset data/*.jsonl --deepspeed ds_configs/zero2.json
    python recipes/pretrain.py --preset 7b_mamba --num_gpus 4 --dry_run      what would happen, without doing it

Every number is decided by the pre-flight before anything is built; nothing below recomputes one.
"""

import sys
from pathlib import Path
from typing import Any

from hf_mamba.preflight import Plan, resolve, verify
from hf_mamba.preflight.report import print_report
from hf_mamba.training.arguments import read_arguments
from hf_mamba.training.errors import EXIT_USER_ERROR, user_errors
from hf_mamba.training.processes import is_main_process, stand_alone


def main() -> int:
    # What is wanted, and whether it can work
    arguments = read_arguments(sys.argv[1:])
    plan = resolve(arguments.values, arguments.sources, problems=arguments.problems)
    dry_run = bool(arguments.values.get("dry_run"))
    if is_main_process():
        if dry_run or plan.ds_config:
            plan = verify(plan)
        print_report(plan)
    if not plan.ok:
        return EXIT_USER_ERROR
    return 0 if dry_run else train(plan, arguments.values)


def train(plan: Plan, wanted: dict[str, Any]) -> int:
    from transformers import TrainingArguments, set_seed

    from hf_mamba.training.build import build_model
    from hf_mamba.training.export import export_model, sample_text
    from hf_mamba.training.inputs import prepare_inputs
    from hf_mamba.training.run_folder import claim, identity, record
    from hf_mamba.training.trainer import MambaTrainer

    # 1. Data, before any process group: one rank tokenises, the others wait for it without a time limit
    folder = Path(plan.training_arguments["output_dir"])
    with user_errors():
        data = prepare_inputs(plan, wanted)
        this_run = identity(plan, data.fingerprint)
        checkpoint = claim(folder, this_run, wanted.get("resume", "auto"))

    # 2. The process group; under ZeRO-3 this is also what partitions the model as it is built
    if plan.ds_config:
        stand_alone()
    args = TrainingArguments(**plan.training_arguments)
    main_process = args.process_index == 0
    if main_process:
        record(folder, this_run, plan)

    # 3. The model
    set_seed(args.seed)
    with user_errors():
        model = build_model(plan, data.tokenizer, wanted.get("model_name_or_path"))

    # 4. Training
    trainer = MambaTrainer(
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=data.tokenizer,
    )
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if data.eval is not None:
        trainer.evaluate()
    trainer.save_state()

    # 5. A model folder that any program can load, and a look at what it writes
    exported = export_model(trainer, plan, data.tokenizer, folder / "model")
    if main_process:
        print(f"\nmodel: {exported}\n\n{sample_text(exported, wanted.get('sample_prompt', 'def '))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
