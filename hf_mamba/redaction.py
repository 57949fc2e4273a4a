"""What must not be shown or sent: access tokens, passwords in addresses, the values of secret settings."""

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

_TOKEN = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{20,}")
_USER_IN_ADDRESS = re.compile(r"\b([a-z][a-z0-9+.-]*://)[^\s/@:\"'<>]*:[^\s/@\"'<>]+@", re.IGNORECASE)
_SECRET_NAME = re.compile(r"(^|_)(token|password|passwd|secret|secret_key|access_key|api_key)$", re.IGNORECASE)
_TEXT_TOKEN = re.compile(r"^(bos|eos|pad|unk|sep|cls|mask)_token$", re.IGNORECASE)  # a tokenizer's, not a key
_ASSIGNED = re.compile(r"\b([A-Za-z][A-Za-z0-9_]*)=([^\s\"'`&]+)")
_FOLDERS = re.compile(r"""(?<![\w.:/@~$-])/(?:[^/\s'",:=@`]+/)+""")  # no part of an address
_SHORTEST = 8  # characters of an environment's secret; a shorter value would hide common words


def is_secret(name: str) -> bool:
    """Tell whether a setting, flag or variable of this name holds something that nobody else may see."""
    name = name.strip("-").replace("-", "_")
    return bool(_SECRET_NAME.search(name)) and not _TEXT_TOKEN.match(name)


def without_known_secrets(text: str) -> str:
    """Replace what is secret wherever it stands: the Hub's tokens, this process's own, user:password in addresses."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and is_secret(name):
            text = text.replace(value, "<token>")
    return _USER_IN_ADDRESS.sub(r"\1<secret>@", _TOKEN.sub("<token>", text))


def redact(text: str) -> str:
    """Replace known secrets in a text, and whatever is assigned to a secret name, as in WANDB_API_KEY=..."""
    return _ASSIGNED.sub(
        lambda match: f"{match[1]}=<token>" if is_secret(match[1]) else match[0], without_known_secrets(text)
    )


def without_secrets(value: Any) -> Any:
    """Redact a JSON value; the values of keys such as `hub_token` become None."""
    if isinstance(value, Mapping):
        return {key: None if is_secret(str(key)) else without_secrets(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    return redact(value) if isinstance(value, str) else value


def without_paths(text: str) -> str:
    """Take the machine out of absolute paths: those in this process's folder become relative, others keep their end."""
    return _FOLDERS.sub("", text.replace(f"{os.getcwd()}/", ""))


def for_others(value: Any) -> Any:
    """A JSON value as it may be published: without secrets, and without the folders of this machine."""
    if isinstance(value, Mapping):
        return {key: for_others(inner) for key, inner in without_secrets(value).items()}
    if isinstance(value, list | tuple):
        return [for_others(item) for item in value]
    return without_paths(redact(value)) if isinstance(value, str) else value


def command_line(words: Sequence[str]) -> str:
    """A command as it would be typed, without the values of flags such as --hub_token."""
    shown = []
    hide = False
    for word in words:
        flag, equals, _ = word.partition("=")
        secret = word.startswith("--") and is_secret(flag)
        shown.append("<token>" if hide else f"{flag}=<token>" if secret and equals else redact(word))
        hide = secret and not equals
    return shlex.join(shown)
