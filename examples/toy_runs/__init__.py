"""Toys with known mechanisms: their presets, what a decomposition of one is measured by, a page."""
