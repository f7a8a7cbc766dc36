"""A run in a bucket: `gs://` and `s3://`, by conditional writes of whole objects."""
