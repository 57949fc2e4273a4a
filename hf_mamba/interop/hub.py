"""`hf-mamba push RUN REPO`: a run's models to the Hub, one commit a checkpoint.

What is uploaded is the stock folder: weights, configuration, tokenizer, generation config, card, plan and curve; never
optimizer states or pickles. Large files are sent once: an upload that was cut off goes on with the files that are
missing. Tokens come from `hf auth login` or HF_TOKEN, and appear nowhere.
"""

import contextlib
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
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from hf_mamba.files import beside
from hf_mamba.interop.outgoing import MODEL_FILES, TOKENIZER_FILES, files_of, refuse_secrets
from hf_mamba.names import LOSS_CURVE, PLAN_FILE
from hf_mamba.redaction import for_others, redact
from hf_mamba.report.card import CARD_FILE, write_model_card
from hf_mamba.run.log import read_history

logger = logging.getLogger(__name__)

_FINAL = "model"
_STAGING = "push"  # gathered beside it, as .push.*.partial
_FILES = (*MODEL_FILES, *TOKENIZER_FILES, CARD_FILE, PLAN_FILE, LOSS_CURVE)
_STEP = re.compile(r"^checkpoint-(\d+)$")
_OUR_COMMIT = re.compile(r"Step \d+( \([\d,]+ tokens\))?|Finished model")
_NO_XET = re.compile(r"404 .*/xet-write-token/", re.DOTALL)  # hf_xet's own words: it has no error with a status
_STATUS = re.compile(r"HTTP status (?:client|server) error \((\d{3}) ")
_RESET = re.compile(r";\s*r=0\s*;\s*t=(\d+)")  # nothing remains, and the seconds until something does
_LONGEST_WAIT = 3600.0
_STAGED = 2  # checkpoints that training keeps linked for their upload; more would fill its disk
T = TypeVar("T")


class Unreached(ValueError):
    """The Hub did not take it for a reason that may pass: the same upload may succeed later."""


@dataclass(frozen=True)
class Target:
    """Where to push: a repository, how patiently, and whether over files that are not a run's.

    All waits together are six minutes, as the Hub's rate limits count over five; or what the Hub asks for.
    """

    repo_id: str
    private: bool = True
    revision: str | None = None
    retries: int = 10
    wait: float = 2.0  # seconds before the first retry; doubles, up to a minute
    overwrite: bool = False


def push(run: str | Path, target: Target) -> tuple[str, list[str]]:
    """Upload a run: every checkpoint that the repository does not have yet, then the finished model.

    Where an older one is missing, the newest follows it once more: the branch ends with the newest weights.

    Args:
        run: a run's folder (checkpoint-*/, model/, plan.json), or a model's folder.

    Returns:
        The repository's whole name, and the messages of the commits that were made.

    Raises:
        ValueError: for a folder without a model, a repository without rights or with files of others, or a Hub that
            stayed out of reach.
    """
    run = Path(run)
    states = [(step, folder, _message(run, step)) for step, folder in _states(run)]
    if not states:
        raise ValueError(f"{run} holds no model: neither config.json, {_FINAL}/ nor a complete checkpoint-*/.")
    api = HfApi()
    target = _open_repository(api, target)
    commits = _history(api, target)
    done, head = {commit.title for commit in commits}, commits[0].commit_id if commits else None
    due = [state for state in states if state[0] is None or state[2] not in done]
    if due and due[-1] is not states[-1]:
        due.append(states[-1])
    made = []
    for _, folder, message in due:
        with beside(run / _STAGING) as staging:
            stage(folder, run, staging, command=())  # this process is not the one that trained
            new_head = upload(staging, message, target, api)
        if new_head != head:
            made.append(message)
        head = new_head
    return target.repo_id, made


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


@dataclass
class _Upload:
    """One checkpoint or model on its way."""

    folder: Path
    message: str
    staging: Path | None  # None: to be gathered once more from `folder`, if that is still there


