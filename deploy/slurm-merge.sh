#!/usr/bin/env bash
# The shards of slurm-array.sh as one file, with the rows that one run would have written; see there for how to submit it.
# batchgen refuses a set of shards that lacks one, has one twice, or has shards of different options or prompts.

#SBATCH --job-name=batchgen-merge
#SBATCH --cpus-per-task=1
#SBATCH --mem=4G
#SBATCH --time=01:00:00
#SBATCH --kill-on-invalid-dep=yes # if a shard failed: do not wait for ever
#SBATCH --output=batchgen-merge-%j.log

batchgen=${BATCHGEN:-/opt/batchgen/.venv/bin/batchgen}

"$batchgen" merge shards/*.parquet -o completions.parquet
code=$?
[ "$code" -ne 3 ] || exit 0 # merged, and some rows are rejected or failed
exit "$code"
