"""All runs: what they make of the machines that they hold."""

from monitoring.dashboards.charts import Board, Chart, Column, Table, Threshold
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

FLEET = Board(
    "odonata-fleet",
    "Odonata: fleet",
    "What do all runs make of the machines that they hold?",
    (
        Chart(
            "Runs",
            "That export anything now. Red at none.",
            "short",
            Threshold(1, "below"),
            (("runs", 'count (max by (run) (odonata_world_size{run=~"$run"}))'),),
            kind="figure",
        ),
        Chart(
            "Ranks",
            "That hold a device now. Red at none.",
            "short",
            Threshold(1, "below"),
            (("ranks", 'sum (max by (run) (odonata_world_size{run=~"$run"}))'),),
            kind="figure",
        ),
        Chart(
            "Goodput of the fleet",
            "Share of the rank hours of all runs in steps that count. Red below 90 %.",
            "percentunit",
            GOOD,
            (
                (
                    "goodput",
                    'sum (odonata_goodput_seconds{run=~"$run",bucket="productive"} '
                    "* on (run) group_left () max by (run) (odonata_world_size)) "
                    '/ sum (odonata_goodput_seconds{run=~"$run"} * on (run) group_left () max by (run) (odonata_world_size))',
                ),
            ),
            kind="figure",
        ),
        Chart(
            "Rank hours that made nothing",
            "Of all runs since they began: waiting, starting, being down, steps made again. Red above a thousand.",
            "short",
            Threshold(1000),
            (
                (
                    "hours",
                    'sum (odonata_goodput_seconds{run=~"$run",bucket!="productive"} '
                    "* on (run) group_left () max by (run) (odonata_world_size)) "
                    "/ 3600",
                ),
            ),
            kind="figure",
        ),
        Chart(
            "Longest silence",
            "Since the last step, of the run that is silent longest. Red after ten minutes.",
            "s",
            STALLED,
            (("silence", f"max ({SINCE_LAST_STEP})"),),
            "OdonataTrainingStalled",
            kind="figure",
        ),
        Chart(
            "Alerts",
            "Of ours that are firing. Red from one.",
            "short",
            Threshold(1),
            (("alerts", 'count (ALERTS{alertname=~"Odonata.*",alertstate="firing",run=~"$run"}) or vector(0)'),),
            kind="figure",
        ),
        Table(
            "Runs now",
            "A row a run; a red value is one to look at on that run's own dashboard.",
            (
                Column("ranks", 'max by (run) (odonata_world_size{run=~"$run"})', "short", Threshold(1, "below")),
                Column("done", DONE, "percentunit", Threshold(0.001, "below")),
                Column("since the last step", SINCE_LAST_STEP, "s", STALLED),
                Column("loss", 'max by (run) (odonata_loss{run=~"$run",rank="0"})', "short", Threshold(10)),
                Column("goodput", GOODPUT, "percentunit", GOOD),
                Column("MFU", MFU, "percentunit", HALF_MFU),
                Column("waiting for data", DATA_WAIT, "percentunit", HUNGRY),
                Column("age of checkpoint", AGE_OF_CHECKPOINT, "s", TOO_OLD),
                Column("starts", 'max by (run) (odonata_starts{run=~"$run"})', "short", Threshold(10)),
            ),
        ),
        Chart(
            "Goodput",
            "Share of a run's wall time in steps that count, over all its starts. Red below 90 %.",
            "percentunit",
            GOOD,
            (("{{run}}", GOODPUT),),
        ),
        Chart(
            "Where the wall time went",
            "Of all runs, since they began; `down` is between two starts, `lost` are steps that were made again. The line is a month.",
            "s",
            Threshold(30 * 86400),
            (("{{bucket}}", 'sum by (bucket) (odonata_goodput_seconds{run=~"$run"})'),),
            kind="areas",
        ),
        Chart(
            "MFU",
            "Mean of five minutes. Red below 30 %.",
            "percentunit",
            HALF_MFU,
            (("{{run}}", MFU),),
            "OdonataMfuCollapse",
        ),
        Chart(
            "Ranks that hold a device",
            "By run. Red at none.",
            "short",
            Threshold(1, "below"),
            (("{{run}}", 'max by (run) (odonata_world_size{run=~"$run"})'),),
            kind="areas",
        ),
        Chart(
            "Rank hours a thousand steps",
            "What progress costs: ranks times the seconds of a step, waiting and stalls included. Red above 100.",
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
            "Of each run since it began. Ten are many; three more within an hour are a loop.",
            "short",
            Threshold(10),
            (
                ("{{run}} starts", 'max by (run) (odonata_starts{run=~"$run"})'),
                ("{{run}} preemptions", 'max by (run) (odonata_preemptions{run=~"$run"})'),
            ),
            "OdonataRestartLoop",
        ),
    ),
    is_of_one_run=False,
)
