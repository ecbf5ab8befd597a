#!/bin/bash
# Installs kata-containers on a Kubernetes node, registers it with the node's container runtime, and takes it away again.
#
# Usage: install.sh install|uninstall [--host DIR] [--from DIR] [--no-restart]
#
# --host: the node's root [/]. --from: where bin/ and share/ are [this script's directory].
# Works again and again: what is there is replaced, what is not there is no error. A containerd configuration gets one
# marked block at its end, which is all that `uninstall` removes of it.
set -euo pipefail

begin='# BEGIN kata-containers: made by install.sh, removed by its uninstall'
end='# END kata-containers'
host='' from=$(cd "$(dirname "$0")" && pwd) restart=yes

die() { echo "install.sh: $*" >&2; exit 1; }

action=${1:-}
[ $# -gt 0 ] && shift
while [ $# -gt 0 ]; do
  case $1 in
    --host) host=${2:?--host needs a directory}; host=${host%/}; shift 2 ;;
    --from) from=${2:?--from needs a directory}; shift 2 ;;
    --no-restart) restart=no; shift ;;
    *) die "no such option: $1" ;;
  esac
done

bin=$host/usr/local/bin share=$host/usr/share/kata-containers
containerd=$host/etc/containerd/config.toml
crio=$host/etc/crio/crio.conf.d/99-kata-containers.conf

# Rewrites a file at once, or not at all.
replace() { cat >"$1.kata-new" && chmod 0644 "$1.kata-new" && mv "$1.kata-new" "$1"; }

without_block() { sed "/^$begin\$/,/^$end\$/d" "$1"; }

register_containerd() {
  [ -d "$(dirname "$containerd")" ] || return 0
  [ -e "$containerd" ] || printf 'version = 2\n' >"$containerd"
  local plugin=io.containerd.grpc.v1.cri version
  version=$(sed -n 's/^ *version *= *\([0-9]*\).*/\1/p' "$containerd" | head -1)
  case $version in
    2) ;;
    3) plugin=io.containerd.cri.v1.runtime ;;
    *) die "$containerd is of version ${version:-1}; make it version 2 or 3 (containerd config migrate)" ;;
  esac
  { without_block "$containerd"
    printf '%s\n' "$begin" \
      "[plugins.'$plugin'.containerd.runtimes.kata]" \
      "  runtime_type = 'io.containerd.kata.v2'" \
      "  privileged_without_host_devices = true" \
      "  pod_annotations = ['io.katacontainers.*']" "$end"; } | replace "$containerd"
}

# By its OCI command line, where port-forward works; CRI-O's `vm` type has none.
register_crio() {
  [ -d "$host/etc/crio" ] || return 0
  mkdir -p "$(dirname "$crio")"
  printf '%s\n' '[crio.runtime.runtimes.kata]' 'runtime_path = "/usr/local/bin/kata-runtime"' \
    'runtime_type = "oci"' 'runtime_root = "/run/kata-containers"' 'privileged_without_host_devices = true' |
    replace "$crio"
}

restart_runtimes() {
  [ $restart = yes ] || return 0
  for service in containerd crio; do
    if nsenter --target 1 --mount systemctl is-active --quiet $service; then
      nsenter --target 1 --mount systemctl restart $service
    fi
  done
}

# Tells the scheduler, by the API server, where RuntimeClass `kata` can run.
label() {
  [ -n "${KUBERNETES_SERVICE_HOST:-}" ] && [ -n "${NODE_NAME:-}" ] || return 0
  local account=/var/run/secrets/kubernetes.io/serviceaccount
  curl --silent --show-error --fail --max-time 30 --output /dev/null --request PATCH \
    --cacert $account/ca.crt --header "Authorization: Bearer $(cat $account/token)" \
    --header 'Content-Type: application/merge-patch+json' \
    --data "{\"metadata\":{\"labels\":{\"katacontainers.io/kata-runtime\":$1}}}" \
    "https://$KUBERNETES_SERVICE_HOST:$KUBERNETES_SERVICE_PORT/api/v1/nodes/$NODE_NAME"
}

case $action in
  install)
    [ -x "$from/bin/kata" ] || die "there is no program $from/bin/kata"
    mkdir -p "$bin" "$share"
    # A new file, not new bytes in one that runs.
    cp "$from/bin/kata" "$bin/kata.new" && chmod 0755 "$bin/kata.new" && mv "$bin/kata.new" "$bin/kata"
    for name in kata-runtime containerd-shim-kata-v2; do ln -sfn kata "$bin/$name"; done
    cp "$from"/share/kata-containers/* "$share/"
    register_containerd
    register_crio
    restart_runtimes
    label '"true"'
    ;;
  uninstall)
    label null
    if [ -e "$containerd" ] && grep -qxF "$begin" "$containerd"; then
      without_block "$containerd" | replace "$containerd"
    fi
    rm -f "$crio"
    restart_runtimes
    rm -f "$bin/kata" "$bin/kata-runtime" "$bin/containerd-shim-kata-v2"
    rm -rf "$share"
    ;;
  *) die "say install or uninstall" ;;
esac
