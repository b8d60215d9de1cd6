"""What `python -m med3dvlm.data.verify` checks, a module each: volumes, texts, tables of questions, leakage."""
