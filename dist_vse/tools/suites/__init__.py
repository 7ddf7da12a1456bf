"""`dist-vse eval --suite`: other people's benchmarks, run on a model of ours."""
