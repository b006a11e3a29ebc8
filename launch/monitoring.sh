#!/bin/bash
# A local Prometheus over a run on this machine, for people without a cluster: it scrapes port 9400, where local rank 0 answers for
# all ranks, and evaluates our recording rules and alerts. Ends with Ctrl-C; what it gathered is kept in .prometheus.

set -eu

port=${PORT:-9090}
command -v prometheus >/dev/null || {
    echo "monitoring.sh: there is no prometheus on the PATH; launch/system.sh says how to get it, or take a binary of prometheus.io" >&2
    exit 2
}
echo "monitoring.sh: http://localhost:$port/graph to ask, /classic/alerts (or /alerts) for alerts; Ctrl-C ends it"
exec prometheus --config.file=monitoring/prometheus.yml --storage.tsdb.path=.prometheus --web.listen-address="127.0.0.1:$port" \
    --log.level=warn
