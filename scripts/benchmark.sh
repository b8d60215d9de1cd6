#!/bin/sh
# Times our fast paths against the plain formulations, both in one run, and prints the ratios.
#   sh scripts/benchmark.sh data       preparing and loading volumes
#   sh scripts/benchmark.sh encoder    DCFormer, inference and training
#   sh scripts/benchmark.sh infer      from a file to image tokens, step by step
# Flags are passed on; `sh scripts/benchmark.sh data --help` lists them. Let nothing else run meanwhile.
set -eu
. "$(dirname -- "$0")/lib/env.sh"

subject=${1:-}
case $subject in
data | encoder | infer) shift ;;
-h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 0 ;;
*) die "what is to be timed? sh scripts/benchmark.sh data|encoder|infer [flags]" ;;
esac
run "med3dvlm.benchmark.$subject" "$@"
