#!/bin/sh
# Usage: rollout.sh PROGRAM HOST...
program=$1
shift
for host in "$@"; do
	scp -q "$program" "$host:/usr/local/bin/echod.new" &&
		ssh "$host" 'cd /usr/local/bin && cp -p echod echod.old && mv echod.new echod &&
			{ ./echod.old -control /run/echod -upgrade || { mv echod.old echod; exit 1; }; }' ||
		{ echo "stopped at $host" >&2; exit 1; }
done