class Pusher:
    """Uploads checkpoints in the background of training, which it can neither stop nor slow down for long.

    A checkpoint is first linked into a folder of its own, so that training may delete it meanwhile. What a Hub out of
    reach did not take is tried again with the next checkpoint, before it, as long as it is linked or there. Whatever
    goes wrong is logged, without a trace of a token, and training goes on. One process of a run has one.
    """

    def __init__(self, run: str | Path, target: Target):
        self.run, self.target = Path(run), target
        self._root: Path | None = None  # of what is staged
        self._cleanup = contextlib.ExitStack()
        self._due: list[_Upload] = []
        self._under_way: _Upload | None = None
        self._lock = threading.Lock()  # of these two
        self._opened = False
        self._complete = True
        self._news: queue.Queue[bool] = queue.Queue()  # whether more may come
        # a daemon: a Hub out of reach must not keep a finished run from ending
        self._worker = threading.Thread(target=self._work, name="hub", daemon=True)
        self._worker.start()

    def checkpoint(self, folder: str | Path) -> None:
        """Queue a complete checkpoint-N folder, or a finished model's. Never raises."""
        folder = Path(folder)
        found = _STEP.match(folder.name)
        try:
            if self._root is None:
                self._root = self._cleanup.enter_context(beside(self.run / _STAGING))
            message = _message(self.run, int(found.group(1)) if found else None)
            item = _Upload(folder, message, self._stage(folder))
            with self._lock:
                self._due.append(item)
                for older in self._due[:-_STAGED]:
                    if older is not self._under_way:
                        self._unstage(older)
            self._news.put(True)
        except Exception as error:
            self._failed(folder.name, error)

    @property
    def waiting(self) -> int:
        """How many are not uploaded yet."""
        return len(self._due)

    def finish(self, timeout: float | None = None, stop: Callable[[], Any] = lambda: False) -> bool:
        """Wait for the uploads; whether all of them succeeded. `hf-mamba push` sends what did not. Never raises.

        Args:
            timeout: seconds to wait at most.
            stop: asked several times a second; the waiting ends where it says so.
        """
        self._news.put(False)
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        while self._worker.is_alive() and time.monotonic() < end and not stop():
            self._worker.join(0.2)
        complete = self._complete and not self._due and not self._worker.is_alive()
        self._cleanup.close()
        return complete

    def _work(self) -> None:
        api, more = HfApi(), True
        while more:
            more = self._news.get()
            while self._due and self._settled(api):
                with self._lock:
                    self._unstage(self._due.pop(0))

    def _settled(self, api: HfApi) -> bool:
        """Upload the first that is due; False where it has to wait for the next checkpoint."""
        message = self._due[0].message
        try:
            if not self._opened:
                self.target = _open_repository(api, self.target)
                self._add_missing({commit.title for commit in _history(api, self.target)})
                self._opened = True
            with self._lock:
                item = self._under_way = self._due[0]
            message = item.message
            item.staging = item.staging or self._stage(item.folder)
            upload(item.staging, message, self.target, api)
        except Unreached as error:
            self._say(f"{message!r} is tried again with the next checkpoint, training goes on", error)
            return False
        except Exception as error:
            self._failed(repr(message), error)
        finally:
            self._under_way = None
        return True

    def _add_missing(self, done: set[str]) -> None:
        """Put the older checkpoints that the Hub does not have before the first: a start before this one left them."""
        due = {item.message for item in self._due}
        older = []
        for step, folder in _states(self.run):
            if (message := _message(self.run, step)) in due or step is None:
                break
            if message not in done:
                older.append(_Upload(folder, message, None))
        with self._lock:
            self._due[:0] = older

    def _stage(self, folder: Path) -> Path:
        staging = Path(tempfile.mkdtemp(dir=self._root))
        try:
            stage(folder, self.run, staging)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        return staging

    def _unstage(self, item: _Upload) -> None:
        if item.staging is not None:
            shutil.rmtree(item.staging, ignore_errors=True)
            item.staging = None

    def _failed(self, what: str, error: Exception) -> None:
        self._complete = False
        self._say(f"{what} was not pushed to {self.target.repo_id}, training goes on", error)

    def _say(self, what: str, error: Exception) -> None:
        logger.warning("%s: %s", what, redact(str(error)) or type(error).__name__)


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
        _rewrite(staging / PLAN_FILE, json.dumps(for_others(plan), indent=2) + "\n")
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

    def commit() -> Any:
        return api.upload_folder(
            repo_id=target.repo_id,
            folder_path=staging,
            commit_message=message,
            revision=target.revision,
            # a commit whose answer was lost is not made again by the client's own retries
            parent_commit=api.model_info(target.repo_id, revision=target.revision).sha,
            delete_patterns=["*.safetensors", "*.safetensors.index.json"],  # of another number of shards
        )

    return _retried(commit, target, f"upload of {message!r}").oid


