#!/bin/sh
# Print the Python to make .venv with: python3 if it is new enough, else the newest that is.
# It must be able to make a virtual environment; on Debian and Ubuntu that is a package of its own.
set -eu

without_venv=""
too_old=""
for name in "${PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11; do
    version=$("$name" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
    if ! "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        too_old="$too_old $name ($version)"
    elif ! "$name" -c 'import ensurepip, venv' 2>/dev/null; then
        without_venv="${without_venv:-$version}"
    else
        command -v "$name"
        exit 0
    fi
done

if [ -n "$without_venv" ]; then
    echo "error: Python $without_venv can not make virtual environments here." >&2
    echo "       Install that part:  apt install python3-venv  (or python$without_venv-venv)" >&2
else
    echo "error: hotswap needs Python 3.11 or newer; found:${too_old:- none}." >&2
    echo "       Install one:  apt install python3 python3-venv" >&2
    echo "       or name one:  make PYTHON=/path/to/python3.12 ..." >&2
fi
exit 1
