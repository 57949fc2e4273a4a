"""Evaluate a model with lm-eval: any of its tasks, or your own from a folder of task files.

    python recipes/evaluate.py runs/mamba/model --tasks lambada_openai,hellaswag
    python recipes/evaluate.py runs/mamba/model --tasks my_task --task_folder tasks/ --output results.json

The model is any that this package loads: a folder in either format, a DeepSpeed training folder, or
a repository of the Hub. Tasks whose data is local need no network.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    args = parse_arguments(sys.argv[1:])
    try:
        results = evaluate(args)
    except (ValueError, OSError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    print_table(results)
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=2, default=str) + "\n")
    return 0


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model's folder, or a repository of the Hub")
    parser.add_argument("--tasks", required=True, help="names, separated by commas")
    parser.add_argument("--task_folder", help="a folder with task files (YAML) of your own")
    parser.add_argument("--tokenizer", help="a tokenizer's folder; the model's own by default")
    parser.add_argument("--batch_size", default="8", help='rows at a time, or "auto" for as many as fit')
    parser.add_argument("--num_fewshot", type=int, help="examples before each question; by default the task's own")
    parser.add_argument("--limit", type=int, help="only the first so many documents of each task")
    parser.add_argument("--max_length", type=int, default=2048, help="longest context in tokens")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--device", help="cuda or cpu; what there is by default")
    parser.add_argument("--output", help="write all results to this JSON file")
    return parser.parse_args(argv)


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """lm-eval's results: `results` by task and metric, with the configuration of each task."""
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    from hf_mamba.interop.loading import load_model

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(args.model, args.dtype, device)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model)
    tasks = args.tasks.split(",")
    manager = TaskManager(include_path=args.task_folder, include_defaults=args.task_folder is None)
    if not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=args.task_folder)  # with lm-eval's own tasks, which take long to index
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ValueError(f"there are no tasks {', '.join(unknown)}; `lm-eval ls tasks` lists them.")
    lm = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=args.batch_size if args.batch_size.startswith("auto") else int(args.batch_size),
        max_length=args.max_length,
        device=device,
    )
    results = simple_evaluate(
        lm, tasks=tasks, num_fewshot=args.num_fewshot, limit=args.limit, task_manager=manager, log_samples=False
    )
    return {key: results[key] for key in ("results", "n-shot", "n-samples", "versions") if key in results}


def print_table(results: dict[str, Any]) -> None:
    print(f"{'task':<28} {'metric':<24} {'value':>12} {'±':>10}")
    for task, metrics in results["results"].items():
        for name, value in metrics.items():
            metric, _, filtered = name.partition(",")
            if not isinstance(value, float) or metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr,{filtered}")
            shown = f"{error:>10.4g}" if isinstance(error, float) else ""
            print(f"{task:<28} {metric:<24} {value:>12.6g} {shown}".rstrip())


if __name__ == "__main__":
    sys.exit(main())
