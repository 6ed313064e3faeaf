# Runs the slow suite in two halves in parallel: most of its time is imports by the commands it starts, on one core.
# The halves take about the same time.
# usage: slow.sh PYTHON
set -u
run=("$1" -m pytest -q -p no:cacheprovider -m slow)
half=(tests/test_end_to_end.py tests/test_kills.py)
log=$(mktemp)
echo "${run[*]}: ${half[*]}, and the others at the same time"
# In its own process group. A script's background job would ignore Ctrl-C, and so would its children.
set -m
"${run[@]}" "${half[@]}" >"$log" 2>&1 &
first=$!
set +m
trap 'kill -INT -- -$first 2>/dev/null' INT TERM
"${run[@]}" "${half[@]/#/--ignore=}"
status=$?
wait $first || status=$?
cat "$log"
rm -f "$log"
exit $status
