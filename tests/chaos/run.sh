#!/bin/sh
# ckpt-chaos over the shared tier in a directory: the daemon is killed at its file events (before, torn, SIGTERM then a kill,
# everything unsynced lost), all memory is emptied, and what is resumed is judged. Then the same with a planted bug,
# which must be found. Needs ckpt-chaos (PyPI). POINTS: crash points, shared out among the four modes.
set -eu
cd "$(dirname "$0")/../.."
points=${POINTS:-40}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chaos() {
    ckpt-chaos run --modes "$1" --max-points "$2" --jobs "${JOBS:-2}" --timeout 180 --grace 8 \
        --step-regex 'resumed from step (\d+)' --result-cmd 'python tests/chaos/job.py --result {out}' \
        --fail-on HARD_FAIL,SILENT_DIVERGENCE,LOST_WORK,CONTROL_FAIL --work "$work/$3" -- python tests/chaos/job.py '{out}'
}
chaos before,torn,term,unsynced "$points" right
echo "file events of the run without a fault:"
sort -n "$work/right/reference/events.log.rank0" | awk -F '\t' '{print "  " $1 "  " $2 "  " $3}'
events=$(wc -l < "$work/right/reference/events.log.rank0")
test "$events" -ge 10 || { echo "only $events file events were seen"; exit 1; }
echo "the planted bug (commit records before packs):"
if SNAPD_CHAOS_BUG=1 chaos before 16 wrong > "$work/wrong.txt" 2>&1; then
    cat "$work/wrong.txt"; echo "the planted bug was not found"; exit 1
fi
grep HARD_FAIL "$work/wrong.txt"
grep HARD_FAIL "$work/wrong.txt" | grep '^#' | grep -qv Timeout || { echo "only timeouts"; exit 1; }
echo "every point passed; the planted bug gave HARD_FAIL"
