#!/usr/bin/env bash
# Make .venv with everything that the project and its tests need; at once when nothing changed.
#
#   launch/install.sh [PYTHON]      by default the first fitting one of python3, python3.12, python3.11; `make install` calls it
#
# No package index is named here: pip's own configuration says where packages come from, so a GPU machine gets torch with CUDA.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
stamp=$venv/installed    # where the venv lies and what it was made from; written last, so a broken-off install starts again
log=$venv/install.log

fail() {
  echo "install: $1" >&2
  exit 2
}

what_it_is_made_from() {
  pwd    # scripts in a venv hold its path
  cat pyproject.toml constraints.txt launch/install.sh
}

# The first of the arguments that is a Python 3.11 or 3.12 and can make virtual environments. A command that is on the path may
# still not run: pyenv puts one there for each version that it knows.
choose_python() {
  local candidate version found=""
  for candidate in "$@"; do
    version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || version="does not run"
    case $version in
      3.11 | 3.12)
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
          echo "$candidate"
          return
        fi
        version="$version without venv; on Debian: apt-get install python$version-venv"
        ;;
    esac
    found="$found${found:+, }$candidate ($version)"
  done
  fail "Odonata needs Python 3.11 or 3.12 with its venv module and found $found; install one, or name one: make install PYTHON=/path/to/python3.11"
}

if [ -f $stamp ] && [ "$(what_it_is_made_from)" = "$(cat $stamp)" ] && [ -x $venv/bin/python ]; then
  exit 0
fi

python=$(choose_python ${1:-python3 python3.12 python3.11})
if [ -f $stamp ] && [ "$(head -n 1 $stamp)" != "$(pwd)" ]; then
  rm -rf $venv
fi
rm -f $stamp
$venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear $venv

echo "install: putting everything into $venv; a minute or two, longer where torch comes with CUDA (pip's own words: $log)"
$venv/bin/python -m pip --disable-pip-version-check install --constraint constraints.txt --editable '.[test,dev]' >$log 2>&1 || {
  tail -n 20 $log >&2
  fail "pip could not install Odonata, see above and $log; when the cause is gone, the same command goes on"
}
what_it_is_made_from >$stamp
echo "install: done"
