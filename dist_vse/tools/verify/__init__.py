"""`dist-vse verify`: the gradients of a config on several processes, against one in float64."""
