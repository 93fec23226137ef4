"""What is known of statistics, findings and settings, as pages in Markdown.

Nothing here knows of the site's generator but what Markdown it reads.
"""
