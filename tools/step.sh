#!/usr/bin/env bash
# step.sh NAME COMMAND...: runs the command; where it fails, says which step it was.
name=$1
shift
echo "== $name"
"$@"
status=$?
if [ $status -ne 0 ]; then
  echo "== FAILED: $name (exit status $status): $*" >&2
fi
exit $status
