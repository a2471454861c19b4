"""An export to the Hugging Face hub. The token comes from the environment (HF_TOKEN, or the hub's own login) and goes nowhere else."""

import os
import re
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError

from dstune.errors import Problem, RunFailed, UsageError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def require_token(hub_id: str) -> str:
    """The token to push with. Raises UsageError where there is none, or `hub_id` is no `owner/name`."""
    if not _ID.fullmatch(hub_id):
        raise UsageError(Problem("--push", repr(hub_id), "an id of the hub: owner/name"))
    token = get_token()
    if not token:
        do = "Set HF_TOKEN to a token that may write (https://huggingface.co/settings/tokens), or run `hf auth login`."
        raise UsageError(Problem("--push", "there is no token for the hub in the environment", "HF_TOKEN", do))
    return token


def push(directory: Path, hub_id: str, token: str, *, public: bool = False) -> str:
    """Upload an export as one commit of `hub_id`, made (private unless `public`) where it is not there; the commit's address.

    Raises RunFailed, without the token, where the hub refuses or cannot be reached.
    """
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token, library_name="dstune")
    try:
        api.create_repo(hub_id, private=not public, exist_ok=True)
        commit = api.upload_folder(repo_id=hub_id, folder_path=directory, commit_message=f"Export of {directory.name}")
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        came = f"could not be pushed: {' '.join(str(error).split()).replace(token, '(token)')[:500]}"
        do = f"The export is whole: `hf upload {hub_id} {directory}` tries again."
        raise RunFailed(Problem(hub_id, came, do=do)) from None
    return str(commit.commit_url)
