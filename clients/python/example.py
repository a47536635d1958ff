"""Encode images over Kafka, and scale each latent for a diffusion model: `python example.py photo.jpg other.png`."""

import sys
from concurrent.futures import as_completed
from pathlib import Path

from latent_encoder_client import Client, ClientError, EncodeFailed, load_latent, normalise


def main(images: list[str]) -> int:
    """Print the shape of each latent, or the reason why there is none, and return the exit status."""
    failed = 0
    with Client.from_environment() as client:
        futures = {client.send(Path(image).resolve(), timeout_s=300): image for image in images}
        for future in as_completed(futures):
            image = futures[future]
            try:
                success = future.result()
                latent = normalise(load_latent(success), success)
            except EncodeFailed as failure:  # the service's own words, after the retries that are worth it
                print(f"{image}: {failure.code}: {failure}")
                failed += 1
            except ClientError as error:  # no response in time, or a file that is not the one of the response
                print(f"{image}: {error}")
                failed += 1
            else:
                print(f"{image}: {tuple(latent.shape)} of {success.metadata.latent_space}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
