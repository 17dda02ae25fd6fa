"""Requests refused from options, config.json and headers alone: before the seconds that torch and transformers take."""
