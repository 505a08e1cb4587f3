"""A release as one commit of a repository on the Hugging Face hub.

The token is the one of huggingface_hub: HF_TOKEN, or of `hf auth login`. It is in no setting.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_core.data.sources.hub import HUB_SECONDS, ask_hub
from rlhf_core.errors import ConfigError, ModelError, RLHFError, StoreUnavailable
from rlhf_core.system.secrets import redact

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

PREFIX = "hub:"
EXAMPLE = "hub:OWNER/NAME, such as hub:my-team/support-bot"

REPLACED = [
    "model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json",
    "adapter_model.safetensors", "adapter_config.json",
]  # fmt: skip
"""Files of an earlier push that one commit also deletes, if it does not write them: shards of a
larger model, or those of the other layout. Other files of the repository stay."""


@dataclass(frozen=True)
class Pushed:
    """What a push led to: the repository's page, the commit, and whether it is new."""

    url: str
    commit: str
    new: bool
    private: bool


def parse_target(target: str) -> str:
    """The repository's id in `hub:owner/name`.

    Raises:
        ConfigError: it is something else; the text says what to write.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    repo = target.removeprefix(PREFIX)
    if not target.startswith(PREFIX):
        raise ConfigError(f"{target!r} names no place to push to; expected {EXAMPLE}")
    if repo.startswith(("datasets/", "spaces/")):
        raise ConfigError(
            f"{target!r} is a repository for {repo.partition('/')[0]}; a model needs one for "
            f"models: {EXAMPLE}"
        )
    if repo.count("/") != 1:
        raise ConfigError(
            f"{target!r} does not name one owner and one name; expected {EXAMPLE}. The owner is "
            "your account or your organisation, see `hf auth whoami`"
        )
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"{target!r} is no repository of the hub: {error}") from None
    return repo


def check_access(repo: str, private: bool) -> None:
    """Ask the hub about a repository, before anything large is moved.

    Raises:
        ConfigError: there is no token, the hub refuses it, or a private repository is asked for
            and this one is public.
        StoreUnavailable: the hub does not answer.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        raise ConfigError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it to push.")
    if get_token() is None:
        raise ConfigError(
            f"There is no token of the hub at {constants.ENDPOINT}; log in with `hf auth login`, "
            "or set HF_TOKEN to one with the right to write."
        )
    with _explained(repo):
        try:
            found = ask_hub(lambda hub: hub.model_info(repo, timeout=HUB_SECONDS))
        except RepositoryNotFoundError as error:
            if error.response.status_code == 401:  # the hub's answer to a wrong token, too
                raise
            return
    if private and not found.private:
        raise ConfigError(
            f"{repo} exists and is public, but --private was given; make it private in its "
            "settings on the hub first, or name another repository."
        )


def push(folder: Path, repo: str, message: str, *, private: bool, branch: str | None) -> Pushed:
    """Upload a folder as one commit. Files that the repository has are not uploaded again.

    Args:
        private: of a new repository; False: as its owner's default is.
        branch: made if it does not exist; None: the default one.

    Raises:
        ConfigError: the hub refuses; the text says why.
        ModelError: the hub refuses the files.
        StoreUnavailable: the hub does not answer, or stopped answering.
    """
    from huggingface_hub import HfApi

    logging.getLogger("huggingface_hub").setLevel(
        logging.ERROR
    )  # what it says about an empty commit, the command says too
    hub = HfApi()
    with _explained(repo):
        ask_hub(lambda hub: hub.create_repo(repo, private=private or None, exist_ok=True))
        if branch is not None:
            ask_hub(lambda hub: hub.create_branch(repo, branch=branch, exist_ok=True))
        before = ask_hub(lambda hub: hub.model_info(repo, revision=branch, timeout=HUB_SECONDS))
        commit = hub.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message=message,
            revision=branch,
            delete_patterns=REPLACED,
        )
    return Pushed(
        f"{hub.endpoint}/{repo}", commit.oid, commit.oid != before.sha, bool(before.private)
    )


@contextlib.contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turn the client's exceptions into errors with advice."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except RLHFError:
        raise
    except HfHubHTTPError as error:
        raise _refusal(repo, error) from error
    except ValueError as error:  # of the model card's header, or of a file
        raise ModelError(f"The hub takes no such files: {_line(error)}") from error
    except Exception as error:  # whatever the HTTP library of the day raises
        inner = error.__cause__
        if isinstance(inner, HfHubHTTPError):  # of one file's upload
            raise _refusal(repo, inner) from error
        cause = inner or error
        raise StoreUnavailable(
            f"The push to {repo} stopped ({type(cause).__name__}: {_line(cause)}). The repository "
            "is as it was; the same command tries again, and skips what is uploaded."
        ) from error


def _refusal(repo: str, error: HfHubHTTPError) -> RLHFError:
    said = _line(error.server_message or error)
    status = error.response.status_code
    if status == 401:
        return ConfigError(
            f"The hub does not accept the token (401: {said}); log in again with `hf auth login`, "
            "or correct HF_TOKEN."
        )
    if status == 403:
        return ConfigError(
            f"The token may not write to {repo} (403: {said}); it needs the right to write, and "
            "its account must be the owner or a member of the organisation."
        )
    if status >= 500 or status == 429:
        return StoreUnavailable(f"The hub cannot take {repo} now ({status}: {said}); try again.")
    return ConfigError(f"The hub refuses the push to {repo} ({status}: {said}).")


def _line(text: object) -> str:
    return redact(" ".join(str(text).split()))[:300]
