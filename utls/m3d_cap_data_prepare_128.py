"""Prepare M3D-Cap as published: `python utls/m3d_cap_data_prepare_128.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without PYTHONPATH and without installing

from med3dvlm.data.command import run_command  # noqa: E402
from med3dvlm.data.prepare import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_command(main))
