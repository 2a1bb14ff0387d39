"""One adapter of a model: the layers it goes to, its file, its card, where it starts."""
