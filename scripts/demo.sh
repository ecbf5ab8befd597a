#!/bin/bash
# Runs `uname -r` in a fresh virtual machine and shows that the kernel is not the host's. Usage: demo.sh RUNTIME
set -euo pipefail
runtime=$1

"$(dirname "$0")/say.sh" "starting a virtual machine: kata-runtime do uname -r"
guest=$("$runtime" do -- uname -r)
host=$(uname -r)
printf '\n  the host runs Linux   %s\n  the guest runs Linux  %s\n\n' "$host" "$guest"
if [ -z "$guest" ] || [ "$guest" = "$host" ]; then
  echo "demo: the command did not run in a kernel of its own" >&2
  exit 1
fi
echo "The command ran in a virtual machine. Next: \`make install\`, then README.md, \"First container\"."
