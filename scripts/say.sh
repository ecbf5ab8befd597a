#!/bin/bash
# Says what long work begins now, with the time since the first line of this make run.
printf '[%s] %s\n' "$(date +%T)" "$*" >&2
