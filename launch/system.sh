#!/bin/sh
# What the tests use of the operating system, beside Python: installed where we may, named where we may not.
#
#   launch/system.sh        seconds when nothing is missing; never fails, since the tests skip what is not there
#
# Only in a container: on a machine with a running systemd an installed server would be started as a service, and that is
# for its owner to decide.

set -u

# command that shows it is there : Debian package that brings it
NEEDS="promtool:prometheus prometheus-pushgateway:prometheus-pushgateway etcd:etcd-server chromium:chromium ip:iproute2"

missing=""
for need in $NEEDS; do
    command -v "${need%%:*}" >/dev/null 2>&1 || missing="$missing ${need##*:}"
done
[ -z "$missing" ] && exit 0

say_how() {
    echo "system.sh: $1; some tests will be skipped. To have them: apt-get install -y --no-install-recommends$missing"
    exit 0
}

command -v apt-get >/dev/null 2>&1 || say_how "no apt-get here to install$missing"
[ "$(id -u)" = 0 ] || say_how "only root can install$missing"
[ -d /run/systemd/system ] && say_how "not installing$missing, whose services would start on this machine"

echo "system.sh: installing$missing"
export DEBIAN_FRONTEND=noninteractive
options="-qq -o Acquire::Retries=1 -o Acquire::http::Timeout=20 -o Acquire::https::Timeout=20 -o DPkg::Lock::Timeout=120"
# shellcheck disable=SC2086  # options and package names are words
install() { apt-get $options install -y --no-install-recommends $missing >/dev/null 2>&1; }
# shellcheck disable=SC2086
install || { apt-get $options update >/dev/null 2>&1 && install; } || say_how "apt-get could not install$missing"
