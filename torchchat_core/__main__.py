"""`python -m torchchat_core` is the command `torchchat`."""

from __future__ import annotations

from torchchat_core.cli.main import main

if __name__ == "__main__":
    main()