def _open_repository(api: HfApi, target: Target) -> Target:
    """Create the repository and branch where they are missing; the target with the repository's whole name."""
    try:
        validate_repo_id(target.repo_id)
    except ValueError as error:
        raise ValueError(f"{target.repo_id!r} is no name of a repository: {error}") from None
    created = _retried(
        lambda: api.create_repo(target.repo_id, private=target.private, exist_ok=True), target, "creation"
    )
    target = replace(target, repo_id=created.repo_id)  # with the account, where it was left out
    if target.private and _retried(lambda: api.model_info(target.repo_id), target, "look").private is False:
        logger.warning("%s is public: everybody can read what is pushed there", target.repo_id)
    if target.revision is not None:
        branch = target.revision
        _retried(lambda: api.create_branch(target.repo_id, branch=branch, exist_ok=True), target, "branch")
    return target


def _retried(action: Callable[[], T], target: Target, what: str) -> T:
    """What `action` returns, once the Hub takes it.

    Raises:
        ValueError: the Hub refuses it. An `Unreached`, where that may pass.
    """
    wait = target.wait
    for attempt in range(target.retries + 1):
        try:
            return action()
        except Exception as error:
            text = redact(str(error)).strip() or type(error).__name__
            if _NO_XET.search(text) and not constants.HF_HUB_DISABLE_XET:
                logger.warning("this Hub has no Xet storage: files go to it by LFS")
                constants.HF_HUB_DISABLE_XET = True
                return _retried(action, target, what)
            if refusal := _refusal(error, text):
                raise refusal[0](f"the Hub refused the {what} to {target.repo_id}: {refusal[1]}") from None
            if attempt == target.retries:
                raise Unreached(
                    f"the {what} to {target.repo_id} failed {attempt + 1} times, last with: {text}. What was sent is "
                    "kept: run hf-mamba push again."
                ) from None
            seconds = _asked_wait(error) or wait
            logger.warning("the %s to %s failed (%s); again in %.0f s", what, target.repo_id, text, seconds)
            time.sleep(seconds)
            wait = min(2 * wait, 60.0)
    raise AssertionError("unreachable")


def _asked_wait(error: Exception) -> float | None:
    """The seconds that the Hub asks to wait, by RateLimit or Retry-After; a second more, as they are rounded."""
    response = getattr(error, "response", None)
    headers = {} if response is None else response.headers
    after = headers.get("retry-after", "").strip()
    if limit := _RESET.search(headers.get("ratelimit", "")):
        seconds = float(limit[1])
    elif after.isdecimal():
        seconds = float(after)
    else:
        try:
            seconds = parsedate_to_datetime(after).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return min(max(seconds, 0.0) + 1.0, _LONGEST_WAIT)


def _refusal(error: Exception, text: str) -> tuple[type[ValueError], str] | None:
    """Why trying again at once cannot help, and whether it may later; None where it may now."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if status is None and (found := _STATUS.search(text)):
        status = int(found[1])
    if status is not None:
        said = getattr(error, "server_message", None)
        reason = f"{redact(said).strip() if said else text} (HTTP {status})"
        if status == 404:
            return Unreached, f"there is no such repository, or your token may not see it: {reason}"
        if status in (401, 403):
            return (
                Unreached,
                f"{reason}. `hf auth whoami` shows whose token it is: one that may not write is refused, too",
            )
        if 400 <= status < 500 and status not in (408, 409, 412, 425, 429):
            return ValueError, reason
        return None
    if isinstance(error, OfflineModeIsEnabled):
        return Unreached, f"HF_HUB_OFFLINE is set: unset it ({text})"
    return (ValueError, f"the request is not valid ({text})") if isinstance(error, ValueError) else None


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
