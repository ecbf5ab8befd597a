# Starts the host's Docker in a privileged container, and a container of busybox with it.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mkdir -p /var/run /var/lib
cat >/tmp/containerd.toml <<END
version = 2
root = "/data/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.tracing", "io.containerd.internal.v1.opt"]
[grpc]
address = "/run/containerd.sock"
END
containerd --config /tmp/containerd.toml >/tmp/containerd.log 2>&1 &
for word in $(seq 600); do [ -S /run/containerd.sock ] && break; sleep 0.2; done
dockerd --host unix:///run/docker.sock --containerd /run/containerd.sock --data-root /data/docker \
    --exec-root /run/docker --storage-driver overlay2 >/tmp/dockerd.log 2>&1 &
for word in $(seq 1200); do grep -q 'API listen' /tmp/dockerd.log && break; sleep 0.2; done
export DOCKER_HOST=unix:///run/docker.sock
tar -C / -c bin etc | docker import - inner >/dev/null
docker run --rm inner sh -c 'mount | grep -o "^overlay on / type overlay"; ls /sys/class/net | grep eth; echo from within' ||
    tail /tmp/containerd.log /tmp/dockerd.log >&2
