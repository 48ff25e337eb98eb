"""Self-contained pages to look at what was found."""
