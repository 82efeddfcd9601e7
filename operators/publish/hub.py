"""Pushes a published folder to a data set repository on a Hugging Face hub, as one commit."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from pyarrow import fs

REPOSITORY = r"[\w.-]+/[\w.-]+"
TOKEN_VARIABLE = "HF_TOKEN"  # noqa: S105 - the name of the variable that holds it


def push_folder(filesystem: fs.FileSystem, folder: str, repository: str, *, private: bool) -> str:
    """Copy the folder into the repository, created if need be; deletes its old data files and keeps its other files.

    The client's own setting (HF_ENDPOINT) gives the hub's address.

    Args:
        filesystem: of the folder; files that are not on this machine are copied to it first.
        folder: path within the file system.
        repository: owner/name.
        private: whether a repository that this creates is private.

    Returns:
        Address of the commit.

    Raises:
        ValueError: the environment has no token, or the hub refuses; the message says which and has no token in it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    token = os.environ.get(TOKEN_VARIABLE)
    if not token:
        raise ValueError(
            f"publish.hub_repo: cannot push to {repository}: the environment has no {TOKEN_VARIABLE}; "
            "set it to a token that may write, or clear publish.hub_repo"
        )
    api = HfApi(token=token)
    with TemporaryDirectory() as copy:
        local = folder
        if not isinstance(filesystem, fs.LocalFileSystem):
            local = copy
            fs.copy_files(folder, copy, source_filesystem=filesystem, destination_filesystem=fs.LocalFileSystem())
        try:
            api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repository,
                repo_type="dataset",
                folder_path=local,
                delete_patterns=["parquet/*", "alpaca/*", "messages/*"],
                commit_message=f"recycle-and-train: {Path(folder).name}",
            )
        except HfHubHTTPError as error:
            raise ValueError(f"publish.hub_repo: {repository} at {api.endpoint}: {error}") from None
    return str(commit.commit_url)
