# Runs the tests of an expression of markers in two halves in parallel: most of their time is imports and waiting, on one
# core. Pytest's output of the second half follows when the first one has ended.
# usage: halves.sh PYTHON EXPRESSION PATH…    the paths of one half, which take about as long as all others together
set -u
run=("$1" -m pytest -q -p no:cacheprovider -m "$2")
shift 2
log=$(mktemp)
echo "pytest, in two processes: $*, and the others at the same time"
# In its own process group. A script's background job would ignore Ctrl-C, and so would its children.
set -m
"${run[@]}" "$@" >"$log" 2>&1 &
first=$!
set +m
trap 'kill -INT -- -$first 2>/dev/null' INT TERM
"${run[@]}" "${@/#/--ignore=}"
status=$?
wait $first || status=$?
cat "$log"
rm -f "$log"
exit $status
