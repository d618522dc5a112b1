"""From text to batches: the template, training triples, BEIR collections, the built-in corpus."""
