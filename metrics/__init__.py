"""Metrics of captioning, retrieval, question answering and classification."""
