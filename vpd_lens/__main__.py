"""`python -m vpd_lens` is `vpd-lens`, so that launchers can start it on many processes."""

from vpd_lens.cli import main

if __name__ == "__main__":
    main()
