"""Data: whether it comes fast enough, and is whole."""

from monitoring.dashboards.charts import Board, Chart, Threshold
from monitoring.dashboards.expressions import BYTES_READ, DATA_WAIT, GETS, HUNGRY, REPLACED

DATA = Board(
    "odonata-data",
    "Odonata: data",
    "Does data come fast enough, and is it whole?",
    (
        Chart(
            "Waiting for data",
            "Share of the time of all ranks. Above 10 % GPUs starve; 1 % is the aim.",
            "percentunit",
            HUNGRY,
            (("waiting", DATA_WAIT),),
            "OdonataDataStarvation",
            kind="figure",
        ),
        Chart(
            "Bytes read a second",
            "Over all ranks, files and store. Red above 100 GB/s, which few stores give.",
            "Bps",
            Threshold(100e9),
            (("read", BYTES_READ),),
            kind="figure",
        ),
        Chart(
            "Requests a second",
            "To the store, over all ranks. Red above 5,500 GET/s, which one S3 partition gives.",
            "cps",
            Threshold(5500),
            (("GET", GETS),),
            kind="figure",
        ),
        Chart(
            "Had by the node's cache",
            "Share of the ranges that were not asked of the store again. Red below a half, where a cache is hardly worth its disk.",
            "percentunit",
            Threshold(0.5, "below"),
            (
                (
                    "hits",
                    'sum by (run) (rate(odonata_data_cache_hits_total{run=~"$run"}[5m])) / (sum by (run) '
                    '(rate(odonata_data_cache_hits_total{run=~"$run"}[5m]) + rate(odonata_data_fetches_total{run=~"$run"}[5m])))',
                ),
            ),
            kind="figure",
        ),
        Chart(
            "Loader threads at work",
            "Of a rank: seconds of reading, decoding and preparing in a second. Red above 16, more than a rank's share of cores.",
            "short",
            Threshold(16),
            (("threads", 'avg by (run) (rate(odonata_data_load_seconds_total{run=~"$run"}[5m]))'),),
            kind="figure",
        ),
        Chart(
            "Replaced clips",
            "Share of the clips that could not be read. Red above half of what data.max_replaced_share allows by default.",
            "percentunit",
            Threshold(0.005),
            (("replaced", REPLACED),),
            kind="figure",
        ),
        Chart(
            "Waiting for data by run",
            "Share of the time of all ranks. Above 10 % GPUs starve; 1 % is the aim.",
            "percentunit",
            HUNGRY,
            (("{{run}}", DATA_WAIT),),
            "OdonataDataStarvation",
        ),
        Chart(
            "Ranks that wait most",
            "The five worst: one alone is a node or a disk, all are the store or too few workers. Red above 10 %.",
            "percentunit",
            HUNGRY,
            (
                (
                    "rank {{rank}}",
                    'topk(5, rate(odonata_data_wait_seconds_total{run=~"$run",rank=~"$rank"}[5m]) '
                    '/ rate(odonata_step_seconds_sum{run=~"$run",rank=~"$rank"}[5m]))',
                ),
            ),
            "OdonataDataStarvation",
        ),
        Chart(
            "Bytes read",
            "A second, over all ranks, files and store. Red above 100 GB/s, which few stores give.",
            "Bps",
            Threshold(100e9),
            (("{{run}}", BYTES_READ),),
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
            "Time of loader threads for one clip: decoders alone, and all of reading, decoding and preparing. Red above a second.",
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
            (("{{run}}", REPLACED),),
        ),
    ),
)
