"""Named objects in one place that outlives a pod: a folder or an S3 bucket, behind one interface."""
