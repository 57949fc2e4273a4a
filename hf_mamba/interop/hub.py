"""`hf-mamba push RUN REPO`: a run's models to the Hub, one commit a checkpoint.

What is uploaded is the stock folder: weights, configuration, tokenizer, generation config, card, plan and curve; never
optimizer states or pickles. Large files are sent once: an upload that was cut off goes on with the files that are
missing. Tokens come from `hf auth login` or HF_TOKEN, and appear nowhere.
"""

import json
import logging
import os
import queue
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from hf_mamba.interop.outgoing import MODEL_FILES, TOKENIZER_FILES, files_of, refuse_secrets
from hf_mamba.names import LOSS_CURVE, PLAN_FILE
from hf_mamba.redaction import redact, without_secrets
from hf_mamba.report.card import CARD_FILE, write_model_card
from hf_mamba.run.log import read_history

logger = logging.getLogger(__name__)

_FINAL = "model"
_FILES = (*MODEL_FILES, *TOKENIZER_FILES, CARD_FILE, PLAN_FILE, LOSS_CURVE)
_STEP = re.compile(r"^checkpoint-(\d+)$")
_OUR_COMMIT = re.compile(r"Step \d+( \([\d,]+ tokens\))?|Finished model")
T = TypeVar("T")


@dataclass(frozen=True)
class Target:
    """Where to push: a repository, how patiently, and whether over files that are not a run's."""

    repo_id: str
    private: bool = True
    revision: str | None = None
    retries: int = 6
    wait: float = 2.0  # seconds before the first retry; doubles, up to a minute
    overwrite: bool = False


def push(run: str | Path, target: Target) -> list[str]:
    """Upload a run: every checkpoint that the repository does not have yet, then the finished model.

    Args:
        run: a run's folder (checkpoint-*/, model/, plan.json), or a model's folder.

    Returns:
        The messages of the commits that were made.

    Raises:
        ValueError: for a folder without a model, a repository without rights or with files of others, or a Hub that
            stayed out of reach.
    """
    run = Path(run)
    states = _states(run)
    if not states:
        raise ValueError(f"{run} holds no model: neither config.json, {_FINAL}/ nor a complete checkpoint-*/.")
    api = HfApi()
    _open_repository(api, target)
    commits = _history(api, target)
    done, head = {commit.title for commit in commits}, commits[0].commit_id if commits else None
    made = []
    for step, folder in states:
        message = _message(run, step)
        if step is not None and message in done:
            continue
        with tempfile.TemporaryDirectory(prefix=".push.", dir=run) as staging:
            stage(folder, run, Path(staging), command=())  # this process is not the one that trained
            new_head = upload(Path(staging), message, target, api)
        if new_head != head:
            made.append(message)
        head = new_head
    return made


def _history(api: HfApi, target: Target) -> list[Any]:
    """The commits of the branch, newest first.

    Raises:
        ValueError: the branch holds files, and no commit of a run: a push would write over somebody's work.
    """
    commits = _retried(lambda: api.list_repo_commits(target.repo_id, revision=target.revision), target, "history")
    if target.overwrite or any(_OUR_COMMIT.fullmatch(commit.title) for commit in commits):
        return commits
    files = _retried(lambda: api.list_repo_files(target.repo_id, revision=target.revision), target, "list of files")
    if others := sorted(set(files) - {".gitattributes"}):
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        raise ValueError(
            f"{target.repo_id} holds files that no run of hf_mamba pushed: {shown}. A push would replace them. Give "
            "another repository or --revision, or run `hf-mamba push RUN REPO --overwrite`."
        )
    return commits


