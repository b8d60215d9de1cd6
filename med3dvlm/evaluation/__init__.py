"""Evaluation: retrieval, report generation and question answering, each a command with a callable ``main(argv)``."""
