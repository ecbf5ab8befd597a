#!/bin/bash
# Installs Debian packages that are missing. Usage: setup.sh build|guest|test|bench...
#
# build: compile host and guest. guest: make the guest image and run it. test: the suites. bench: `make bench`.
set -euo pipefail

declare -A needs=(
  [build]="build-essential pkg-config libseccomp-dev libcap-ng-dev"
  [guest]="qemu-system-x86 xz-utils zstd iproute2"
  [test]="busybox-static podman docker.io containerd containernetworking-plugins runc iptables iproute2 util-linux procps curl jq socat"
  [bench]="busybox-static docker.io containerd runc iptables iproute2 fio iperf3 nginx-light redis-server redis-tools apache2-utils runsc"
)

die() { echo "setup: $*" >&2; exit 1; }

[ $# -gt 0 ] || die "name one of: ${!needs[*]}"
command -v cargo >/dev/null || die "cargo is not in PATH: install Rust 1.95 or later (rustup.rs), then run this again"

missing=()
for set in "$@"; do
  [ -n "${needs[$set]:-}" ] || die "no such set \`$set\`; there is: ${!needs[*]}"
  for package in ${needs[$set]}; do
    status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$status" = installed ] || [[ " ${missing[*]:-} " == *" $package "* ]] || missing+=("$package")
  done
done

[ "$(id -u)" = 0 ] || die "run this as root (a virtual machine's network, mounts and cgroups need it), for example: sudo -E make demo"
if [[ " $* " == *" guest "* ]] && ! apt-cache show linux-image-cloud-amd64 >/dev/null 2>&1; then
  # The guest's kernel comes from its package, which apt must know of.
  "$(dirname "$0")/say.sh" "refreshing the package lists"
  apt-get update -qq || die "apt-get update failed"
fi
[ ${#missing[@]} -gt 0 ] || exit 0
command -v apt-get >/dev/null || die "this is not Debian; install these with your package tool: ${missing[*]}"

export DEBIAN_FRONTEND=noninteractive
install() {
  # Nothing that is installed may start a daemon here: the tests start their own.
  apt-get install -y -qq --no-install-recommends -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=120 "${missing[@]}" </dev/null
}
"$(dirname "$0")/say.sh" "installing ${missing[*]}"
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
  printf '#!/bin/sh\nexit 101\n' >$policy
  chmod 0755 $policy
  trap 'rm -f /usr/sbin/policy-rc.d' EXIT
fi
log=$(mktemp)
if ! install >"$log" 2>&1; then
  "$(dirname "$0")/say.sh" "refreshing the package lists"
  apt-get update -qq >>"$log" 2>&1 || true
  install >>"$log" 2>&1 || { tail -20 "$log" >&2; die "apt-get could not install ${missing[*]}; the log is $log"; }
fi
rm -f "$log"
