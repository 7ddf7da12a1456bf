"""Write a cluster's settings as a page: `python -m launch.document > docs/cluster.md`."""

from dist_vse.config.document import docstrings, tables
from launch import cluster

_HEAD = """# Settings of a cluster

Written by `python -m launch.document` from launch/cluster.py. They stand in a YAML file for
`dist-vse submit CONFIG --cluster FILE`; examples are in configs/clusters/.
"""


def document() -> str:
    """Return every setting with its default and its docstring, as Markdown."""
    words = docstrings(cluster)
    return "\n".join([_HEAD, *tables(cluster.ClusterConfig, "The cluster", words)])


if __name__ == "__main__":
    print(document(), end="")
