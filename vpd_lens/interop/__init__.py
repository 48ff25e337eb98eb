"""Formats of other tools: what a graph is written as for circuit-tracer, Neuronpedia, networkx."""
