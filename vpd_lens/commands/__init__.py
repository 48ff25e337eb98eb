"""Parts of the command line; `vpd_lens.cli` puts them together."""
