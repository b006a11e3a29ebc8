"""What several dashboards ask, and from where on it is bad: the alerts' own limits where there is an alert."""

from monitoring.dashboards.charts import Threshold

SINCE_LAST_STEP = 'time() - max by (run) (max_over_time(odonata_last_step_timestamp_seconds{run=~"$run"}[1h]))'
AGE_OF_CHECKPOINT = 'time() - max by (run) (odonata_last_checkpoint_timestamp_seconds{run=~"$run"})'
GOODPUT = 'max by (run) (odonata_goodput_ratio{run=~"$run"})'
MFU = 'run:odonata_mfu:mean5m{run=~"$run"}'
DATA_WAIT = 'run:odonata_data_wait:ratio5m{run=~"$run"}'
DONE = 'max by (run) (odonata_step{run=~"$run"}) / max by (run) (odonata_steps{run=~"$run"})'
LAG = 'max by (run) (odonata_checkpoint_lag_steps{run=~"$run"})'
BYTES_READ = 'sum by (run) (rate(odonata_data_read_bytes_total{run=~"$run"}[5m]))'
GETS = 'sum by (run) (rate(odonata_data_fetches_total{run=~"$run"}[5m]))'
REPLACED = 'max by (run) (rate(odonata_replaced_clips_total{run=~"$run"}[15m]) / rate(odonata_clips_total{run=~"$run"}[15m]))'
SAVING = 'max by (run) (odonata_checkpoint_seconds{run=~"$run"})'
SIZE = 'max by (run) (odonata_checkpoint_bytes{run=~"$run"})'
SAVE_STALL = (
    'max by (run) (rate(odonata_checkpoint_stall_seconds_total{run=~"$run"}[30m]) '
    '/ rate(odonata_step_seconds_sum{run=~"$run"}[30m]))'
)
SAVE_FAILURES = 'max by (run) (increase(odonata_checkpoint_failures_total{run=~"$run",rank="0"}[30m]))'

STALLED, HUNGRY, HALF_MFU = Threshold(600), Threshold(0.1), Threshold(0.3, "below")
TOO_OLD, TOO_FAR, GOOD = Threshold(5400), Threshold(2000), Threshold(0.9, "below")
