"""Where a model keeps each weight matrix, and how to read its input and edit its output."""

from vpd_lens.sites.discovery import find_sites, model_kind, self_check
from vpd_lens.sites.site import InputPoint, Site, SiteHooks

__all__ = ["InputPoint", "Site", "SiteHooks", "find_sites", "model_kind", "self_check"]
