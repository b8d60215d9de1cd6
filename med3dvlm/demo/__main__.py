import sys

from med3dvlm.demo import run

sys.exit(run())
