#!/usr/bin/env bash
# Set the package up and run a short test with every Python from 3.10 to 3.13 that is found: on the PATH, by uv, by pyenv.
set -u
cd "$(dirname "$0")/../.."
uv=$1
failed=0
for version in 3.10 3.11 3.12 3.13; do
  python=
  for candidate in "$(command -v "python$version")" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version".*/bin/python \
    "$("$uv" python find --no-python-downloads "$version" 2>/dev/null)"; do
    # A shim of pyenv is there for each version, and runs one.
    if [ -n "$candidate" ] && "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" 2>/dev/null; then
      python=$candidate
    fi
  done
  if [ -z "$python" ]; then
    echo "Python $version: not found"
    continue
  fi
  folder=.venv-pythons/$version
  if "$uv" venv --quiet --clear --python "$python" "$folder" &&
    "$uv" pip install --quiet --python "$folder/bin/python" --editable '.[dev]' &&
    "$folder/bin/python" -m pytest tests/integration/test_superposition.py tests/integration/test_llmfoundry.py tests/cli/test_command.py; then
    echo "Python $version: passed"
  else
    echo "Python $version: failed"
    failed=1
  fi
done
exit $failed
