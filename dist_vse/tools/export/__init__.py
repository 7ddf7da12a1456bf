"""A trained model as a folder: `dist-vse export` writes it, `dist_vse.load` reads it."""
