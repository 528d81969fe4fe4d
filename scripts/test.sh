#!/usr/bin/env bash
# Runs the tests: makes .venv if absent, installs with [test], calls pytest.
#
#   scripts/test.sh                  the fast suite
#   scripts/test.sh -m slow          the slow tests
#   scripts/test.sh tests/placement  any pytest arguments
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
prepare_environment test 8
exec .venv/bin/python -m pytest "$@"
