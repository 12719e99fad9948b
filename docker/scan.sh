#!/usr/bin/env bash
# What is known against the packages in our images: docker/scan.sh IMAGE…   (`make docker-scan`)
# Debian's pending updates (apt), Debian's security tracker (debsecan), Python's advisories (pip-audit, strict: a package that
# cannot be looked up is a failure). Exit status 1: something is pending or known, or a database could not be reached.
set -uo pipefail
audit=${AUDIT:-build/audit}
failures=0

told() { # what it is, then its output; the exit status before decides: 1 is what is known or pending, others that nobody could tell
  local status=$?
  case $status in
    0) echo "$1: well" ;;
    1) echo "$1: FAULTS" ;;
    *) echo "$1: NOT LOOKED UP" ;;
  esac
  [ $status = 0 ] || failures=$((failures + 1))
  [ -z "$2" ] || sed 's/^/    /' <<<"$2" | tail -n "${LINES_OF_EACH:-12}"
}

inside() { docker run --rm --user=0 --network=host --entrypoint=sh "$1" -c "$2" 2>&1; }

[ -x "$audit/bin/pip-audit" ] || { python3 -m venv "$audit" && "$audit/bin/pip" install -q pip-audit; } || exit 2
for image in "$@"; do
  echo "== $image"
  out=$(inside "$image" 'apt-get update -q --error-on=any >/dev/null || exit 2
    planned=$(apt-get -s upgrade) || exit 2; pending=$(echo "$planned" | grep ^Inst); echo "$pending"; test -z "$pending"')
  told "Debian's pending updates" "$out"
  out=$(inside "$image" '(apt-get update -q && apt-get install -qy --no-install-recommends debsecan) >/dev/null 2>&1
    open=$(debsecan --suite bookworm --only-fixed --format packages) || exit 2; echo "$open"; test -z "$open"')
  told "Debian's security tracker, what has a fix" "$out"
  list=$(mktemp)
  if ! inside "$image" 'test -d /opt/headrace || exit 0; python3 -c "
from importlib.metadata import distributions
print(*sorted({d.name + \"==\" + d.version for d in distributions() if d.name != \"headrace\"}), sep=chr(10))"' >"$list"; then
    out=$(cat "$list"; exit 2)
    told "Python's advisories" "$out"
  elif [ -s "$list" ]; then
    out=$("$audit/bin/pip-audit" --strict --no-deps --disable-pip --progress-spinner=off -r "$list" 2>&1) ||
      if grep -q '^Found [0-9]' <<<"$out"; then (exit 1); else (exit 2); fi
    told "Python's advisories" "$out"
  fi
  rm "$list"
done
exit $((failures > 0))
