"""`python -m fusion_upcycle`."""

from fusion_upcycle.cli import main

if __name__ == "__main__":
    main()
