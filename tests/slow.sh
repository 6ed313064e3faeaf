# The slow suite in two halves side by side: most of it starts commands, and most of a command is imports on one core.
# usage: slow.sh PYTHON
set -u
run=("$1" -m pytest -q -p no:cacheprovider -m slow)
log=$(mktemp)
echo "${run[*]}: tests/test_end_to_end.py, and beside it the others"
# In a process group of its own, for else it would ignore Ctrl-C as what a script has in the background does, and hand that on.
set -m
"${run[@]}" tests/test_end_to_end.py >"$log" 2>&1 &
first=$!
set +m
trap 'kill -INT -- -$first 2>/dev/null' INT TERM
"${run[@]}" --ignore=tests/test_end_to_end.py
status=$?
wait $first || status=$?
cat "$log"
rm -f "$log"
exit $status
