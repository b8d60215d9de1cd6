"""Our fast paths timed against the plain formulations, in one run: `sh scripts/benchmark.sh data|encoder`."""
