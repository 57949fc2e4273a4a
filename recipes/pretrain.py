"""Pretrain a Mamba language model.

    accelerate launch recipes/pretrain.py                                    the tiny default, on whatever is here
    accelerate launch recipes/pretrain.py --preset 130m_mamba --dataset data/*.jsonl --deepspeed ds_configs/zero2.json
    python recipes/pretrain.py --preset 7b_mamba --num_gpus 4 --dry_run      what would happen, without doing it

Every number is decided by the pre-flight before anything is built; nothing below recomputes one.
"""

import os
import sys
from dataclasses import replace

from hf_mamba.preflight import Checked, Plan, check_backend, resolve, verify
from hf_mamba.preflight.command_line import read_arguments
from hf_mamba.preflight.schedule import waits_for_data
from hf_mamba.preflight.screen import print_report
from hf_mamba.run.processes import (
    check_world,
    end_with_launcher,
    is_main_process,
    let_main_speak,
    stand_alone,
    tell_launcher,
    use_cpu_well,
)
from hf_mamba.run.signals import SignalFlag
from hf_mamba.training.errors import EXIT_USER_ERROR, user_errors


def main() -> int:
    end_with_launcher()
    signals = SignalFlag()
    # What is wanted, and whether it can work
    arguments = read_arguments(sys.argv[1:])
    plan, checked = resolve(arguments), Checked()
    dry_run = bool(arguments.get("dry_run"))
    if waits_for_data(plan.problems):  # epochs: the steps are known once all is tokenised, and all else before
        from hf_mamba.training.inputs import epoch_tokens, refusal_without_steps

        if refused := refusal_without_steps(arguments, plan) if is_main_process() else None:
            plan = refused
        else:
            with user_errors():
                plan = resolve(arguments, epoch_tokens=epoch_tokens(plan, build=not dry_run))
    if is_main_process():
        if isinstance(plan, Plan):
            checked = verify(plan, unused=dry_run)
            plan = plan.after(checked)
        print_report(plan, checked=checked)
    if not isinstance(plan, Plan):
        tell_launcher("not started: the problems are listed above")
        let_main_speak()
        return EXIT_USER_ERROR
    return 0 if dry_run else train(plan, signals)


def train(plan: Plan, signals: SignalFlag) -> int:
    with user_errors():
        check_world(plan)
    if plan.device == "cpu":
        use_cpu_well(deepspeed=bool(plan.ds_config))
    from accelerate.utils import release_memory
    from transformers import set_seed

    from hf_mamba.data import DataError
    from hf_mamba.run.checkpoints import SaveError
    from hf_mamba.run.folder import open_run
    from hf_mamba.training.build import build_model, build_training_arguments
    from hf_mamba.training.export import export_model, sample_text
    from hf_mamba.training.inputs import account, open_stream, prepare_inputs, stream_account
    from hf_mamba.training.publishing import Publisher
    from hf_mamba.training.trainer import MambaTrainer

    # 1. The process group, which under ZeRO-3 partitions the model as it is built; before the data: it may refuse
    if plan.ds_config:
        stand_alone()
    os.environ.update(plan.environment)
    with user_errors():
        args = build_training_arguments(plan)
        check_backend(plan)

    # 2. Data: one rank tokenises, the others wait for a file lock, which has no time limit as a collective has one
    with user_errors():
        data = prepare_inputs(plan)
    if is_main_process():
        print(*account(data, plan), sep="\n")

    # 3. The run's folder and last checkpoint
    with user_errors():
        run = open_run(plan, data.fingerprint)
        open_stream(data, run)

    # 4. The model, and whether it is the one that was planned
    set_seed(args.seed)
    with user_errors():
        model = build_model(plan, data.tokenizer)
        checked = verify(plan, model).require()

    # 5. Training, to the end or to a checkpoint where a signal asks for it
    with user_errors():
        trainer = MambaTrainer(
            model=model,
            args=args,
            train_dataset=data.train,
            eval_dataset=data.eval,
            processing_class=data.tokenizer,
            run=run,
            signals=signals,
        )
        if args.process_index == 0:
            replace(checked, fsdp=trainer.sharding).save(run.folder)
    publisher = Publisher(run.folder, plan.hub) if plan.hub and args.process_index == 0 else None
    if publisher:
        trainer.add_callback(publisher)
    with signals.defer(), user_errors(SaveError, DataError), run.failures_recorded():
        trainer.train(resume_from_checkpoint=run.checkpoint)
        read = stream_account(data)
        if is_main_process():
            print(*read, sep="\n", end="\n" * bool(read))
        if data.eval is not None and not trainer.exit_code and not trainer.evaluated:
            trainer.evaluate()
    if trainer.exit_code:
        return trainer.exit_code

    # 6. A model folder that any program can load, and a look at what it writes
    with user_errors(SaveError), run.failures_recorded():
        trainer.save_state()
        exported = export_model(trainer, plan, data.tokenizer, run.folder / "model")
    run.write_status("finished", 0, trainer.state.global_step)
    if args.process_index == 0:
        print(f"\nmodel: {exported}")
        if prompt := plan.run.sample_prompt:
            print(f"\n{sample_text(exported, prompt)}")
    if publisher:  # a device's memory is free for others meanwhile, and a signal ends a finished run
        trainer.accelerator.free_memory()
        del trainer, model
        release_memory()
        with signals.defer():
            publisher.finish(exported, stop=lambda: signals.received)
    return 0


if __name__ == "__main__":
    sys.exit(main())
