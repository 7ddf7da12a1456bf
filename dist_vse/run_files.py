"""The names in a run's folder."""

CONFIG_NAME = "config.yaml"  # the whole resolved config
VOCABULARY_NAME = "vocabulary.json"  # of text encoders from scratch
METRICS_NAME = "metrics.jsonl"  # a line a log step and a line an evaluation
EXAMPLES_NAME = "examples.json"  # queries with their best answers, for the report
RESULT_NAME = "eval-{split}.json"  # what `dist-vse eval` measured
CHECKPOINTS = "checkpoints"
