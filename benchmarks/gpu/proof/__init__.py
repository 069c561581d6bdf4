"""What a GPU must show before a kernel counts as right there: the suite, equal bits, graphs, a silent sanitizer."""
