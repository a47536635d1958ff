"""Images and files behind URLs: object storage (`s3://`, `gs://`, `az://`) and web servers (`https://`, `http://`).

`locations` parses and compares URLs, `access` holds the limits, `stores` calls object storage, `web` calls web servers, and
`images` reads an image from either.
"""
