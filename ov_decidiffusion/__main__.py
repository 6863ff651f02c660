"""``python -m ov_decidiffusion``: the command line of ``cli/main.py``."""

from ov_decidiffusion.cli.main import main

if __name__ == "__main__":
    main()
