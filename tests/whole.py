"""Test files that launch whole runs, by folder and name."""

WHOLE = {
    "k8s/lifecycle",
    "k8s/nodes",
    "trainer/data/shards/same_everywhere",
    "trainer/alarmed_run",
    "trainer/bad_input",
    "trainer/full_disk",
    "trainer/objectives_together",
    "trainer/parity",
    "trainer/resume",
    "trainer/run_on_s3",
    "trainer/same_curves",
    "trainer/watched_run",
    "trainer/checkpoint/memory",
    "trainer/checkpoint/sharded",
}
"""Tests of a whole run or of a whole folder; every other file is named after the module that it tests."""

LONG = WHOLE | {
    "k8s/entrypoint",
    "trainer/evaluation/probing",
    "trainer/evaluation/scoring",
    "trainer/parallel/zero",
    "trainer/view/page",
}
"""They are begun first: of two workers that take a file at a time one would wait for the other's last."""
