"""Ours beside the plain released algorithm and Hugging Face transformers, in one run: python -m benchmarks"""
