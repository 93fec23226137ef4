"""What is not worth a warning in a recipe."""

import warnings


def quieten() -> None:
    """No warning of what these recipes mean to do, nor of what Lightning does itself."""
    # The data is in memory: workers would only slow its loading.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.* is deprecated")
