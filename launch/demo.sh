#!/usr/bin/env bash
# The main job on a laptop: a synthetic city, then CroCo on its video, on two FSDP2 ranks under accelerate. Run it with `make demo`.
set -euo pipefail
cd "$(dirname "$0")/.."

bin=.venv/bin
out=${DEMO_FOLDER:-demo}
steps=${DEMO_STEPS:-150}
export OMP_NUM_THREADS=1  # one core a rank

echo "== 1. a synthetic city in nuScenes format -> $out/city"
"$bin/odonata" synthesize --out "$out/city" --scenes 4 --duration-s 4 --scale 0.125

echo "== 2. CroCo on video, $steps steps on two FSDP2 ranks -> $out/run   (metrics: http://localhost:9400/metrics)"
"$bin/accelerate" launch --config_file launch/accelerate/fsdp2.yaml --num_processes 2 -m odonata train \
  launch/runs/croco_video_tiny.yaml "data.root=$out/city" "run.uri=$out/run" "steps=$steps" global_batch=8 \
  optim.warmup_steps=20 checkpoint.every_steps=50 observe.evaluate_every_steps=50 observe.pictures_every_steps=50 observe.evaluate_clips=32

cat <<EOF

Done. So short a training only shows that all parts work: held-out losses with the true, a blank and a wrong reference still
lie together, and part after some hundred steps more (python -m benchmarks.croco). Look at:
  $out/run/pictures/       contact sheets: masked input | reconstruction | target | reference view
  $out/run/steps.jsonl     loss, gradient norm, learning rate and seconds of every step
  $out/run/checkpoints/    saved state; the same command again resumes from it
  $out/city/               the data: any nuScenes tool opens it

Next: your own data. Point data.root at a nuScenes dataroot and take a larger run config:
  accelerate launch --config_file launch/accelerate/fsdp2.yaml -m odonata train launch/runs/croco_video_base.yaml data.kind=nuscenes data.root=/data/nuscenes
EOF
