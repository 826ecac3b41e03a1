#!/usr/bin/env bash
# The acceptance on a GPU, in under 10 minutes: the checks of tests/gpu, then the measurements, one line each.
#
#   benchmarks/gpu.sh [FOLDER]     # FOLDER/CLASS/IMAGE: JPEG files to read; without it some are made
#
# Flags and what it writes: benchmarks/gpu.py --help
exec "${PYTHON:-python}" "$(dirname "$(realpath "$0")")/gpu.py" "$@"
