"""The sources of the site, and what renders the rest of it from the package."""
