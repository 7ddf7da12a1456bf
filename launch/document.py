"""Write the settings of a cluster file as a page.

Run `python -m dist_vse.launch.document > docs/reference/cluster.md`.
"""

from dist_vse.config.document import docstrings, tables
from dist_vse.launch import cluster

_HEAD = """# The cluster file

A YAML file with these settings says where `dist-vse submit CONFIG --cluster FILE` runs a job.
Examples are in configs/clusters/. This page is written by `python -m dist_vse.launch.document` from
launch/cluster.py.
"""


def document() -> str:
    """Return every setting with its default and its docstring, as Markdown."""
    words = docstrings(cluster)
    return "\n".join([_HEAD, *tables(cluster.ClusterConfig, "The cluster", words)])


if __name__ == "__main__":
    print(document(), end="")
