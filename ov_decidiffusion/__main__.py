"""``python -m ov_decidiffusion``: the command line of ``cli.py``."""

from ov_decidiffusion.cli import main

if __name__ == "__main__":
    main()
