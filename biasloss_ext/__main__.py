"""``python -m biasloss_ext`` is the command ``biasloss``."""

from biasloss_ext.cli import main

if __name__ == "__main__":
    main()
