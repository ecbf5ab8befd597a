#!/bin/bash
# Says how to register the installed runtime with Docker, podman and containerd. Usage: registration.sh RUNTIME
cat <<END

Installed: $1

Docker, in /etc/docker/daemon.json, then restart dockerd:
  { "runtimes": { "kata-runtime": { "path": "$1" } } }
  docker run --rm --runtime kata-runtime IMAGE uname -r

podman, in /etc/containers/containers.conf:
  [engine.runtimes]
  kata = ["$1"]
  podman --runtime kata run --rm IMAGE uname -r

containerd, in /etc/containerd/config.toml, then restart containerd:
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.kata]
    runtime_type = "io.containerd.kata.v2"
  ctr run --rm --runtime io.containerd.kata.v2 IMAGE NAME uname -r
  (containerd must have the directory of $1 in its PATH)

Check this host first: $1 check
END
