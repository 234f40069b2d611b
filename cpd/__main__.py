"""`python -m cpd` is the command `cpd`."""

from cpd.cli import main

if __name__ == "__main__":
    main()
