"""Pages in Markdown for each statistic, finding and setting, rendered from the package."""
