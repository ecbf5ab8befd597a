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
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.kata.options]
      BinaryName = "$1"
  ctr run --rm --runc-binary $1 IMAGE NAME uname -r

Check this host first: $1 check
END
