"""`python -m distill` is the `d2m` command."""

from distill.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
