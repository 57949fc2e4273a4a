"""Names of the files in a run's folder, each written once."""

from __future__ import annotations

import re

PLAN_FILE = "plan.json"
CHECKED_FILE = "checked.json"  # what the plan turned out to be where it runs
DS_CONFIG_FILE = "ds_config.json"
RUN_FILE = "run.json"  # what makes the run this one
BRANCH_OF = "branch_of"  # in it: the other run's checkpoint that this one began from
STATUS_FILE = "status.json"
LOCK_FILE = ".lock"  # held by the process that writes here

MANIFEST = "manifest.json"
SAVING = ".saving"
NAME = re.compile(r"checkpoint-(\d+)$")
LATEST_UNIVERSAL = "latest_universal"
UNIVERSAL = "_universal"  # at the end of the name of a copy that any number of ranks can read

LOG_FILE = "log.jsonl"
TRACKERS_FILE = "trackers.json"  # what each tracker calls the run
SAMPLES_FILE = "samples.jsonl"
BAD_STEPS_FILE = "bad_steps.jsonl"
SKIP_FILE = "skipped_samples.json"
LOSS_CURVE = "loss_curve.png"
