#!/usr/bin/env bash
# Serves the demo model with two DP ranks on this machine's CPU. Ctrl-C ends it and leaves nothing behind.
#
#   scripts/demo.sh [CONFIG]         CONFIG defaults to configs/demo-cpu.yaml
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
config=${1:-configs/demo-cpu.yaml}
port=8000 dashboard=8265

[[ -f $config ]] || fail "no configuration file $config" "name one of: $(echo configs/*.yaml)"
prepare_environment demo 6

echo "==> demo model"
.venv/bin/python scripts/build_demo_model.py models/demo

# Ports of HTTP, the dashboard, and the ones HAProxy needs (statistics, metrics, fallback).
.venv/bin/python - "$port" "$dashboard" 8404 9101 8500 <<'PY' || exit 1
import socket, sys
for port in map(int, sys.argv[1:]):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            sys.exit(f"error: port {port} is taken ({error.strerror})\n"
                     f"fix:   end what listens there (`ss -ltnp 'sport = :{port}'` names it) and run again")
PY

# HAProxy with the throughput-optimised loop costs a tenth of the CPU per token of Serve's default proxy.
export RAY_SERVE_ENABLE_HA_PROXY=1 RAY_SERVE_THROUGHPUT_OPTIMIZED=1
# Serve's controller looks at everything ten times a second by itself, which takes 4 % of a core.
export RAY_SERVE_CONTROL_LOOP_INTERVAL_S=${RAY_SERVE_CONTROL_LOOP_INTERVAL_S:-0.5}
# Else ranks that serve have nice 15, and a worker that Ray starts takes their cores at 0.
export RAY_worker_niceness=0
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-disabled} RAY_USAGE_STATS_ENABLED=0 RAY_DEDUP_LOGS=0
# Ray's CPUs are logical: room for as many ranks as the demo may be scaled to, whatever the machine has.
export RAY_OVERRIDE_RESOURCES=${RAY_OVERRIDE_RESOURCES:-'{"CPU": 4}'}
mkdir -p build
log=build/demo.log
started=$(date +%s)
echo "==> serve run $config (log: $log)"
# A session of its own, so that Ctrl-C reaches this script first and all that it starts can be found again.
.venv/bin/python -c 'import os, sys; os.setsid(); os.execv(sys.argv[1], sys.argv[1:])' \
  .venv/bin/serve run --address local "$config" >"$log" 2>&1 &
server=$!

finish() {
  trap - EXIT INT TERM
  # Whoever read our output may be gone: that must not keep us from ending what we started.
  trap '' PIPE
  set +e
  if kill -0 "$server" 2>/dev/null; then
    echo; echo "==> stopping"
    # TERM ends the whole local cluster; INT would first wait half a minute for the front-ends to drain.
    kill -TERM "$server" 2>/dev/null || true
    for _ in $(seq 40); do kill -0 "$server" 2>/dev/null || break; sleep 0.25; done
  fi
  # Whatever of Ray is left stands in the session that setsid made.
  pkill -TERM -s "$server" 2>/dev/null || true
  for _ in $(seq 20); do pgrep -s "$server" >/dev/null || break; sleep 0.25; done
  pkill -KILL -s "$server" 2>/dev/null || true
  echo "==> nothing left running"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

last=
until curl -fs "http://127.0.0.1:$port/health" >/dev/null 2>&1; do
  if ! kill -0 "$server" 2>/dev/null; then
    tail -n 25 "$log"
    fail "serve run ended (the end of its log is above)" "see $log"
  fi
  if state=$(.venv/bin/python scripts/application_state.py "http://127.0.0.1:$dashboard"); then
    :
  elif [[ $state == *DEPLOY_FAILED* ]]; then
    echo "$state"
    fail "the application could not be deployed (the reason is above)" "see $log"
  fi
  line=$(grep -aoE 'INFO manager: .*' "$log" | tail -n 1 | cut -d' ' -f3- || true)
  [[ $line == "$last" ]] || { last=$line; echo "    $line"; }
  sleep 1
done

cat <<TEXT
==> ready after $(($(date +%s) - started)) s

  API        http://127.0.0.1:$port/v1
  dashboard  http://127.0.0.1:$dashboard

  curl http://127.0.0.1:$port/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "demo", "temperature": 0, "max_tokens": 64, "messages": [{"role": "user", "content": "What is the capital of France?"}]}'

  .venv/bin/accordion scale 3 --url http://127.0.0.1:$port    # and back, while it answers

Ctrl-C stops it.
TEXT
wait "$server"
