import sys

from med3dvlm.data.command import run_command
from med3dvlm.demo import run

sys.exit(run_command(run))