class Pusher:
    """Uploads checkpoints in the background of training, which it can neither stop nor slow down for long.

    A checkpoint is first linked into a folder of its own, so that training may delete it meanwhile. Whatever goes wrong
    is logged, without a trace of a token, and training goes on. One process of a run has one.
    """

    def __init__(self, run: str | Path, target: Target):
        self.run, self.target = Path(run), target
        self._waiting: queue.Queue[tuple[Path, str] | None] = queue.Queue()
        self._complete = True
        # a daemon: a Hub out of reach must not keep a finished run from ending
        self._worker = threading.Thread(target=self._work, name="hub", daemon=True)
        self._worker.start()

    def checkpoint(self, folder: str | Path) -> None:
        """Queue a complete checkpoint-N folder, or a finished model's. Never raises."""
        folder = Path(folder)
        found = _STEP.match(folder.name)
        staging = None
        try:
            staging = Path(tempfile.mkdtemp(prefix=".push.", dir=self.run))
            stage(folder, self.run, staging)
            self._waiting.put((staging, _message(self.run, int(found.group(1)) if found else None)))
        except Exception as error:
            self._failed(folder.name, error)
            if staging is not None:
                shutil.rmtree(staging, ignore_errors=True)

    def finish(self, timeout: float | None = None) -> bool:
        """Wait for the uploads; whether all of them succeeded. `hf-mamba push` sends what did not. Never raises."""
        self._waiting.put(None)
        self._worker.join(timeout)
        return self._complete and not self._worker.is_alive()

    def _work(self) -> None:
        api, opened = HfApi(), False
        while (waiting := self._waiting.get()) is not None:
            staging, message = waiting
            try:
                if not opened:
                    _open_repository(api, self.target)
                    _history(api, self.target)
                    opened = True
                upload(staging, message, self.target, api)
            except Exception as error:
                self._failed(repr(message), error)
            finally:
                shutil.rmtree(staging, ignore_errors=True)

    def _failed(self, what: str, error: Exception) -> None:
        self._complete = False
        text = redact(str(error)) or type(error).__name__
        logger.warning("%s was not pushed to %s, training goes on: %s", what, self.target.repo_id, text)


def stage(folder: Path, run: Path, staging: Path, command: Sequence[str] | None = None) -> None:
    """Gather what is published of one checkpoint or model in `staging`, linked where the file system allows.

    `command` is the launch command for the card; this process's own by default.

    Raises:
        ValueError: where there is no model to publish, or a file holds an access token.
    """
    from hf_mamba.formats.folder import weight_files
    from hf_mamba.interop.convert import convert

    _gather(folder, _FILES, staging, weights=True)
    if not weight_files(staging):  # only DeepSpeed's shards, or an older .bin
        converted = staging / ".converted"
        convert(folder, converted, "transformers")
        for file in converted.iterdir():
            if not (staging / file.name).exists() or file.name == "config.json":
                file.replace(staging / file.name)
        shutil.rmtree(converted)
    final = run / _FINAL
    if folder != final and final.is_dir() and not any(staging.glob("tokenizer*")):
        _gather(final, TOKENIZER_FILES, staging)
    plan = _json(next((p for p in (staging / PLAN_FILE, run / PLAN_FILE) if p.is_file()), None))
    if plan:
        _rewrite(staging / PLAN_FILE, json.dumps(without_secrets(plan), indent=2) + "\n")
    if not (staging / CARD_FILE).is_file():
        history = _loss_history(folder)
        _curve(history, plan, staging)
        _gather(run, ("run.json",), staging)  # where the card finds the data's fingerprint
        write_model_card(staging, plan, history, command)
        (staging / "run.json").unlink(missing_ok=True)
    refuse_secrets(staging.iterdir(), folder)


def upload(staging: Path, message: str, target: Target, api: HfApi) -> str:
    """One commit that makes the repository's files those of `staging`; retried while the network fails.

    Returns:
        the branch's head afterwards; no commit is made where nothing differs.

    Raises:
        ValueError: where the Hub refuses, or stayed out of reach.
    """
    info = _retried(
        lambda: api.upload_folder(
            repo_id=target.repo_id,
            folder_path=staging,
            commit_message=message,
            revision=target.revision,
            delete_patterns=["*.safetensors", "*.safetensors.index.json"],  # of another number of shards
        ),
        target,
        f"upload of {message!r}",
    )
    return info.oid


