#!/usr/bin/env bash
# Make VENV with everything that the project and its tests need. Called by `make install`; usage: install.sh PYTHON VENV
set -euo pipefail
python=$1
venv=$2

if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'; then
  echo "odonata needs Python 3.11 or 3.12 and found $("$python" --version); install one, or say make PYTHON=/path/to/python3.11" >&2
  exit 2
fi
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
  echo "$python cannot make virtual environments; on Debian: apt-get install python3-venv" >&2
  exit 2
fi

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

# torch first and pinned: a package that merely asks for torch would otherwise bring the newest one.
pip install --quiet --constraint constraints.txt torch
pip install --quiet --constraint constraints.txt --editable '.[test,dev]'
echo "installed into $venv"
