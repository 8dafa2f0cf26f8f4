#!/usr/bin/env bash
# An input on many nodes of a Slurm cluster: each task of the array does one shard, and a second job merges them.
# Adapt the lines #SBATCH, the path of batchgen and the options of generate, then submit both in the folder of the prompts:
#   array=$(sbatch --parsable slurm-array.sh) && sbatch --dependency="afterok:$array" slurm-merge.sh
#
# - A task that is stopped in time (exit code 75) or preempted is queued again, and resumes from its finished chunks.
# - After a failed task, submit both again: tasks that are complete say so in seconds and change nothing.
# - Keep the number of tasks: shards of another number divide the input elsewhere.

#SBATCH --job-name=batchgen
#SBATCH --array=1-8            # as many shards
#SBATCH --cpus-per-task=8      # a worker on each
#SBATCH --mem=8G               # workers share the weights, and each has keys and values of its own
#SBATCH --time=04:00:00        # of one attempt, not of the whole work
#SBATCH --signal=B:USR1@15     # of last resort, see below
#SBATCH --requeue              # after preemption or the loss of a node, too
#SBATCH --open-mode=append     # one log for all attempts of a task
#SBATCH --output=batchgen-%A_%a.log

batchgen=${BATCHGEN:-/opt/batchgen/.venv/bin/batchgen}
task=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID # SLURM_JOB_ID of the last task is that of the whole array
attempts=100 # then a person should have a look: a task that stops every few minutes gets nowhere

# batchgen reads the end of the allocation from SLURM_JOB_END_TIME and stops in time. Older versions of Slurm do not set it.
if [ -z "${SLURM_JOB_END_TIME:-}" ]; then
    end=$(date --date "$(squeue --noheader --job "$task" --format %e)" +%s) && export SLURM_JOB_END_TIME="$end"
fi

# Whatever runs at the signal, 15 to 75 seconds before the end, is stopped: its chunk is done again. This is not SIGTERM,
# which scancel sends: a cancelled task must not come back.
is_late=
trap 'is_late=yes; kill -TERM "$run"; wait "$run"' USR1

mkdir -p shards
"$batchgen" generate prompts.jsonl -o "shards/$SLURM_ARRAY_TASK_ID-$SLURM_ARRAY_TASK_COUNT.parquet" --shard auto \
    --model 124M --max-tokens 128 --jobs "$SLURM_CPUS_PER_TASK" --progress none --show 0 &
run=$! # in the background, because bash handles signals only between commands
wait "$run"
code=$?

if [ -n "$is_late" ] || [ "$code" -eq 75 ]; then
    if [ "${SLURM_RESTART_COUNT:-0}" -lt "$attempts" ]; then
        scontrol requeue "$task" && exit 75
    fi
    echo "slurm-array.sh: this task is unfinished and not queued again; submit it again to resume" >&2
    exit 75
fi
[ "$code" -ne 3 ] || exit 0 # finished, and the output has the reasons of rejected or failed rows: afterok wants 0
exit "$code"
