"""The four dashboards: one run, all runs, data, checkpoints.

Left to whom: how a chart becomes a panel is `charts`; expressions that alerts use as well are recording rules (`monitoring/rules`).
"""

from monitoring.dashboards.charts import Board, Chart, Threshold

RUN = Board(
    "odonata-run",
    "Odonata: run",
    "Is this run learning, fast and safe, and what should I do?",
    (
        Chart(
            "Loss",
            "Weighted sum of the objectives' losses, and each part. It falls, quickly at first. Red: half as much again as an hour ago.",
            "short",
            Threshold(1.5),
            (
                (
                    "over the value of an hour ago",
                    'run:odonata_loss:mean10m{run=~"$run"} / (run:odonata_loss:mean10m{run=~"$run"} offset 1h)',
                ),
                ("loss", 'odonata_loss{run=~"$run",rank="0"}'),
                ("{{objective}} {{part}}", 'odonata_loss_part{run=~"$run",rank="0"}'),
            ),
            "OdonataLossDiverging",
        ),
        Chart(
            "Gradient norm and skipped steps",
            "Norm of the whole gradient before clipping, and steps in which it or the loss was not finite.",
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
            "Before layer decay: a warm-up, then a cosine.",
            "short",
            Threshold(0.01),
            (("learning rate", 'odonata_learning_rate{run=~"$run",rank="0"}'),),
        ),
        Chart(
            "Steps",
            "Share of the run's steps that are finished. A flat line is a stalled run.",
            "percentunit",
            Threshold(0, "below"),
            (("done", 'odonata_step{run=~"$run",rank="0"} / odonata_steps{run=~"$run",rank="0"}'),),
            "OdonataTrainingStalled",
        ),
        Chart(
            "Where a step's time goes",
            "Seconds of a step by phase, mean over ranks. Waiting for data should be next to nothing.",
            "s",
            Threshold(60),
            (
                (
                    "{{phase}}",
                    'sum by (phase) (rate(odonata_step_phase_seconds_total{run=~"$run"}[5m])) '
                    '/ on () group_left () sum (rate(odonata_step_seconds_count{run=~"$run"}[5m]))',
                ),
            ),
        ),
        Chart(
            "Utilisation",
            "MFU: operations that are needed over what the devices could do, waiting included; HFU counts recomputation. Red below 30 %.",
            "percentunit",
            Threshold(0.3, "below"),
            (
                ("MFU", 'run:odonata_mfu:mean5m{run=~"$run"}'),
                ("HFU", 'avg by (run) (odonata_hfu_ratio{run=~"$run",rank="0"})'),
            ),
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
            "Skew between ranks",
            "How much longer than the median the slowest rank was busy with its own, as a share of the step; and which rank it was.",
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
            "Slowest rank",
            "A rank that stays here for long is the one to look at. Ranks are numbers, so no value is good or bad; the line is rank 0.",
            "short",
            Threshold(0, "below"),
            (("rank", 'odonata_slowest_rank{run=~"$run",rank="0"}'),),
            "OdonataStraggler",
        ),
        Chart(
            "Memory",
            "The most of all ranks: torch's allocations and reservations on GPUs, resident memory of the host. Red at 90 % of an H200's.",
            "bytes",
            Threshold(0.9 * 141e9),
            (
                ("{{kind}}", 'max by (kind) (odonata_memory_bytes{run=~"$run"})'),
                ("peak", 'max (odonata_peak_memory_bytes{run=~"$run"})'),
            ),
        ),
        Chart(
            "Steps that a kill would cost",
            "Finished since the last committed checkpoint.",
            "short",
            Threshold(2000),
            (("lag", 'odonata_checkpoint_lag_steps{run=~"$run",rank="0"}'),),
            "OdonataCheckpointTooOld",
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

FLEET = Board(
    "odonata-fleet",
    "Odonata: fleet",
    "What do all runs make of the machines that they hold?",
    (
        Chart(
            "Goodput",
            "Share of a run's wall time in steps that count, over all its starts. Red below 90 %.",
            "percentunit",
            Threshold(0.9, "below"),
            (("{{run}}", 'max by (run) (odonata_goodput_ratio{run=~"$run"})'),),
        ),
        Chart(
            "Where the wall time went",
            "Hours of all runs by bucket; `down` is between two starts, `lost` are steps that were made again.",
            "s",
            Threshold(3600),
            (("{{bucket}}", 'sum by (bucket) (odonata_goodput_seconds{run=~"$run"})'),),
        ),
        Chart(
            "MFU",
            "Mean of five minutes. Red below 30 %.",
            "percentunit",
            Threshold(0.3, "below"),
            (("{{run}}", 'run:odonata_mfu:mean5m{run=~"$run"}'),),
            "OdonataMfuCollapse",
        ),
        Chart(
            "Ranks",
            "That hold a device now.",
            "short",
            Threshold(1, "below"),
            (("{{run}}", 'max by (run) (odonata_world_size{run=~"$run"})'),),
        ),
        Chart(
            "Rank hours a thousand steps",
            "What progress costs: ranks times the seconds of a step, waiting and stalls included.",
            "short",
            Threshold(100),
            (
                (
                    "{{run}}",
                    'max by (run) (odonata_world_size{run=~"$run"}) * 1000 / 3600 '
                    '/ max by (run) (rate(odonata_step_seconds_count{run=~"$run",rank="0"}[15m]))',
                ),
            ),
        ),
        Chart(
            "Starts and preemptions",
            "Of each run since it began. Three more within an hour are a loop.",
            "short",
            Threshold(10),
            (
                ("{{run}} starts", 'max by (run) (odonata_starts{run=~"$run"})'),
                ("{{run}} preemptions", 'max by (run) (odonata_preemptions{run=~"$run"})'),
                ("{{run}} lost steps", 'max by (run) (odonata_lost_steps{run=~"$run"})'),
            ),
            "OdonataRestartLoop",
        ),
    ),
    is_of_one_run=False,
)

DATA = Board(
    "odonata-data",
    "Odonata: data",
    "Does data come fast enough, and is it whole?",
    (
        Chart(
            "Waiting for data",
            "Share of the time of all ranks. Above 10 % GPUs starve; 1 % is the aim.",
            "percentunit",
            Threshold(0.1),
            (("{{run}}", 'run:odonata_data_wait:ratio5m{run=~"$run"}'),),
            "OdonataDataStarvation",
        ),
        Chart(
            "Worst waiting rank",
            "The five ranks that wait most: one alone is a node or a disk, all are the store or too few workers.",
            "percentunit",
            Threshold(0.1),
            (
                (
                    "rank {{rank}}",
                    'topk(5, rate(odonata_data_wait_seconds_total{run=~"$run"}[5m]) / rate(odonata_step_seconds_sum{run=~"$run"}[5m]))',
                ),
            ),
            "OdonataDataStarvation",
        ),
        Chart(
            "Bytes read a second",
            "Over all ranks, files and store. Red above 100 GB/s, which few stores give.",
            "Bps",
            Threshold(100e9),
            (("{{run}}", 'sum by (run) (rate(odonata_data_read_bytes_total{run=~"$run"}[5m]))'),),
        ),
        Chart(
            "Reads a second",
            "Requests to the store, loose files, and what the nodes' caches had. One S3 partition gives 5,500 GET/s.",
            "cps",
            Threshold(5500),
            (
                ("GET", 'sum (rate(odonata_data_fetches_total{run=~"$run"}[5m]))'),
                ("files", 'sum (rate(odonata_data_files_total{run=~"$run"}[5m]))'),
                ("cache hits", 'sum (rate(odonata_data_cache_hits_total{run=~"$run"}[5m]))'),
            ),
        ),
        Chart(
            "Loader seconds a clip",
            "Time of loader threads for one clip of a rank: decoders alone, and all of reading, decoding and preparing.",
            "s",
            Threshold(1),
            (
                (
                    "decode",
                    'sum (rate(odonata_data_decode_seconds_total{run=~"$run"}[5m])) / max (rate(odonata_clips_total{run=~"$run"}[5m]))',
                ),
                (
                    "load",
                    'sum (rate(odonata_data_load_seconds_total{run=~"$run"}[5m])) / max (rate(odonata_clips_total{run=~"$run"}[5m]))',
                ),
            ),
        ),
        Chart(
            "Clips that were replaced",
            "Share of the clips that could not be read. data.max_replaced_share ends the run at 1 % unless it says otherwise.",
            "percentunit",
            Threshold(0.005),
            (
                (
                    "{{run}}",
                    'max by (run) (rate(odonata_replaced_clips_total{run=~"$run"}[15m]) / rate(odonata_clips_total{run=~"$run"}[15m]))',
                ),
            ),
        ),
    ),
)

CHECKPOINTS = Board(
    "odonata-checkpoints",
    "Odonata: checkpoints",
    "What would a kill cost now, and what does it cost to be safe?",
    (
        Chart(
            "Age of the last checkpoint",
            "Since it was committed. Red at an hour and a half.",
            "s",
            Threshold(5400),
            (("{{run}}", 'time() - max by (run) (odonata_last_checkpoint_timestamp_seconds{run=~"$run"})'),),
            "OdonataCheckpointTooOld",
        ),
        Chart(
            "Steps that a kill would cost",
            "Finished since the last committed checkpoint.",
            "short",
            Threshold(2000),
            (
                ("{{run}} lag", 'max by (run) (odonata_checkpoint_lag_steps{run=~"$run"})'),
                ("{{run}} last saved step", 'max by (run) (odonata_last_checkpoint_step{run=~"$run"})'),
            ),
            "OdonataCheckpointTooOld",
        ),
        Chart(
            "Duration",
            "From the beginning of a save to its commit, behind the training. Longer than the cadence holds training up.",
            "s",
            Threshold(600),
            (("{{run}}", 'max by (run) (odonata_checkpoint_seconds{run=~"$run"})'),),
            "OdonataStoreFailing",
        ),
        Chart(
            "Share of the time that training waits for saves",
            "Copying to host memory, and a save that is still under way when the next is due. Red above 1 %.",
            "percentunit",
            Threshold(0.01),
            (
                (
                    "{{run}}",
                    'max by (run) (rate(odonata_checkpoint_stall_seconds_total{run=~"$run"}[30m]) / '
                    'rate(odonata_step_seconds_sum{run=~"$run"}[30m]))',
                ),
            ),
        ),
        Chart(
            "Size",
            "Of one checkpoint, over all ranks.",
            "bytes",
            Threshold(1e12),
            (("{{run}}", 'max by (run) (odonata_checkpoint_bytes{run=~"$run"})'),),
        ),
        Chart(
            "Saves and failures in half an hour",
            "A failed save is no checkpoint; a few in a row end the run.",
            "short",
            Threshold(1),
            (
                ("{{run}} failed", 'max by (run) (increase(odonata_checkpoint_failures_total{run=~"$run",rank="0"}[30m]))'),
                ("{{run}} committed", 'max by (run) (increase(odonata_checkpoints_total{run=~"$run",rank="0"}[30m]))'),
            ),
            "OdonataStoreFailing",
        ),
    ),
)

BOARDS = (RUN, FLEET, DATA, CHECKPOINTS)
