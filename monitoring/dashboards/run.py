"""One run: whether it learns, how fast it is, and how safe."""

from monitoring.dashboards.charts import Board, Chart, Threshold
from monitoring.dashboards.expressions import (
    AGE_OF_CHECKPOINT,
    DATA_WAIT,
    DONE,
    GOOD,
    GOODPUT,
    HALF_MFU,
    HUNGRY,
    MFU,
    SINCE_LAST_STEP,
    STALLED,
    TOO_OLD,
)

RUN = Board(
    "odonata-run",
    "Odonata: run",
    "Is this run learning, fast and safe, and what should I do?",
    (
        Chart(
            "Since the last step",
            "Red after ten minutes: nothing is learnt.",
            "s",
            STALLED,
            (("silence", SINCE_LAST_STEP),),
            "OdonataTrainingStalled",
            kind="figure",
        ),
        Chart(
            "Done",
            "Share of the run's steps that are finished. Red before the first thousandth.",
            "percentunit",
            Threshold(0.001, "below"),
            (("done", DONE),),
            kind="figure",
        ),
        Chart(
            "Goodput",
            "Share of the wall time, over all starts, in steps that count. Red below 90 %.",
            "percentunit",
            GOOD,
            (("goodput", GOODPUT),),
            kind="figure",
        ),
        Chart(
            "MFU",
            "Operations that are needed over what the devices could do, mean of five minutes. Red below 30 %.",
            "percentunit",
            HALF_MFU,
            (("MFU", MFU),),
            "OdonataMfuCollapse",
            kind="figure",
        ),
        Chart(
            "Waiting for data",
            "Share of the time of all ranks. Red above 10 %.",
            "percentunit",
            HUNGRY,
            (("waiting", DATA_WAIT),),
            "OdonataDataStarvation",
            kind="figure",
        ),
        Chart(
            "Age of the last checkpoint",
            "What a kill now would cost. Red at an hour and a half.",
            "s",
            TOO_OLD,
            (("age", AGE_OF_CHECKPOINT),),
            "OdonataCheckpointTooOld",
            kind="figure",
        ),
        Chart(
            "Loss",
            "Weighted sum and each objective's. It falls, quickly at first; `alert` is half as much again as an hour ago. Red above "
            "10, where no objective begins.",
            "short",
            Threshold(10),
            (
                ("weighted sum", 'odonata_loss{run=~"$run",rank="0"}'),
                ("{{objective}} {{part}}", 'odonata_loss_part{run=~"$run",rank="0",part=~".*loss"}'),
                ("alert", '1.5 * run:odonata_loss:mean10m{run=~"$run"} offset 1h'),
            ),
            "OdonataLossDiverging",
        ),
        Chart(
            "Pretext figures",
            "Parts that are no loss: retrieval and its chance, metres, colours. Red below 0, where none may be.",
            "short",
            Threshold(0, "below"),
            (("{{objective}} {{part}}", 'odonata_loss_part{run=~"$run",rank="0",part!~".*loss"}'),),
        ),
        Chart(
            "Frozen probes",
            "What `odonata probe` says of the newest checkpoint: figures of a head on the frozen encoder, held-out clips. Errors fall, "
            "shares rise. Empty where no probe follows the run. Red below 0, where none may be.",
            "short",
            Threshold(0, "below"),
            (("{{task}} {{metric}}", 'odonata_probe_score{run=~"$run"}'),),
        ),
        Chart(
            "Steps that probes are behind",
            "From the checkpoint that a task's newest probe has looked at to now. Red above 50,000: probes are slower than the run and "
            "miss checkpoints; give them a device of their own, or ask for fewer with --every.",
            "short",
            Threshold(50_000),
            (
                (
                    "{{task}}",
                    'max by (run) (odonata_step{run=~"$run",rank="0"}) - on (run) group_right () odonata_probe_step{run=~"$run"}',
                ),
            ),
        ),
        Chart(
            "What probing costs",
            "Seconds of the newest probe of a task, and probes given up in an hour. Red above an hour.",
            "s",
            Threshold(3600),
            (
                ("{{task}}", 'odonata_probe_seconds{run=~"$run"}'),
                ("{{task}} given up in 1 h", 'increase(odonata_probe_failures_total{run=~"$run"}[1h])'),
            ),
        ),
        Chart(
            "Gradient norm and skipped steps",
            "Norm of the whole gradient before clipping, and steps in which it or the loss was not finite. Red above 10.",
            "short",
            Threshold(10),
            (
                ("norm", 'odonata_grad_norm{run=~"$run",rank="0"}'),
                ("skipped in 15 min", 'increase(odonata_skipped_steps_total{run=~"$run",rank="0"}[15m])'),
            ),
            "OdonataLossNotFinite",
        ),
        Chart(
            "Learning rate",
            "Before layer decay: a warm-up, then a cosine. Red above 0.01, where transformers diverge.",
            "short",
            Threshold(0.01),
            (("learning rate", 'odonata_learning_rate{run=~"$run",rank="0"}'),),
        ),
        Chart(
            "Hidden from the encoder",
            "Share of a masked clip. Red above 95 %, where little is left to learn from.",
            "percentunit",
            Threshold(0.95),
            (("{{objective}}", 'odonata_mask_ratio{run=~"$run",rank="0"}'),),
        ),
        Chart(
            "Valid pairs an image",
            "Places of an image that a LiDAR centre is seen at. Red below 1: sweeps or calibration of the drives are wrong.",
            "short",
            Threshold(1, "below"),
            (("{{objective}}", 'odonata_valid_pairs{run=~"$run",rank="0"}'),),
        ),
        Chart(
            "Where a step's time goes",
            "Seconds of a step by phase, mean over ranks. Waiting for data should be next to nothing. Red above a minute.",
            "s",
            Threshold(60),
            (
                (
                    "{{phase}}",
                    'sum by (phase) (rate(odonata_step_phase_seconds_total{run=~"$run"}[5m])) '
                    '/ on () group_left () sum (rate(odonata_step_seconds_count{run=~"$run"}[5m]))',
                ),
            ),
            kind="areas",
        ),
        Chart(
            "Skew between ranks",
            "How much longer than the median the slowest rank was busy with its own, as a share of the step. Red above a fifth.",
            "percentunit",
            Threshold(0.2),
            (
                (
                    "skew",
                    'max by (run) (avg_over_time(odonata_step_skew_seconds{run=~"$run",rank="0"}[10m])) / run:odonata_step_seconds:mean5m',
                ),
            ),
            "OdonataStraggler",
        ),
        Chart(
            "Busiest ranks",
            "Seconds of a step in what no other rank can hold up, the five that need most. One alone is a slow device, disk or node; red "
            "above ten seconds.",
            "s",
            Threshold(10),
            (
                (
                    "rank {{rank}}",
                    'topk(5, sum by (rank) (rate(odonata_step_phase_seconds_total{run=~"$run",rank=~"$rank",'
                    'phase=~"data_wait|host_to_device|forward"}[5m])) '
                    '/ sum by (rank) (rate(odonata_step_seconds_count{run=~"$run",rank=~"$rank"}[5m])))',
                ),
            ),
            "OdonataStraggler",
        ),
        Chart(
            "Utilisation",
            "MFU: operations that are needed over what the devices could do, waiting included; HFU counts recomputation. Red below 30 %.",
            "percentunit",
            HALF_MFU,
            (("MFU", MFU), ("HFU", 'avg by (run) (odonata_hfu_ratio{run=~"$run",rank="0"})')),
            "OdonataMfuCollapse",
        ),
        Chart(
            "Clips a second",
            "Over all ranks, measured from step to step; red at none.",
            "cps",
            Threshold(0.001, "below"),
            (("clips", 'odonata_clips_per_second{run=~"$run",rank="0"}'),),
            "OdonataTrainingStalled",
        ),
        Chart(
            "Memory",
            "The most of the ranks: torch's allocations and reservations on GPUs, resident memory of the host. Red at 90 % of an H200's.",
            "bytes",
            Threshold(0.9 * 141e9),
            (
                ("{{kind}}", 'max by (kind) (odonata_memory_bytes{run=~"$run",rank=~"$rank"})'),
                ("peak", 'max (odonata_peak_memory_bytes{run=~"$run",rank=~"$rank"})'),
            ),
        ),
        Chart(
            "Slowest rank",
            "A rank that stays here for long is the one to look at. Ranks are numbers, so no value is good or bad; the line is rank 0.",
            "short",
            Threshold(0, "below"),
            (("rank", 'odonata_slowest_rank{run=~"$run",rank="0"}'),),
            "OdonataStraggler",
        ),
        Chart(
            "Starts and steps made again",
            "Since the run began. Red from ten of either; three more starts within an hour are a loop.",
            "short",
            Threshold(10),
            (
                ("starts", 'max by (run) (odonata_starts{run=~"$run"})'),
                ("steps made again", 'max by (run) (odonata_lost_steps{run=~"$run"})'),
            ),
            "OdonataRestartLoop",
        ),
        Chart(
            "What watching costs",
            "CPU time of metrics, their server and the watchdog over that of the process. It should stay below 0.2 %.",
            "percentunit",
            Threshold(0.002),
            (
                (
                    "share",
                    'sum (rate(odonata_monitoring_cpu_seconds_total{run=~"$run"}[5m])) '
                    '/ sum (rate(odonata_cpu_seconds_total{run=~"$run"}[5m]))',
                ),
            ),
        ),
    ),
)
