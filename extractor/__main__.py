"""`python -m extractor CHECKPOINT STORE`, the same as `deepfew extract`."""

import typer

from extractor.cli.extract import extract

if __name__ == "__main__":
    typer.run(extract)