def _open_repository(api: HfApi, target: Target) -> None:
    created = _retried(
        lambda: api.create_repo(target.repo_id, private=target.private, exist_ok=True), target, "creation"
    )
    if target.revision is not None:
        branch = target.revision
        _retried(lambda: api.create_branch(created.repo_id, branch=branch, exist_ok=True), target, "branch")


def _retried(action: Callable[[], T], target: Target, what: str) -> T:
    wait = target.wait
    for attempt in range(target.retries + 1):
        try:
            return action()
        except Exception as error:
            text = redact(str(error)).strip() or type(error).__name__
            refusal = _refusal(error)
            if refusal is not None:
                raise ValueError(f"the Hub refused the {what} to {target.repo_id}: {refusal} ({text})") from None
            if attempt == target.retries:
                raise ValueError(
                    f"the {what} to {target.repo_id} failed {attempt + 1} times, last with: {text}. What was sent is "
                    "kept: run hf-mamba push again."
                ) from None
            logger.warning("the %s to %s failed (%s); again in %.0f s", what, target.repo_id, text, wait)
            time.sleep(wait)
            wait = min(2 * wait, 60.0)
    raise AssertionError("unreachable")


def _refusal(error: Exception) -> str | None:
    """Why trying again cannot help, or None where it may."""
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        if status in (401, 403, 404):
            return "there is no such repository, or your token may not write to it: see `hf auth whoami`"
        if 400 <= status < 500 and status not in (408, 409, 412, 425, 429):
            return f"HTTP {status}"
        return None
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: unset it"
    return "the request is not valid" if isinstance(error, ValueError) else None


def _states(run: Path) -> list[tuple[int | None, Path]]:
    """(step, folder) of each complete checkpoint in order, then (None, the finished model)."""
    if (run / "config.json").is_file():
        found = _STEP.match(run.name)
        return [(int(found.group(1)) if found else None, run)]
    complete = [file.parent for file in run.glob("checkpoint-*/trainer_state.json")]
    steps = sorted((int(match.group(1)), folder) for folder in complete if (match := _STEP.match(folder.name)))
    states: list[tuple[int | None, Path]] = [*steps]
    if (run / _FINAL / "config.json").is_file():
        states.append((None, run / _FINAL))
    return states


def _message(run: Path, step: int | None) -> str:
    if step is None:
        return "Finished model"
    tokens = (_json(run / PLAN_FILE) or _json(run.parent / PLAN_FILE) or {}).get("tokens_per_step")
    return f"Step {step}" + (f" ({step * tokens:,} tokens)" if tokens else "")


def _loss_history(folder: Path) -> list[Mapping[str, Any]]:
    """The run's log up to a checkpoint; nothing where the folder is none."""
    state = _json(folder / "trainer_state.json")
    return read_history(folder.parent, state.get("global_step"), state.get("log_history", ())) if state else []


def _curve(history: Sequence[Mapping[str, Any]], plan: dict[str, Any], staging: Path) -> None:
    from hf_mamba.report.plots import plot_loss

    plot_loss(history, staging / LOSS_CURVE, plan.get("tokens_per_step") or 1, f"{plan.get('preset') or 'Mamba'}: loss")


def _json(file: Path | None) -> dict[str, Any]:
    return json.loads(file.read_text()) if file is not None and file.is_file() else {}


def _gather(folder: Path, names: Sequence[str], staging: Path, weights: bool = False) -> None:
    """Hard-link the files into `staging`, or copy them where the file system cannot."""
    for name, file in files_of(folder, names, weights).items():
        try:
            os.link(file, staging / name)
        except OSError:
            shutil.copyfile(file, staging / name)


def _rewrite(file: Path, text: str) -> None:
    file.unlink(missing_ok=True)  # it may be a link to the run's own
    file.write_text(text)
