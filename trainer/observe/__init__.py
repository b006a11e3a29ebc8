"""What a run shows while it trains: reports go in; the record, the progress, the pictures and the metrics come out."""
