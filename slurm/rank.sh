# One rank of an attempt. `srun` runs this text on every node, in the container if there is one:
#
#   bash -c TEXT rank PYTHON RUN_DIR ATTEMPT_DIR
#
# shellcheck shell=bash
python=$1 run_dir=$2 attempt_dir=$3
exec >>"$attempt_dir/rank-$SLURM_PROCID.log" 2>&1

# A rank ignores requests to stop until it can keep one for its training loop, which takes a second
# or, on a busy file system, minutes: so they are repeated for as long as it runs.
asked=
trap 'asked=1' USR2 TERM
(
  trap '' USR2 TERM
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
  exec "$python" -P -m launch.rank "$run_dir"
) &
rank=$!
while kill -0 "$rank" 2>/dev/null; do
  if [[ $asked ]]; then kill -USR2 "$rank" 2>/dev/null; fi
  sleep 1
done
wait "$rank" && code=0 || code=$?
if ((code)); then echo "$code" >"$attempt_dir/rank-$SLURM_PROCID.exit"; fi

# Of all exit codes srun returns the highest: that must be the one that forbids another start.
case $code in
  2) exit 252 ;;
  65) exit 251 ;;
  75) exit 0 ;;
  *) exit "$code" ;;
esac
