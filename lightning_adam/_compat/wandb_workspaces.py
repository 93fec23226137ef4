"""Private names of wandb-workspaces, as of 0.4.13, and of wandb 0.31.0, which it requires.

wandb raises `WandbApiFailedError`, which is not a `wandb.Error`, if the server rejects a request.
Older versions, which AdamMonitor supports, do not have it.
"""

import wandb_workspaces.workspaces as ws
from wandb.sdk.lib.service.service_connection import WandbApiFailedError as WandbApiFailedError


def spec_of(workspace: ws.Workspace) -> str:
    """Returns the spec of a workspace as JSON."""
    spec: str = workspace._to_model().spec.model_dump_json(by_alias=True, exclude_none=True)
    return spec


def set_address(workspace: ws.Workspace, address: str) -> None:
    """Sets the end of the workspace's address, after `nw=`. It is random otherwise."""
    workspace._internal_name = f"nw-{address}-v"


def saved_workspace(entity: str, project: str, address: str) -> ws.Workspace | None:
    """Returns the saved workspace at an address; None if there is none.

    Raises:
        ValueError: If the project does not exist.
    """
    try:
        # Only the path and the query are used.
        return ws.Workspace.from_url(f"https://wandb.ai/{entity}/{project}?nw={address}")
    except ValueError as error:
        if str(error).startswith("Workspace"):
            return None
        raise
