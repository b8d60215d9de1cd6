#!/bin/sh
# Runs the tests on a CPU, in a .venv that is made when it is missing. About 6 minutes on 2 cores, 17 without AVX-512.
#   sh scripts/test.sh                  everything but the slow tests
#   sh scripts/test.sh --slow           everything
#   sh scripts/test.sh tests/model -k mixer
# PYTHON=python3.12 sh scripts/test.sh picks the interpreter.
set -eu
. "$(dirname -- "$0")/lib/env.sh"

setup_venv requirements-cpu.txt
cd "$ROOT"
execute "$PY" -m pytest -q "$@"
