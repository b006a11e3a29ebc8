"""Counts are those of the thread that reads, and sums keep them apart by name."""

from concurrent.futures import ThreadPoolExecutor

from trainer.data.counting import count, counting, counting_seconds, sum_counts


def test_what_happens_in_the_block_is_counted_with_its_seconds() -> None:
    with counting() as counts:
        count("files")
        count("files")
        count("bytes", 100.0)
        with counting_seconds("decode_seconds"):
            pass
    count("files")
    assert counts.keys() == {"files", "bytes", "decode_seconds", "load_seconds"}
    assert (counts["files"], counts["bytes"]) == (2, 100)
    assert 0 <= counts["decode_seconds"] <= counts["load_seconds"]


def test_threads_do_not_count_for_each_other() -> None:
    def read(files: int) -> float:
        with counting() as counts:
            for _ in range(files):
                count("files")
        return counts["files"]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, range(1, 50))) == list(range(1, 50))


def test_sums_go_by_name() -> None:
    assert sum_counts([{"files": 1.0}, {"files": 2.0, "bytes": 5.0}]) == {"files": 3, "bytes": 5}
