"""The training stages, each `python -m med3dvlm.train.<stage>` with a callable `main(argv)`."""
