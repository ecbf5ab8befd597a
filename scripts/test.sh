#!/bin/bash
# Runs every check and test, and ends with `N passed, N failed, N skipped`. `make test` calls it.
#
# The steps go on after a failure, so that one run tells everything. The exit code is 1 when anything failed.
set -uo pipefail
cd "$(dirname "$0")/.."
say() { scripts/say.sh "$@"; }
passed=0 failed=0 skipped=0
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT

# step NAME COMMAND...: one check that passes or fails.
step() {
  local name=$1
  shift
  say "$name"
  if "$@"; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "FAILED: $name" >&2; fi
}

# count FILE: adds the numbers of cargo's and the suites' closing lines.
count() {
  local sums
  sums=$(awk '
    /^test result:/ { for (i = 2; i <= NF; i++) { if ($i ~ /^passed/) p += $(i-1); if ($i ~ /^failed/) f += $(i-1)
                                                  if ($i ~ /^ignored/) s += $(i-1) } }
    /^[0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$/ { p += $1; f += $3; s += $5 }
    /SKIPPED: / && !/^(oci|docker|podman|containerd|cri|crash|validation) / { s += 1 }
    END { print p + 0, f + 0, s + 0 }' "$1")
  read -r p f s <<<"$sums"
  passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
}

# tests NAME COMMAND...: a command that prints such closing lines. One that fails without counting is a failure.
tests() {
  local name=$1 before=$failed status
  shift
  say "$name"
  "$@" 2>&1 | tee "$logs/log"
  status=${PIPESTATUS[0]}
  count "$logs/log"
  if [ "$status" != 0 ] && [ "$failed" = "$before" ]; then
    failed=$((failed + 1))
    echo "FAILED: $name ended with status $status" >&2
  fi
}

step "cargo fmt --check" cargo fmt --all --check
step "cargo clippy" cargo clippy --locked --workspace --all-targets -q -- -D warnings
step "building host, guest and image" make --no-print-directory build image
# After the image, which some of them boot.
tests "unit tests" cargo test --locked --workspace -q --no-fail-fast
if [ -x build/bin/kata-runtime ] && [ -e build/share/kata-containers/manifest.json ]; then
  # On ours alone: runc, the measure, is for `make suites` and `make validate`.
  tests "black-box suites" make --no-print-directory suites RUNTIMES=kata-runtime
else
  skipped=$((skipped + 1))
  echo "SKIPPED: the black-box suites need a runtime and a guest image that build"
fi

echo
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ] && [ "$passed" -gt 0 ]
