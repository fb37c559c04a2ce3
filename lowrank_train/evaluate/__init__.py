"""Measuring a trained model: perplexity, and text it writes."""
