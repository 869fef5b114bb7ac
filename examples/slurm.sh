#!/usr/bin/env bash
# Training under SLURM that ends before its time limit and continues in a requeued job, until it is done.
# Command:  sbatch examples/slurm.sh pretrain.py --config configs/pretrain.yaml --output_dir output/pretrain
#SBATCH --job-name=blip
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append

# Five minutes before the end SLURM sends SIGTERM to every process of every node: the run saves a checkpoint after the
# step, and ends with code 143. An evaluation does not react; where SLURM gives the end time, it is ended a minute before,
# and the next job starts it again. SLURM requeues a job that loses a node.
set -u
arguments=("$@")
output=""
for ((i = 0; i < $#; i++)); do
  [ "${arguments[i]}" = --output_dir ] && output="${arguments[i + 1]}"
done
if [ -z "$output" ]; then
  echo "error: no --output_dir among the arguments; name the folder that the run is to go on in" >&2
  exit 2
fi
if [ -f "$output/checkpoint_last.pth" ]; then
  arguments+=(--resume)
fi
end=$((${SLURM_JOB_END_TIME:-0} - 60))
left=$((end > 0 ? end - $(date +%s) : 0))
if [ "$end" -gt 0 ] && [ "$left" -lt 1 ]; then left=1; fi
timeout --kill-after=30 "$left" srun --kill-on-bad-exit=0 python "${arguments[@]}"  # 0: for as long as it takes
code=$?
if [ "$code" -eq 143 ] || { [ "$code" -ne 0 ] && [ "$end" -gt 0 ] && [ "$(date +%s)" -ge "$end" ]; }; then
  echo "time is nearly up; requeueing job $SLURM_JOB_ID"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
