"""A finished folder on the Hugging Face Hub: checked before any work, uploaded after all of it."""

import shlex
from pathlib import Path
from typing import Any

from fusion_upcycle.errors import UpcyclingError, setting


def check_upload(repository: Any) -> None:
    """Refuse, before hours of work, a repository that cannot be uploaded to.

    Args:
        repository: `ORG/NAME`; None is no upload.

    Raises:
        UpcyclingError: a name that is none, no token on this machine, or one that the Hub does not
            know.
    """
    if repository is None:
        return
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise _no_name(repository) from error
    if repository.count("/") != 1:
        raise _no_name(repository)
    if get_token() is None:
        raise UpcyclingError(
            f"{setting('push_to_hub', repository)}: there is no token of the Hugging Face Hub on "
            "this machine. Run `hf auth login`, or set HF_TOKEN; or leave push_to_hub out."
        )
    try:
        HfApi().whoami()
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise UpcyclingError(
            f"{setting('push_to_hub', repository)}: the Hugging Face Hub does not take the token "
            f"of this machine, or cannot be reached: {_short(error)}. Run `hf auth login`; or "
            "leave push_to_hub out and upload the folder later (hf upload)."
        ) from error


def upload(folder: Path, repository: str) -> str:
    """Upload a finished folder; a repository that is not there is made, private.

    Returns:
        The address.

    Raises:
        UpcyclingError: it failed; the folder is as it was, and how to go on is said.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=f"Upload {folder.name}, made with fusion_upcycle",
        )
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        again = f"hf upload --private {repository} {shlex.quote(str(folder))} ."
        raise UpcyclingError(
            f"{folder} is complete, and was not uploaded to {repository}: {_short(error)}. To go "
            f"on from there: {again}"
        ) from error
    return str(address)


def _no_name(repository: Any) -> UpcyclingError:
    return UpcyclingError(
        f"push_to_hub={repository!r} is not the name of a repository. Give it as ORG/NAME, as in "
        f"{setting('push_to_hub', 'my-name/my-moe')}."
    )


def _short(error: Exception) -> str:
    said = str(error).strip() or type(error).__name__
    return " ".join(said.split())[:200].rstrip(".")
