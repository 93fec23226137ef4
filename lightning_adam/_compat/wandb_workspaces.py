"""Private names of wandb-workspaces, seen in 0.4.13, and of the wandb 0.31.0 that it asks for.

`WandbApiFailedError` is raised where the server refuses a request, and is no `wandb.Error`. It
stands here because the wandb that training needs may be older than it.
"""

import wandb_workspaces.workspaces as ws
from wandb.sdk.lib.service.service_connection import WandbApiFailedError as WandbApiFailedError


def spec_of(workspace: ws.Workspace) -> str:
    """What a workspace is saved as, as JSON."""
    spec: str = workspace._to_model().spec.model_dump_json(by_alias=True, exclude_none=True)
    return spec


def give_address(workspace: ws.Workspace, address: str) -> None:
    """Sets what stands in the workspace's address, behind `nw=`, instead of a random name."""
    workspace._internal_name = f"nw-{address}-v"


def saved_workspace(entity: str, project: str, address: str) -> ws.Workspace | None:
    """The workspace that was saved there, None if there is none.

    Raises:
        ValueError: If there is no such project.
    """
    try:
        # Of the address only the path and the query are read.
        return ws.Workspace.from_url(f"https://wandb.ai/{entity}/{project}?nw={address}")
    except ValueError as error:
        if str(error).startswith("Workspace"):
            return None
        raise
