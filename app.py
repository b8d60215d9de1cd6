"""A local page that shows a scan and answers questions about it: `python app.py --help`. See docs/app.md."""

import sys

from med3dvlm.app.main import main, run

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(run())
